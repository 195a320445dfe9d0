"""The torch device and number format behind their names, and memory."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from envs.errors import UserError, first_line


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device behind a name; `auto` is the GPU if this process was given one, else the CPU.

    Raises:
        UserError: a device that this process does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device {str(device)!r} cannot be used ({reason}): choose `auto` or `cpu`") from None
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format of that name; None is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        UserError: not a floating-point format of torch.
    """
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or default
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not allowed: give float32, bfloat16 or float16")
    return found


def main_memory() -> tuple[int, int]:
    """Total and free bytes of main memory, bounded by a container's limit; free is the total where it is unknown."""
    total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        free = int(Path("/proc/meminfo").read_text("ascii").split("MemAvailable:")[1].split()[0]) * 1024
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
        total, free = min(total, limit), min(free, limit - used)
    return total, max(0, free)
