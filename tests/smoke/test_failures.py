"""What dies on a real cluster of several nodes (simulated on one machine), and what training makes of it.

Killed processes are killed from outside, by SIGKILL to their process or by taking their node away. The toy environment
has a known answer; runs are compared with one that nobody disturbed, number by number.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpo_toy
import numpy as np
import pytest
import ray
from conftest import fine, finish, stable_metrics, start
from grpo_toy import configuration, numbers, resumable
from ray.cluster_utils import Cluster
from ray.tune import register_env

from envs.errors import UserError
from policies.grpo.env_runner import RolloutRunner

# Before Ray is imported by anything: it would use any token it finds.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CRASH, KILLS = (Path(__file__).with_name(name) for name in ("crash.py", "kills.py"))
STORE_BYTES = 80_000_000
ITERATIONS = 4
LIMIT_S = 900.0  # of one command, on a machine that others use as well


class Nodes:
    """A cluster whose head runs nothing, and workers that can be taken away."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
                "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 5},
            },
        )
        ray.init(address=self.cluster.address, log_to_driver=False, configure_logging=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[grpo_toy.ToyVectorEnv.__module__])
        register_env(grpo_toy.ENVIRONMENT, grpo_toy.ToyVectorEnv)

    def add(self, cpus: float = 1, gpus: int = 0) -> Any:
        """One more node; a crowded machine may need a second attempt."""
        settings = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": STORE_BYTES}
        try:
            return self.cluster.add_node(**settings)
        except Exception:
            return self.cluster.add_node(**settings)

    def remove(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.close()


@pytest.fixture(scope="module")
def undisturbed() -> list[dict[str, float]]:
    """Numbers of a run with everything in one process, computed without Ray's help."""
    register_env(grpo_toy.ENVIRONMENT, grpo_toy.ToyVectorEnv)
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=STORE_BYTES, log_to_driver=False)
    algorithm = resumable(0).build_algo()
    rows = [numbers(algorithm.train()) for _ in range(ITERATIONS)]
    algorithm.stop()
    ray.shutdown()
    return rows


def build(runners: int = 2, **changes: Any) -> Any:
    config = resumable(runners)
    for method, settings in changes.items():
        getattr(config, method)(**settings)
    return config.build_algo()


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.apply.remote(lambda _: os.getpid()), timeout=60))


def runners_of(algorithm: Any) -> dict[int, Any]:
    return dict(algorithm.env_runner_group._worker_manager.actors())


def full_strength(algorithm: Any, count: int, timeout_s: float = 60.0) -> float:
    """Seconds until `count` runners answer."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        algorithm.restore_env_runners(algorithm.env_runner_group)
        if algorithm.env_runner_group.num_healthy_remote_env_runners() == count:
            return time.monotonic() - started
        time.sleep(0.2)
    pytest.fail(f"only {algorithm.env_runner_group.num_healthy_remote_env_runners()} of {count} runners after 60 s")


def checked(algorithm: Any, undisturbed: list[dict[str, float]], first: int = 0) -> None:
    """The rest of the run: every iteration once, complete groups only, numbers as if nothing had happened."""
    for index in range(first, ITERATIONS):
        row = algorithm.train()["grpo"]
        assert row["updates"] == index
        assert row["rollouts"] == 32
        assert row["groups"] == 8
        assert {k: v for k, v in row.items() if k in undisturbed[index]} == pytest.approx(undisturbed[index], abs=1e-6)


def test_runners_killed_in_sampling_and_between_are_back_within_30_s(
    nodes: Nodes, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    nodes.add()
    nodes.add()
    # The process of one runner ends itself in the middle of its second sample; SIGKILL takes another one later.
    broken = {"break": "die", "break_round": 1, "once": str(tmp_path / "died")}
    algorithm = build(environment={"env_config": {"group_size": 4, "seed": 1, **broken}})
    checked_rows = [algorithm.train()["grpo"] for _ in range(2)]
    assert (tmp_path / "died").exists()
    assert checked_rows[1]["shards_rerun"] == 1.0
    seconds = full_strength(algorithm, 2)
    os.kill(pid_of(runners_of(algorithm)[2]), signal.SIGKILL)
    time.sleep(0.5)
    checked(algorithm, undisturbed, first=2)
    seconds = max(seconds, full_strength(algorithm, 2))
    print(f"full strength after {seconds:.1f} s")
    assert seconds < 30
    algorithm.stop()


def test_a_lost_node_costs_its_work_and_nothing_else(nodes: Nodes, undisturbed: list[dict[str, float]]) -> None:
    lost = nodes.add()
    nodes.add(cpus=2)
    algorithm = build()
    assert algorithm.train()["grpo"]["updates"] == 0
    nodes.remove(lost)
    checked(algorithm, undisturbed, first=1)
    full_strength(algorithm, 2)
    algorithm.stop()


def test_a_node_lost_while_it_samples(nodes: Nodes, undisturbed: list[dict[str, float]], tmp_path: Path) -> None:
    lost = nodes.add()
    nodes.add(cpus=2)
    # In iteration 1 one runner hangs; at that moment a node is lost, with that runner or with the other one.
    hung = tmp_path / "hung"
    broken = {"break": "stall", "break_round": 1, "once": str(hung)}
    algorithm = build(
        environment={"env_config": {"group_size": 4, "seed": 1, **broken}}, env_runners={"sample_timeout_s": 20}
    )
    algorithm.train()

    def take_away() -> None:
        deadline = time.monotonic() + 60
        while not hung.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        nodes.remove(lost)

    thread = threading.Thread(target=take_away)
    thread.start()
    checked(algorithm, undisturbed, first=1)
    thread.join(60)
    assert hung.exists()
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    algorithm.stop()


def test_all_nodes_with_runners_lost_is_an_error_in_time_and_a_new_node_mends_it(
    nodes: Nodes, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    from policies.grpo.checkpoint import restore_checkpoint

    lost = nodes.add(cpus=2)
    algorithm = build(training={"restart_timeout_s": 10})
    algorithm.train()
    saved = Path(algorithm.save_to_path(tmp_path / "saved"))
    nodes.remove(lost)
    started = time.monotonic()
    with pytest.raises(UserError, match="all env runners are dead") as caught:
        algorithm.train()
    assert time.monotonic() - started < 90
    assert "\n" not in caught.value.message
    algorithm.stop()
    nodes.add(cpus=2)
    again = build()
    restore_checkpoint(again, saved)
    checked(again, undisturbed, first=1)
    again.stop()


def test_a_killed_learner_is_named_and_the_run_goes_on_from_its_checkpoint(
    nodes: Nodes, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    from policies.grpo.checkpoint import restore_checkpoint

    nodes.add(cpus=2)
    algorithm = build(1, learners={"num_learners": 1})
    algorithm.train()
    saved = Path(algorithm.save_to_path(tmp_path / "saved"))
    learner = next(iter(algorithm.learner_group._worker_manager.actors().values()))
    os.kill(pid_of(learner), signal.SIGKILL)
    with pytest.raises(UserError, match=r"a learner died in iteration 1: .*resume from the last checkpoint") as caught:
        algorithm.train()
    assert "\n" not in caught.value.message
    algorithm.stop()
    again = build(1, learners={"num_learners": 1})
    restore_checkpoint(again, saved)
    checked(again, undisturbed, first=1)
    again.stop()


def test_a_learner_that_hangs_is_killed_in_time(nodes: Nodes) -> None:
    nodes.add(cpus=2)
    algorithm = build(1, learners={"num_learners": 1}, training={"learner_timeout_s": 5})
    algorithm.train()
    learner = next(iter(algorithm.learner_group._worker_manager.actors().values()))
    os.kill(pid_of(learner), signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(UserError, match="a learner gave no answer within 5 s and was killed"):
        algorithm.train()
    assert time.monotonic() - started < 60
    algorithm.stop()


def test_runners_with_stale_weights_are_brought_up_to_date(
    nodes: Nodes, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    from policies.grpo.checkpoint import fingerprint, restore_checkpoint

    nodes.add()
    nodes.add()
    algorithm = build()
    algorithm.train()
    saved = Path(algorithm.save_to_path(tmp_path / "saved"))
    algorithm.train()
    restore_checkpoint(algorithm, saved)
    wanted = fingerprint(ray.get(algorithm.weights()))

    def held(runner: Any) -> str:
        return fingerprint(runner.module.get_state())

    assert set(algorithm.env_runner_group.foreach_env_runner(held, local_env_runner=False)) == {wanted}

    def spoil(runner: Any) -> None:
        runner.module.set_state({name: np.zeros_like(value) for name, value in runner.module.get_state().items()})

    algorithm.env_runner_group.foreach_env_runner(spoil, local_env_runner=False)
    checked(algorithm, undisturbed, first=1)
    algorithm.stop()


class PretendingRunner(RolloutRunner):
    """Has a simulated GPU, and computes on the CPU."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        import torch
        from ray.rllib.env import single_agent_env_runner

        single_agent_env_runner.get_device = lambda *_: torch.device("cpu")
        super().__init__(config=config, **kwargs)


def test_eight_runners_on_four_nodes_hold_eight_gpus(nodes: Nodes) -> None:
    for _ in range(4):
        nodes.add(cpus=1, gpus=2)
    config = configuration(8, groups_per_iteration=32)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config.env_runners(env_runner_cls=PretendingRunner, num_cpus_per_env_runner=0.25, num_gpus_per_env_runner=1)
    algorithm = config.build_algo()

    def place(_: Any) -> tuple[str, str]:
        context = ray.get_runtime_context()
        return context.get_node_id(), ",".join(context.get_accelerator_ids()["GPU"])

    places = algorithm.env_runner_group.foreach_env_runner(place, local_env_runner=False)
    assert len(places) == len(set(places)) == 8
    assert {gpu for _, gpu in places} == {"0", "1"}
    assert len({node for node, _ in places}) == 4
    row = algorithm.train()["grpo"]
    assert row["rollouts"] == 128
    algorithm.stop()


# -- whole commands ---------------------------------------------------------------------------------------

TRAIN = ("train", "-p", "smoke")
RESULTS = ("controller/controller.safetensors", "evaluation/rollouts.csv")


def same(run: Path, undisturbed_run: Path) -> None:
    assert stable_metrics(run) == stable_metrics(undisturbed_run)
    for name in RESULTS:
        assert (run / name).read_bytes() == (undisturbed_run / name).read_bytes(), name


def test_drivers_killed_at_random_moments_end_as_if_undisturbed(tmp_path: Path) -> None:
    done = finish(start([os.environ.get("RAY_CTRL_KILLS", "20"), tmp_path], program=(KILLS,)), 3600)
    print(done.out)
    assert done.status == 0, done.out + done.err


def test_drivers_killed_within_a_step_go_on_with_new_processes(nodes: Nodes, tmp_path: Path) -> None:
    """Runners and a learner on other nodes; what they held dies with the driver, and a checkpoint half written."""
    for _ in range(2):
        nodes.add(cpus=2)
    settings = ("runners.count=2", "runners.learners=1", "grpo.max_policy_lag=1")
    settings = (*settings, f"runners.address={nodes.cluster.address}")
    alone = tmp_path / "alone"
    done = finish(start([*TRAIN, *settings, "--run-dir", alone]), LIMIT_S)
    assert done.status == 0, done.out + done.err
    for place, call in (("collecting", 4), ("update", 3), ("checkpoint", 2)):
        run = tmp_path / place
        died = finish(start([place, str(call), *TRAIN, *settings, "--run-dir", run], program=(CRASH,)), LIMIT_S)
        assert died.status == -signal.SIGKILL, died.err
        done = finish(start(["train", "--resume", "--run-dir", run]), LIMIT_S)
        assert done.status == 0, done.out + done.err
        assert "resumed after iteration 2" in done.out
        same(run, alone)


def test_a_driver_and_its_node_killed_in_a_store_write(trained: Path, tmp_path: Path) -> None:
    """Half of the store's third transaction is written when SIGKILL comes; nothing of it may count."""
    script = tmp_path / "crash_in_store.py"
    script.write_text(
        "import os, signal, sys\n"
        "from envs.engine.store import OutcomeStore\n"
        "from ray_ctrl.cli import main\n"
        "insert, calls = OutcomeStore._insert, []\n"
        "def deadly(self, table, columns, setting, rows):\n"
        "    calls.append(table)\n"
        "    if len(calls) == 3:\n"
        "        db = self._open()\n"
        "        db.execute('BEGIN IMMEDIATE')\n"
        "        db.execute('DELETE FROM outcomes')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return insert(self, table, columns, setting, rows)\n"
        "OutcomeStore._insert = deadly\n"
        "sys.exit(main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    run, store = tmp_path / "run", tmp_path / "outcomes.sqlite"
    died = finish(start([*TRAIN, f"store.path={store}", "--run-dir", run], program=(script,)), LIMIT_S)
    assert died.status == -signal.SIGKILL, died.err
    fine("train", "--resume", "--run-dir", run)
    same(run, trained)


def test_a_full_disk_at_a_checkpoint_keeps_the_ones_before(trained: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    sized = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(sized, capture_output=True, check=False).returncode:
        pytest.skip("a file system of a chosen size needs the right to mount")
    try:
        run = disk / "run"
        process = start([*TRAIN, "--run-dir", run])
        filler = disk / "filler"
        deadline = time.monotonic() + LIMIT_S
        while not (run / "checkpoints" / "iteration_000002").is_dir():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # All but a few pages for metrics: the next checkpoint does not fit.
        free = shutil.disk_usage(disk).free
        filler.write_bytes(b"x" * max(0, free - 64 * 1024))
        done = finish(process, LIMIT_S)
        assert done.status == 2, done.out + done.err
        assert "cannot write checkpoint" in done.err
        assert "No space left on device" in done.err
        assert "continue with --resume" in done.err
        assert "Traceback" not in done.err
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["iteration_000002"]
        filler.unlink()
        fine("train", "--resume", "--run-dir", run)
        same(run, trained)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_run_goes_on_by_itself_when_its_learner_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add(cpus=2)
    run = tmp_path / "run"
    settings = ("runners.learners=1", f"runners.address={nodes.cluster.address}", "run.iterations=6")
    process = start([*TRAIN, *settings, "--run-dir", run])
    deadline = time.monotonic() + LIMIT_S
    while not (run / "checkpoints" / "iteration_000002").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Without a dashboard, Ray's list of actors is all there is.
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()
    learners = [actor["Pid"] for actor in actors if "Executable" in actor["ActorClassName"]]
    assert len(learners) == 1, actors
    os.kill(learners[0], signal.SIGKILL)
    done = finish(process, LIMIT_S)
    assert done.status == 0, done.out + done.err
    assert "a learner died" in done.out
    assert [row["iteration"] for row in stable_metrics(run)] == [1, 2, 3, 4, 5, 6]
