"""The torch device and number format behind their names."""

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


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The number format of that name; None is bfloat16 on a GPU and float32 elsewhere."""
    name = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    found: torch.dtype = getattr(torch, name)
    return found
