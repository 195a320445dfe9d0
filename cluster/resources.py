"""The resource plan: CPUs and GPUs of every process. Pure arithmetic, no Ray.

One driver runs the loop. Env runners run the model; without any the driver samples itself. Learners update the
controller; without any the driver learns itself. Evaluation runners work between training iterations.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.errors import UserError


@dataclass(frozen=True)
class Role:
    """`count` processes of one kind, each with `cpus` CPUs and `gpus` (possibly fractional) GPUs.

    Attributes:
        placed: whether Ray places them and counts what they use; the driver it does not.
    """

    name: str
    count: int
    cpus: float
    gpus: float
    placed: bool = True


@dataclass(frozen=True)
class ResourcePlan:
    """All roles of a run; Ray must be able to place the totals at the same time."""

    roles: tuple[Role, ...]

    @property
    def cpus(self) -> float:
        return sum(role.count * role.cpus for role in self.roles if role.placed)

    @property
    def gpus(self) -> float:
        return sum(role.count * role.gpus for role in self.roles if role.placed)

    def lines(self) -> list[str]:
        """The plan as text, one role a line, then the totals."""
        rows = [("process", "count", "CPUs each", "GPUs each")]
        rows += [(r.name, str(r.count), f"{r.cpus:g}", f"{r.gpus:g}") for r in self.roles]
        rows.append(("placed by Ray", "", f"{self.cpus:g}", f"{self.gpus:g}"))
        width = max(len(row[0]) for row in rows)
        return [f"{a:<{width}}{b:>7}{c:>12}{d:>12}" for a, b, c, d in rows]


def resource_plan(
    *,
    runners: int,
    runner_cpus: float,
    runner_gpus: float,
    learners: int,
    learner_cpus: float,
    learner_gpus: float,
    evaluation_runners: int,
    driver_gpus: int = 0,
) -> ResourcePlan:
    """Roles of one run. With no runners (learners) the driver samples (learns) in its own process, outside Ray's count.

    Args:
        driver_gpus: 1 if the model is on a GPU: the driver runs it, too.

    Raises:
        UserError: several learners on one GPU, which their collective communication does not support.
    """
    if learners > 1 and 0 < learner_gpus < 1:
        raise UserError(
            f"runners.learner_gpus = {learner_gpus:g} with runners.learners = {learners} is not allowed: learners that "
            "share a GPU cannot exchange gradients over NCCL; give each one GPU, none (0), or use one learner"
        )
    driver_does = [name for name, n in (("samples", runners), ("learns", learners)) if n == 0]
    name = "driver" + (f" ({' and '.join(driver_does)})" if driver_does else "")
    roles = [Role(name, 1, 1.0, driver_gpus, placed=False)]
    if runners:
        roles.append(Role("env runner", runners, runner_cpus, runner_gpus))
    if learners:
        roles.append(Role("learner", learners, learner_cpus, learner_gpus))
    if evaluation_runners:
        roles.append(Role("evaluation runner", evaluation_runners, runner_cpus, runner_gpus))
    return ResourcePlan(tuple(roles))


def shortfall(plan: ResourcePlan, available: dict[str, float], what: str) -> str | None:
    """One line that compares requested and available resources, or None if the plan fits.

    Args:
        available: totals by Ray's names ("CPU", "GPU").
        what: what `available` describes, such as "this machine".
    """
    wanted = {"CPU": plan.cpus, "GPU": plan.gpus}
    short = [name for name, amount in wanted.items() if amount > available.get(name, 0.0) + 1e-6]
    if not short:
        return None
    parts = ", ".join(f"{wanted[n]:g} {n}s needed, {available.get(n, 0.0):g} available" for n in short)
    return f"{what} is too small for this run: {parts}. Lower runners.count, runners.learners or the resources of each"


def assigned_device(assigned: Sequence[str], visible: str | None) -> str:
    """The torch device of a process that Ray runs: its first GPU, or "cpu" if Ray gave it none.

    Not the GPUs that torch sees: Ray does not set CUDA_VISIBLE_DEVICES for a process without GPUs, which then
    sees all of the node's, nor for any process if the user forbids it.

    Args:
        assigned: ids of the GPUs that Ray gave the process, indices or names.
        visible: the process's CUDA_VISIBLE_DEVICES; None if it is not set and torch counts all GPUs of the node.
    """
    if not assigned:
        return "cpu"
    if visible is None:
        return f"cuda:{assigned[0]}" if assigned[0].isdigit() else "cuda"
    names = [name.strip() for name in visible.split(",")]
    # Inside the process torch counts the visible ones from 0.
    return f"cuda:{names.index(assigned[0])}" if assigned[0] in names else "cuda:0"


def machine_cpus() -> int:
    """CPUs this process may use: its affinity if the system reports it, else all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def check_outlives_job(folder: Path) -> None:
    """Refuses a folder in the unpacked working directory of a Ray job, which Ray removes when the job ends.

    Raises:
        UserError: saying how to name another.
    """
    if "working_dir_files" in folder.absolute().parts:
        raise UserError(
            f"{folder} would be removed with the job's working directory when the job ends: set run.folder (or "
            "--run-dir) to an absolute path that all nodes and you can reach, such as run.folder=/shared/runs"
        )
