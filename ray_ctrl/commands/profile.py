"""`ray-ctrl profile`: measure this device into a table."""

from collections.abc import Sequence
from pathlib import Path

from envs.errors import UserError
from ray_ctrl.console import console
from ray_ctrl.load_config import load_config
from ray_ctrl.run_context import measure_table, open_setting


def run(preset: str, config_file: Path | None, overrides: Sequence[str], out: Path) -> None:
    """Writes a profile table to a new file.

    Raises:
        UserError: the file exists, or the model cannot be loaded.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another file with --out, or remove it first")
    config = load_config(preset, config_file, overrides)
    setting = open_setting(config)
    measure_table(config, setting.engine).save(out)
    console.print(f"profile table in {out}; use it with latency.source=profiled latency.profile={out}", markup=False)
