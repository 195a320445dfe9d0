"""`ray-ctrl store ...`: inspect, prune and export an outcome store."""

from pathlib import Path

from envs.engine.store import export_parquet, open_existing
from ray_ctrl.console import console

GIGABYTE = 10**9


def inspect(path: Path) -> None:
    """Prints counts, size and the settings under which entries were computed."""
    found = open_existing(path).inspect()
    for name, value in found.items():
        if name != "settings":
            console.print(f"{name:<24}{value}")
    for fingerprint in found["settings"]:
        console.print("computed with", ", ".join(f"{k} {str(v)[:16]}" for k, v in fingerprint.items()))


def prune(path: Path, max_gb: float | None, unused_days: float | None) -> None:
    """Deletes entries unused for long, then the longest unused until the store is small enough."""
    limit = None if max_gb is None else round(max_gb * GIGABYTE)
    gone = open_existing(path).prune(limit, unused_days=unused_days)
    console.print(f"{gone} entries deleted")


def export(path: Path, out: Path, table: str) -> None:
    """Writes a table as Parquet to a new file."""
    rows = export_parquet(open_existing(path), out, table)
    console.print(f"{rows} rows in {out}")
