"""`ray-ctrl profile`: measure this device into a file."""

from collections.abc import Sequence
from pathlib import Path

from envs.errors import UserError
from ray_ctrl.console import console
from ray_ctrl.load_config import load_config
from ray_ctrl.profiles import measure_profile
from ray_ctrl.run_context import open_context
from ray_ctrl.run_folder import check_writable, explained


def run(preset: str, config_file: Path | None, overrides: Sequence[str], out: Path) -> None:
    """Writes a profile to a new file.

    Raises:
        UserError: the file exists or cannot be written, or the model cannot be loaded.
    """
    with explained(out):
        if out.exists():
            raise UserError(f"{out} exists already: choose another file with --out, or remove it first")
    check_writable(out.absolute().parent)
    config = load_config(preset, config_file, overrides)
    measure_profile(config, open_context(config).engine).save(out)
    console.print(f"profile in {out}; use it with latency.source=profiled latency.profile={out}")
