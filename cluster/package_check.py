"""Check that the project's packages are its own: folders of users and PyPI packages of other owners share their names.

Standard library only, so that the check itself does not fail on a wrong package.
"""

import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

# Package -> a file that only this project's package of that name contains.
MARKERS: Mapping[str, str] = {
    "envs": "knobs.py",
    "policies": "networks.py",
    "cluster": "package_check.py",
    "ray_ctrl": "cli.py",
}
ROOT = Path(__file__).resolve().parents[1]


def package_conflict(markers: Mapping[str, str] = MARKERS) -> str | None:
    """One line that names the first package of this process that is missing or not ray-ctrl's; None if all are.

    All packages must be next to one another (one checkout or one installed wheel) and contain their marker file.
    """
    for package, marker in markers.items():
        spec = find_spec(package)
        if spec is None:
            return f"package {package!r} is not installed: install ray-ctrl again, or start from its checkout"
        found = _location(spec)
        if found.parent != ROOT or not (found / marker).is_file():
            return _explain(package, found)
    return None


def worker_conflict(folders: Iterable[Path] | None = None) -> str | None:
    """The same for Ray's workers, which import from the driver's working and script folders before installed packages.

    Args:
        folders: folders that Ray adds to the import path of its workers; by default those of this process.
    """
    if folders is None:
        folders = (Path.cwd(), Path(sys.argv[0]).absolute().parent)
    for folder in folders:
        for package in MARKERS:
            spec = PathFinder.find_spec(package, [str(folder)])
            # A folder without __init__.py hides only packages that are found by a finder of their own (pip install -e).
            hides = spec is not None and (spec.loader is not None or str(ROOT) not in sys.path)
            if spec is not None and hides and (found := _location(spec)) != ROOT / package:
                return _explain(package, found)
    return None


def _location(spec: object) -> Path:
    places = list(getattr(spec, "submodule_search_locations", None) or [])
    return Path(places[0] if places else str(getattr(spec, "origin", ""))).resolve()


def _explain(package: str, found: Path) -> str:
    return (
        f"package {package!r} is imported from {found}, which is not ray-ctrl's ({ROOT / package}): rename "
        f"{found.name} in {found.parent}, start from another folder, or uninstall the PyPI package of that name"
    )
