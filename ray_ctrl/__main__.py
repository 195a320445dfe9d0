"""Entry point of `ray-ctrl`, `python -m ray_ctrl` and train.py.

Checks which packages are imported before it imports any of them.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    try:
        from cluster.package_check import package_conflict

        conflict = package_conflict()
    except ImportError:
        import cluster

        found = cluster.__file__ or next(iter(cluster.__path__))
        conflict = f"package 'cluster' is imported from {found}, which is not ray-ctrl's: rename that folder or file"
    if conflict is not None:
        print(f"error: {conflict}", file=sys.stderr)
        return 2
    from ray_ctrl.cli import main as command_line

    return command_line(arguments)


if __name__ == "__main__":
    sys.exit(main())
