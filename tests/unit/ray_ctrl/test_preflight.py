"""Sizes that do not divide and resources that are not there are refused before Ray starts."""

import pytest

from cluster.resources import resource_plan, shortfall
from envs.errors import UserError
from ray_ctrl.load_config import load_config
from ray_ctrl.preflight import check_machine, plan_layout


@pytest.fixture(autouse=True)
def _two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ctrl.preflight.machine_cpus", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_rollouts_are_divided_evenly_by_default() -> None:
    layout = plan_layout(load_config("smoke", None, ["runners.count=2"]))
    assert (layout.envs, layout.batches) == (8, 1)


def test_given_vectors_make_batches() -> None:
    layout = plan_layout(load_config("smoke", None, ["runners.envs_per_runner=4", "grpo.groups_per_iteration=6"]))
    assert (layout.envs, layout.batches) == (4, 6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["runners.envs_per_runner=6"], "does not divide runners.envs_per_runner = 6"),
        (["runners.envs_per_runner=8", "grpo.groups_per_iteration=5"], "do not fill complete batches"),
        (["runners.count=2", "grpo.groups_per_iteration=5"], "multiple of 2"),
        (["runners.count=4"], "4 CPUs needed, 2 available"),
        (["runners.count=1", "runners.gpus=0.5"], "GPUs needed"),
        (["runners.count=1", "model.device=cuda"], r"runners\.gpus = 0"),
        (["runners.count=1", "runners.gpus=1.5"], "whole number of GPUs"),
        (["runners.count=1", "model.threads=2"], r"more than runners\.cpus"),
        (["grpo.max_policy_lag=1"], r"needs env runners of their own, but runners\.count = 0"),
        (["grpo.max_policy_lag=1", "runners.count=1", "grpo.dual_clip=1.2"], r"dual_clip = 1\.2 is not allowed"),
        (["budgets.low_ms=50", "budgets.high_ms=50"], r"budgets\.low_ms = 50 is not below budgets\.high_ms = 50"),
    ],
)
def test_infeasible_settings_name_what_to_change(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_layout(load_config("smoke", None, overrides))


def test_a_cluster_is_not_checked_against_this_machine() -> None:
    overrides = ["runners.count=4", "runners.gpus=1", "runners.address=10.0.0.1:6379"]
    assert plan_layout(load_config("smoke", None, overrides)).resources.gpus == 4


def test_the_full_size_preset_needs_one_gpu_for_each_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("molmoe-1b")
    assert (config.budgets.low_ms, config.budgets.high_ms) == (None, None)
    assert config.evaluation.lookup_samples is None  # all that the controller trains on
    several = load_config("molmoe-1b", None, ["runners.count=8"])
    one, eight = plan_layout(config, here=False), plan_layout(several, here=False)
    assert (one.resources.gpus, eight.resources.gpus, eight.resources.cpus) == (0, 8, 32)
    assert one.resources.lines()[1].split()[-3:] == ["1", "1", "1"]  # the driver: one process, a CPU and a GPU
    assert plan_layout(load_config("laptop")).resources.lines()[1].split()[-3:] == ["1", "1", "0"]
    assert one.envs == 512
    assert eight.envs == 64
    monkeypatch.setattr("ray_ctrl.preflight.cuda_devices", lambda: 0)
    with pytest.raises(UserError, match="needs a GPU for the driver"):
        check_machine(config, one)
    monkeypatch.setattr("ray_ctrl.preflight.cuda_devices", lambda: 1)
    check_machine(config, one)
    with pytest.raises(UserError, match="8 GPUs needed, 1 available"):
        check_machine(several, eight)


def test_plan_totals_and_text() -> None:
    plan = resource_plan(
        runners=2,
        runner_cpus=3,
        runner_gpus=0.5,
        learners=1,
        learner_cpus=1,
        learner_gpus=0.25,
        evaluation_runners=1,
    )
    assert (plan.cpus, plan.gpus) == (10, 1.75)
    text = "\n".join(plan.lines())
    for role in ("driver", "env runner", "learner", "evaluation runner", "placed by Ray"):
        assert role in text
    assert shortfall(plan, {"CPU": 10, "GPU": 2}, "here") is None
    assert "1.75 GPUs needed, 1 available" in (shortfall(plan, {"CPU": 10, "GPU": 1}, "here") or "")
