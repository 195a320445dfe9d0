"""Where a run came from: versions, commit, hardware, command. For run folders and tables."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from envs.latency.latency_profile import device_name

PACKAGES = ("ray-ctrl", "torch", "ray", "transformers", "gymnasium", "numpy", "pydantic")


def provenance() -> dict[str, Any]:
    """Versions, commit, hardware and command of this process, ready for JSON."""
    return {
        "command": command(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "hardware": hardware(),
    }


def command() -> str:
    """The command line, with the program by its name alone."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; absent ones are left out."""
    return {name: found for name in PACKAGES if (found := installed_version(name)) is not None}


def installed_version(name: str) -> str | None:
    """The installed version of a package; None if it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout this package runs from, `-dirty` if files differ; None outside one."""
    folder = folder or Path(__file__).resolve().parents[1]
    commit = _git(folder, "rev-parse", "HEAD") if (folder / ".git").exists() else None
    return f"{commit}{'-dirty' if _git(folder, 'status', '--porcelain', '-uno') else ''}" if commit else None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """One line: processor, cores, and GPUs if torch is loaded and sees some."""
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else ()
    return ", ".join([device_name("cpu"), *(device_name(f"cuda:{i}") for i in gpus)])
