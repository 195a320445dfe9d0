"""Where controllers are: in run folders, checkpoints, sweeps and exports."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.model.checkpoint import resolve_folder
from policies.controller import CARD_FILE, WEIGHTS_FILE
from ray_ctrl.config import Config
from ray_ctrl.load_config import parse
from ray_ctrl.run_folder import RunFolder, explained, newest_runs, select_checkpoint

README = "README.md"


def find_controller(path: Path) -> tuple[Path, Path]:
    """The export at `path`, and the folder that keeps what belongs to it (run, sweep, or the export's parent).

    Raises:
        UserError: no run folder, sweep, checkpoint or export with a controller.
    """
    with explained(path, "give a run folder or an exported controller", verb="read"):
        if (path / "run.json").is_file():
            folder = RunFolder.open(path)
            if folder.controller.is_dir():
                return folder.controller, path
            chosen = select_checkpoint(folder.checkpoints())
            if chosen is None:
                raise UserError(f"run {path} has no checkpoint yet: continue it with --resume")
            return chosen.path / "controller", path
        if (path / "controller" / "controller.json").is_file():  # a sweep, or a checkpoint of a run
            run = path.absolute().parent.parent
            return path / "controller", run if (run / "run.json").is_file() else path
        if (path / "sweep.yaml").is_file():
            raise UserError(
                f"sweep {path} has exported no controller yet: continue it with ray-ctrl tune --resume --run-dir {path}"
            )
        if not path.is_dir():
            raise UserError(f"no run folder or exported controller at {path}: train first with 'ray-ctrl train'")
    return path, path.absolute().parent


def controller_folder(place: str | Path) -> Path:
    """Folder with the controller of a run folder, of an export, or of a repository on the hub, which is fetched.

    Raises:
        UserError: there is none.
    """
    if Path(place).exists() or str(place).count("/") != 1:
        return find_controller(Path(place))[0]
    return resolve_folder(place, files=(CARD_FILE, WEIGHTS_FILE, README))


def newest_controller(folder: Path) -> Path:
    """The controller of the newest run in `folder` that has one.

    Raises:
        UserError: there is none.
    """
    for run in newest_runs(folder):
        with suppress(UserError):
            return find_controller(run.root)[0]
    raise UserError(f"no run with a controller in {folder}: train first with 'ray-ctrl train'")


def controller_config(metadata: Mapping[str, Any], folder: Path) -> Config:
    """The configuration a controller was trained with.

    Raises:
        UserError: an export without it.
    """
    if not isinstance(metadata.get("config"), dict):
        raise UserError(f"controller {folder} contains no settings: export it with 'ray-ctrl train'")
    return parse(metadata["config"])
