"""Start-up check that the project's packages are its own: their names also exist on PyPI under
other owners.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

# Package -> a file that only this project's package of that name holds.
MARKERS: Mapping[str, str] = {
    "envs": "knobs.py",
    "policies": "networks.py",
    "cluster": "origin.py",
    "ray_ctrl": "cli.py",
}


def wrong_origin(markers: Mapping[str, str] = MARKERS) -> str | None:
    """One line naming the first package that is missing or comes from elsewhere, or None when all
    belong together.

    All packages must lie beside one another (one checkout or one installed wheel) and hold their
    marker file.
    """
    root = Path(__file__).resolve().parents[1]
    for package, marker in markers.items():
        spec = find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places:
            return f"package {package!r} cannot be found: install ray-ctrl again, or start from its checkout"
        place = Path(places[0]).resolve()
        if place.parent != root or not (place / marker).is_file():
            return (
                f"package {package!r} is imported from {place}, which is not ray-ctrl's "
                f"({root / package}): "
                f"uninstall the PyPI package of that name, or put {root} first on PYTHONPATH"
            )
    return None
