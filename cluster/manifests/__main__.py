"""`python -m cluster.manifests FILE...`: prints what is wrong; exit status 1 where something is."""

import sys
from pathlib import Path

from cluster.manifests import FOLDER, SHIPPED, check

if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or [FOLDER / name for name in SHIPPED]
    problems = [problem for file in files for problem in check(file)]
    print("\n".join(problems) or f"{len(files)} file(s) are fine")
    sys.exit(1 if problems else 0)
