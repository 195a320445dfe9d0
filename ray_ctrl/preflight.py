"""What is checked before Ray starts: settings that must fit together, CPUs and GPUs, names and files."""

from dataclasses import dataclass
from pathlib import Path

from cluster.connect import is_local
from cluster.resources import ResourcePlan, machine_cpus, resource_plan, shortfall
from envs.errors import UserError
from ray_ctrl.config import Config


@dataclass(frozen=True)
class Layout:
    """How one iteration's rollouts are divided among runners.

    Attributes:
        envs: environments of each runner's vector, a multiple of the group size.
        batches: batches that each runner's vector runs per iteration.
        resources: the processes with their CPUs and GPUs.
    """

    envs: int
    batches: int
    resources: ResourcePlan


def plan_layout(config: Config, *, here: bool = True) -> Layout:
    """The layout of a run.

    Args:
        here: whether a run on this machine must fit it; a dry run shows the plan first (`check_machine`).

    Raises:
        UserError: sizes that do not divide, budgets that exclude each other, or resources that this machine lacks.
    """
    envs, batches = _divide(config)
    _check_devices(config)
    _check_staleness(config)
    _check_budgets(config)
    runners = config.runners
    resources = resource_plan(
        runners=runners.count,
        runner_cpus=runners.cpus,
        runner_gpus=runners.gpus,
        learners=runners.learners,
        learner_cpus=runners.learner_cpus,
        learner_gpus=runners.learner_gpus,
        evaluation_runners=runners.eval_runners,
        driver_gpus=int(config.model.device.startswith("cuda")),
    )
    layout = Layout(envs, batches, resources)
    if here:
        check_machine(config, layout)
    return layout


def check_machine(config: Config, layout: Layout) -> None:
    """Refuses a run that starts its own Ray on a machine too small for it.

    Raises:
        UserError: naming what is missing.
    """
    if is_local(config.runners.address):
        if config.model.device.startswith("cuda") and not cuda_devices():
            raise UserError(
                f"model.device = {config.model.device!r} needs a GPU for the driver, which runs the model as well, and "
                "this machine has none: set model.device=cpu, or run where there is one"
            )
        missing = shortfall(layout.resources, machine_resources(layout.resources.gpus), "this machine")
        if missing:
            raise UserError(missing)


def check_inputs(config: Config) -> None:
    """Refuses names and files that do not exist, before anything takes time; reads none of them.

    Raises:
        UserError: naming the first.
    """
    from envs.data import check_task
    from envs.latency.roofline import check_device
    from envs.model.checkpoint import check_name

    latency = config.latency
    check_name(config.model.name)
    check_task(config.task.name)
    if latency.source == "roofline":
        check_device(latency.device)
    elif latency.source == "profiled" and latency.profile is not None and not Path(latency.profile).is_file():
        raise UserError(
            f"no profile at latency.profile = {latency.profile}: measure one with `ray-ctrl profile --out FILE`, "
            "or set latency.profile=null to have this device measured"
        )


def _divide(config: Config) -> tuple[int, int]:
    """Environments per runner, and batches per iteration."""
    size, groups = config.grpo.group_size, config.grpo.groups_per_iteration
    runners = max(1, config.runners.count)
    envs = config.runners.envs_per_runner
    if envs is None:
        if groups % runners:
            raise UserError(
                f"grpo.groups_per_iteration = {groups} does not divide evenly among {runners} runners: choose a "
                f"multiple of {runners}"
            )
        return size * groups // runners, 1
    if envs % size:
        raise UserError(
            f"grpo.group_size = {size} does not divide runners.envs_per_runner = {envs}: a group stays in one "
            f"vector, so choose a multiple of {size}"
        )
    per_batch = envs * runners
    if size * groups % per_batch:
        raise UserError(
            f"{groups} groups of {size} rollouts do not fill complete batches of {runners} runners with "
            f"{envs} environments: choose grpo.groups_per_iteration a multiple of {per_batch // size}"
        )
    return envs, size * groups // per_batch


def _check_devices(config: Config) -> None:
    runners, model = config.runners, config.model
    for key, gpus in (("runners.gpus", runners.gpus), ("runners.learner_gpus", runners.learner_gpus)):
        if gpus > 1 and gpus != int(gpus):
            raise UserError(f"{key} = {gpus:g} is not allowed: a whole number of GPUs above one, or a fraction")
    if runners.count and model.device.startswith("cuda") and runners.gpus == 0:
        raise UserError(
            f"model.device = {model.device!r} needs a GPU in each runner, but runners.gpus = 0: "
            "set runners.gpus=1, or model.device=cpu"
        )
    if runners.count and model.threads > max(1, runners.cpus) and runners.gpus == 0:
        raise UserError(
            f"model.threads = {model.threads} is more than runners.cpus = {runners.cpus:g}: runners would slow one "
            f"another down; set runners.cpus={model.threads}"
        )


def _check_staleness(config: Config) -> None:
    grpo = config.grpo
    if grpo.max_policy_lag and not config.runners.count:
        raise UserError(
            f"grpo.max_policy_lag = {grpo.max_policy_lag} needs env runners of their own, but runners.count = 0: set "
            "runners.count to 1 or more, or grpo.max_policy_lag=0"
        )
    if grpo.max_policy_lag and grpo.dual_clip <= 1 + grpo.clip_high:
        raise UserError(
            f"grpo.dual_clip = {grpo.dual_clip:g} is not allowed: above 1 + grpo.clip_high = {1 + grpo.clip_high:g}"
        )


def _check_budgets(config: Config) -> None:
    low, high = config.budgets.low_ms, config.budgets.high_ms
    if low is not None and high is not None and low >= high:
        raise UserError(
            f"budgets.low_ms = {low:g} is not below budgets.high_ms = {high:g}: give the smaller end first, or null "
            "for the device's own range"
        )


def machine_resources(gpus: float) -> dict[str, float]:
    """CPUs and GPUs of this machine, by Ray's names; GPUs are counted only if `gpus` are wanted: that loads torch."""
    return {"CPU": float(machine_cpus()), "GPU": float(cuda_devices()) if gpus else 0.0}


def cuda_devices() -> int:
    """GPUs that torch finds."""
    import torch

    return torch.cuda.device_count()
