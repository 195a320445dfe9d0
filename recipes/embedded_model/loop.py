"""One resumable training phase: steps over a data set whose batches are pure functions of the step."""

import ctypes
import json
import math
import pickle
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Subset

from envs.errors import UserError
from envs.files import atomic_file

Metrics = dict[str, float]
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # names and values of malloc.h


@dataclass(frozen=True)
class Phase:
    """What one phase trains, on what, for how long.

    Args:
        name: names the checkpoint and the lines of the log.
        modules: all weights trained and saved.
        data: a batch for every step.
        loss: loss and figures to log of a batch.
        steps: optimiser steps.
        lr: peak learning rate; it rises over the first 3 % of the steps and falls to 3 % along a cosine.
        validate: figures on held-out data, logged at intervals.
        tower_lr: factor on the learning rate of the vision tower.
        rate: factor on the learning rate for a batch.
    """

    name: str
    modules: nn.ModuleDict
    data: Dataset[Any]
    loss: Callable[[Any], tuple[Tensor, Metrics]]
    steps: int
    lr: float
    validate: Callable[[], Metrics] | None = None
    tower_lr: float = 1.0
    rate: Callable[[Any], float] = lambda batch: 1.0


@dataclass(frozen=True)
class LoopSettings:
    """How phases run. `deadline` is on `time.monotonic`'s scale."""

    folder: Path
    device: torch.device
    deadline: float = math.inf
    checkpoint_seconds: float = 150.0
    log_every: int = 25
    validate_every: int = 250
    weight_decay: float = 0.01
    clip: float = 1.0
    workers: int = 1


@contextmanager
def fast_math(device: torch.device) -> Iterator[None]:
    """bfloat16 products and plain attention: for layers this narrow two to four times as fast.

    Not on a CPU without instructions for bfloat16, where products are over ten times as slow: it stays with float32.
    """
    if device.type == "cpu" and not _multiplies_bfloat16():
        yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name it applies to CPUs, too
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it: large tensors come and go at every step, and fetching
    their pages anew can cost more than the arithmetic on them. Elsewhere a no-op."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
        libc.mallopt(option, value)


def run_phase(phase: Phase, settings: LoopSettings) -> bool:
    """Trains the phase from its checkpoint, if there is one; True when it is complete, False when time ran out."""
    optimizer = torch.optim.AdamW(
        _groups(phase.modules, settings.weight_decay, phase.tower_lr), lr=phase.lr, betas=(0.9, 0.98), fused=True
    )
    path = settings.folder / f"{phase.name}.pt"
    step = _load(path, phase, optimizer)
    if step >= phase.steps:
        return True
    loader = DataLoader(
        Subset(phase.data, range(step, phase.steps)), batch_size=None, num_workers=settings.workers,
        prefetch_factor=6 if settings.workers else None,
    )  # fmt: skip
    saved, logged, recent = time.monotonic(), time.monotonic(), _Mean()
    phase.modules.train()
    with _progress() as progress:
        bar = progress.add_task(phase.name, total=phase.steps, completed=step)
        for batch in loader:
            _set_lr(optimizer, phase.lr * schedule(step / phase.steps) * phase.rate(batch))
            with fast_math(settings.device):
                loss, metrics = phase.loss(to_device(batch, settings.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(phase.modules.parameters(), settings.clip)
            if torch.isfinite(norm):
                optimizer.step()
            recent.add({"loss": float(loss.detach()), **metrics})
            step += 1
            if step % settings.log_every == 0 or step == phase.steps:
                line = {"phase": phase.name, "step": step, "seconds": time.monotonic() - logged, **recent.take()}
                logged = time.monotonic()
                if phase.validate and (step % settings.validate_every == 0 or step == phase.steps):
                    phase.modules.eval()
                    with torch.no_grad(), fast_math(settings.device):
                        line |= {f"validation_{key}": value for key, value in phase.validate().items()}
                    phase.modules.train()
                log(settings.folder, line)
                progress.update(bar, completed=step, description=f"{phase.name} loss {line['loss']:.3f}")
            out_of_time = time.monotonic() > settings.deadline
            if out_of_time or step == phase.steps or time.monotonic() - saved > settings.checkpoint_seconds:
                _save(path, phase, optimizer, step)
                saved = time.monotonic()
            if out_of_time:
                break
    return step >= phase.steps


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch (a dataclass of tensors and dicts of tensors) on `device`."""
    if device.type == "cpu":
        return batch

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return {key: move(item) for key, item in value.items()} if isinstance(value, dict) else value

    return replace(batch, **{field.name: move(getattr(batch, field.name)) for field in fields(batch)})


def schedule(done: float) -> float:
    """Share of the peak learning rate after the fraction `done` of the phase."""
    return min(done / 0.03 + 0.01, 1.0) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))


def log(folder: Path, line: dict[str, Any]) -> None:
    """Appends one line to the training log."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded) + "\n")


def _groups(modules: nn.Module, weight_decay: float, tower_lr: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not; the vision tower may learn at its own rate."""
    groups = []
    for tower in (True, False):
        named = [(n, p) for n, p in modules.named_parameters() if ("vision." in n) == tower]
        for decay in (True, False):
            chosen = [p for _, p in named if (p.ndim > 1) == decay]
            rate = tower_lr if tower else 1.0
            groups.append({"params": chosen, "weight_decay": weight_decay * decay, "rate": rate})
    return groups


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def _load(path: Path, phase: Phase, optimizer: torch.optim.Optimizer) -> int:
    """Steps already done; weights and optimiser are set to what they were then."""
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        phase.modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot resume from {path}: {reason}; remove it to train this phase anew") from None


def _save(path: Path, phase: Phase, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"modules": phase.modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


class _Mean:
    """Means of metrics since they were last taken."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: Metrics) -> None:
        for key, value in metrics.items():
            if math.isfinite(value):
                total, count = self.sums.get(key, (0.0, 0))
                self.sums[key] = (total + value, count + 1)

    def take(self) -> Metrics:
        means = {key: total / count for key, (total, count) in self.sums.items()}
        self.sums = {}
        return means
