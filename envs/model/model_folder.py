"""Where a model's small files are: a local folder, the embedded model, or files of a hub model."""

import re
from collections.abc import Sequence
from pathlib import Path

from envs.errors import UserError
from envs.model.checkpoint import check_revision


def small_files(path_or_id: str | Path, revision: str | None, names: Sequence[str]) -> Path:
    """Folder of a model: a local one as it stands, `embedded`, or, of a hub id, the files named.

    Raises:
        UserError: no such folder or hub model, the hub cannot be reached, or a folder's revision is asked.
    """
    check_revision(path_or_id, revision)
    name = str(path_or_id)
    if name == "embedded":
        from envs.embedded import folder

        return folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(name):
        raise UserError(
            f"no model folder at {name}: give a folder, a hub id such as allenai/MolmoE-1B-0924, or embedded"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(names)))
    except Exception as error:  # HTTP, cache and naming errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot fetch {name}{at} from the hub: {reason}; check the id and the network, or give a local folder"
        ) from None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
