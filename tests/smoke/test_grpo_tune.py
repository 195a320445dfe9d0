"""GRPO as a Tune trainable: grid search, ASHA, Tune's own population based training, and `Tuner.restore`."""

from pathlib import Path
from typing import Any

import grpo_toy
import pytest
from grpo_toy import configuration
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from policies.grpo.algorithm import GRPO, GRPOConfig

RETURN = "env_runners/episode_return_mean"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> None:
    grpo_toy.share_ray()


def tuner(
    config: GRPOConfig,
    folder: Path,
    scheduler: Any = None,
    iterations: int = 4,
    every: int = 0,
    concurrent: int = 2,
    metric: str = RETURN,
) -> tune.Tuner:
    return tune.Tuner(
        GRPO,
        param_space=config,
        tune_config=tune.TuneConfig(metric=metric, mode="max", scheduler=scheduler, max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(folder),
            stop={"training_iteration": iterations},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=every, checkpoint_at_end=True),
            verbose=0,
        ),
    )


def returned(result: Any) -> float:
    return float(result.metrics["env_runners"]["episode_return_mean"])


def test_grid_search_trains_each_value_and_restore_continues_what_failed(tmp_path: Path) -> None:
    # The first of the trials to begin its second iteration fails, once.
    broken = {"break": "user_error", "break_round": 1, "once": str(tmp_path / "failed")}
    config = configuration(lr=tune.grid_search([1e-3, 1e-5]), num_epochs=tune.choice([3]), broken=broken)
    results = tuner(config, tmp_path, iterations=2, every=1).fit()
    assert len(results.errors) == 1
    finished = [returned(result) for result in results if not result.error]
    restored = tune.Tuner.restore(str(tmp_path / "trials"), GRPO, param_space=config, resume_errored=True)
    results = restored.fit()
    assert not results.errors
    assert [result.metrics["grpo"]["updates"] for result in results] == [1.0, 1.0]
    assert finished[0] in map(returned, results)
    assert sorted(result.config["lr"] for result in results) == [1e-5, 1e-3]
    found = {result.config["lr"]: result.metrics["learners"]["default_policy"] for result in results}
    assert {lr: row["default_optimizer_learning_rate"] for lr, row in found.items()} == {1e-3: 1e-3, 1e-5: 1e-5}
    assert found[1e-3]["kl_old"] > found[1e-5]["kl_old"]
    best = results.get_best_result(metric=RETURN, mode="max")
    algorithm = GRPO.from_checkpoint(best.checkpoint.path)
    assert algorithm.updates == 2
    assert algorithm.config.lr == best.config["lr"]
    algorithm.stop()


def test_asha_stops_trials_early(tmp_path: Path) -> None:
    # One after the other, by how far the policy moves, the first most: the others are stopped next to it.
    config = configuration(lr=tune.grid_search([3e-3, 1e-6, 1e-7]))
    asha = ASHAScheduler(max_t=4, grace_period=2, reduction_factor=2)
    results = tuner(config, tmp_path, asha, concurrent=1, metric="grpo/kl_old").fit()
    assert not results.errors
    lengths = {result.config["lr"]: result.metrics["training_iteration"] for result in results}
    assert lengths == {3e-3: 4, 1e-6: 2, 1e-7: 2}


def test_population_based_training_copies_trials_and_changes_their_learning_rate(tmp_path: Path) -> None:
    config = configuration(lr=tune.grid_search([2e-3, 1e-6]))
    pbt = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        hyperparam_mutations={"lr": tune.loguniform(1e-4, 1e-2)},
        quantile_fraction=0.5,
        resample_probability=0.0,
        require_attrs=False,
        synch=True,
    )
    results = tuner(config, tmp_path, pbt, iterations=6, every=2).fit()
    assert not results.errors
    assert all(result.metrics["training_iteration"] == 6 for result in results)
    rates = [result.config["lr"] for result in results]
    # One trial took the other's weights and a mutated learning rate, which its learner uses.
    assert set(rates) != {2e-3, 1e-6}
    for result in results:
        used = result.metrics["learners"]["default_policy"]["default_optimizer_learning_rate"]
        assert used == pytest.approx(result.config["lr"])
        assert result.metrics["grpo"]["updates"] == 5.0
    assert list((tmp_path / "trials").glob("pbt_policy_*.txt"))
