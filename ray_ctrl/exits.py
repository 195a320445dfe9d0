"""How a command ends: exit statuses, and a user's mistake as one line on stderr."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from envs.errors import UserError
from envs.files import short_path
from ray_ctrl.console import console
from ray_ctrl.signals import Interrupted

# What a file system refuses for reasons outside the program.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)


def guard(command: Callable[[], Any]) -> int:
    """Runs `command` and turns a user's mistake into one line and exit status 2."""
    try:
        status = command()
    except UserError as error:
        return _report(error.message, error)
    except Interrupted as error:
        print("interrupted", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `| head`: the reader has all it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        status = _exit_status(error)
        if status is None:
            raise
    status = status if isinstance(status, int) else 0
    return status or (1 if console.lost else 0)


def warn(message: Warning | str, category: type[Warning], *source: Any, **more: Any) -> None:
    """A warning as one line, without the source line that Python would add."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _exit_status(error: Exception) -> int | None:
    """Exit status of an exception that is not a bug; None for all others."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of typer
        return _report(error.format_message())
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", 130))
    if isinstance(error, OSError) and error.errno in REFUSALS:
        place = short_path(error.filename or "the disk")
        return _report(f"{place}: {error.strerror}; give another place, or free space", error)
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):  # raised on a Ray worker and wrapped by Ray
        return _report(cause.message, error)
    return None


def _report(message: str, error: Exception | None = None) -> int:
    if error is not None and os.environ.get("RAY_CTRL_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
