"""Sweep files: what is read, what is refused, and what Ray Tune is given."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import UserError
from ray_ctrl.tune import print_plan
from ray_ctrl.tune.summary import _chosen
from ray_ctrl.tune.sweep import Sweep, dump, find_sweep, load_sweep, make_sweep

SWEEPS = Path(__file__).resolve().parents[4] / "ray_ctrl" / "presets" / "sweeps"
LR: dict[str, Any] = {"grpo.lr": {"log_uniform": ["1e-4", 1e-2]}}
SPACE = LR | {"controller.hidden": {"choice": [16, 32]}}


def sweep(**keys: Any) -> Sweep:
    return make_sweep({"preset": "smoke", "trials": 3, "space": SPACE} | keys, Path())


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_fine(path: Path) -> None:
    found = load_sweep(path)
    assert found.trials >= 2
    again = make_sweep(yaml.safe_load(dump(found)), Path())
    assert (again.base, again.space, again.trials) == (found.base, found.space, found.trials)


def test_sweeps_are_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_sweep("learning") == SWEEPS / "learning.yaml"
    (tmp_path / "mine.yaml").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_sweep("mine.yaml") == Path("mine.yaml")
    with pytest.raises(UserError, match=r"no sweep 'learnin'.*ablations, bayesian, grid, halving, learning, smoke"):
        find_sweep("learnin")


def test_fixed_settings_and_overrides_reach_every_trial() -> None:
    found = make_sweep(
        {"preset": "smoke", "trials": 1, "space": SPACE, "set": {"grpo.epochs": 3, "run.seed": 4}},
        Path(),
        ["run.seed=5"],
    )
    config = found.config({"grpo.lr": 0.003, "controller.hidden": 16})
    assert (config.grpo.epochs, config.run.seed, config.grpo.lr, config.controller.hidden) == (3, 5, 0.003, 16)


def test_text_and_paths_in_a_sweeps_file_are_as_in_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial runs in Ray's own folder, where a relative path would name another file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "preset: smoke\ntrials: 2\nset: {model.revision: 0123456, run.name: 010, grpo.lr: 1e-3}\n"
        "space:\n  task.name: {choice: [scenes, mine.jsonl]}\n  store.path: {choice: [null, a.sqlite]}\n"
        "  run.tracker: {choice: ['mlflow:a', 'mlflow:b']}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("ray_ctrl.preflight.plan_layout", lambda config: None)
    found = load_sweep(file)
    assert (found.base.model.revision, found.base.run.name, found.base.grpo.lr) == ("0123456", "010", 1e-3)
    here = str(tmp_path)
    values = {item.key: item.values for item in found.space}
    assert values["task.name"] == ("scenes", f"{here}/mine.jsonl")
    assert values["store.path"] == (None, f"{here}/a.sqlite")
    assert values["run.tracker"] == (f"mlflow:{here}/a", f"mlflow:{here}/b")
    again = make_sweep(yaml.safe_load(dump(found)), Path())
    assert (again.base, again.space) == (found.base, found.space)


@pytest.mark.parametrize(
    "text", ["trials: 1\ntrials: 2\n", "set: {grpo.lr: 1, grpo.lr: 2}\n", "space: {a: 1}\nspace: {}"]
)
def test_a_key_given_twice_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"sweep\.yaml is not valid YAML.*is given twice"):
        load_sweep(tmp_path / "sweep.yaml")


def test_a_grid_counts_its_own_trials() -> None:
    found = sweep(search="grid", trials=None, space={"grpo.epochs": {"grid": [1, 2, 3]}, "run.seed": {"grid": [0, 1]}})
    assert found.trials == 6
    assert {found.config(point).grpo.epochs for point in found.samples()} == {1, 2, 3}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"serch": "grid"}, "nearest valid key is 'search'"),
        ({"trials": None}, "trials: is missing"),
        ({"space": {}}, "name at least one"),
        ({"space": {"grpo.lrr": {"choice": [1]}}}, "did you mean 'grpo.lr'"),
        ({"space": {"grpo": {"choice": [1]}}}, "unknown key 'grpo'"),
        ({"space": {"grpo.lr": {"normal": [0, 1]}}}, "give one of uniform"),
        ({"space": {"grpo.lr": {"uniform": [0.1]}}}, "two numbers"),
        ({"space": {"grpo.lr": {"uniform": [0.2, 0.1]}}}, "lower end comes first"),
        ({"space": {"grpo.lr": {"log_uniform": [0.0, 0.1]}}}, "both above 0"),
        ({"space": {"grpo.lr": {"uniform": [0.1, math.inf]}}}, "lower end"),
        ({"space": {"grpo.epochs": {"int": [1.5, 2]}}}, "two whole numbers"),
        ({"space": {"grpo.lr": {"choice": []}}}, "give a list"),
        ({"space": {"grpo.lr": {"choice": [0.1, 0.1]}}}, "each value once"),
        ({"space": {"grpo.lr": {"uniform": [0.1, 2.0]}}}, "grpo.lr = 2.0 is not allowed"),
        ({"space": {"grpo.group_size": {"choice": [4, 1]}}}, "grpo.group_size = 1"),
        ({"space": {"runners.envs_per_runner": {"choice": [4, 6]}}}, "does not divide"),
        ({"search": "grid"}, "grid takes grids alone"),
        ({"search": "bayesian", "space": {"grpo.epochs": {"grid": [1, 2]}}}, "bayesian takes no grid"),
        ({"search": "grid", "trials": 5, "space": {"grpo.epochs": {"grid": [1, 2]}}}, "not the size of the grid, 2"),
        ({"scheduler": "pbt"}, "tune.Tuner(GRPO, ...)"),
        ({"pbt": {"every": 4}}, "tune.Tuner(GRPO, ...)"),
        ({"set": {"evaluation.every": 0}}, "ranked by validation"),
        ({"metric": "reward"}, "metric = 'reward' is not allowed"),
    ],
)
def test_mistakes_are_named_before_anything_starts(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep(**keys)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_trials_get_their_resources_and_as_many_run_as_fit() -> None:
    from ray_ctrl.tune.search import concurrent_trials, totals, trial_resources

    alone = totals(trial_resources(sweep().base))
    assert alone == {"CPU": 1.0, "GPU": 0.0}
    several = sweep(set={"runners.count": 2, "runners.gpus": 0.5, "runners.address": "10.0.0.1:6379"})
    group = trial_resources(several.base)
    assert group.bundles == [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}, {"CPU": 1.0, "GPU": 0.5}]
    each = totals(group)
    assert concurrent_trials(several, each, {"CPU": 64.0, "GPU": 2.0}) == 2
    assert concurrent_trials(several, each, {"CPU": 2.0, "GPU": 8.0}) == 0
    assert concurrent_trials(sweep(concurrent=1), alone, {"CPU": 8.0}) == 1
    assert concurrent_trials(sweep(trials=2), alone, {"CPU": 8.0}) == 2


def test_a_dry_run_counts_the_gpus_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray_ctrl.preflight.cuda_devices", lambda: 4)
    keys = {"model.device": "cuda", "runners.count": 1, "runners.gpus": 1}
    found = sweep(set=keys)
    print_plan(found)
    assert "and 4 GPUs" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("ray_ctrl.preflight.cuda_devices", lambda: 0)
    with pytest.raises(UserError, match="this machine has none"):
        print_plan(found)
    print_plan(sweep(set=keys | {"runners.address": "10.0.0.1:6379"}))
    assert "which a dry run does not ask" in " ".join(capsys.readouterr().out.split())


def test_trials_share_budgets_unless_the_space_touches_them() -> None:
    assert sweep().shares_budgets
    assert sweep(space={"reward.penalty": {"uniform": [0, 1]}}).shares_budgets
    assert not sweep(space={"budgets.high_factor": {"uniform": [1.0, 2.0]}}).shares_budgets


def test_bayesian_search_learns_from_results() -> None:
    """Optuna's searcher, driven by hand on a parabola, ends nearer to its top than it began."""
    from ray_ctrl.tune.search import param_space, searcher

    found = sweep(search="bayesian", trials=30, space={"grpo.lr": {"uniform": [0.0001, 1.0]}})
    search = searcher(found, 1)
    search.set_search_properties(found.file.metric, found.file.mode, param_space(found))
    distances = []
    for index in range(30):
        chosen = search.suggest(str(index))["grpo.lr"]
        assert 0.0001 <= chosen <= 1.0
        distances.append(abs(chosen - 0.3))
        search.on_trial_complete(str(index), {found.file.metric: -distances[-1], "training_iteration": 1})
    assert sum(distances[-10:]) < 0.5 * sum(distances[:10])


def test_a_result_reported_again_is_no_warning() -> None:
    from ray_ctrl.tune.search import param_space, searcher, silence_tune

    found = sweep(search="bayesian")
    search = searcher(found, 1)
    search.set_search_properties(found.file.metric, found.file.mode, param_space(found))
    search.suggest("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silence_tune()
        for _ in range(2):
            search.on_trial_result("a", {found.file.metric: 0.5, "training_iteration": 1})


def test_variants_change_several_keys_together_one_thing_at_a_time() -> None:
    variants: list[Any] = [{}, {"guardrail.confidence": None}, {"controller.without": ["token"], "grpo.kl_coef": 0.1}]
    found = make_sweep({"preset": "smoke", "search": "grid", "space": {"variant": {"grid": variants}}}, Path())
    assert found.trials == 3
    plain, unmasked, blind = (found.config({"variant": value}) for value in variants)
    assert plain == found.base
    assert unmasked.guardrail.confidence is None
    assert (blind.controller.without, blind.grpo.kl_coef) == (("token",), 0.1)
    item = found.space[0]
    assert [_chosen(found, item, config) for config in (plain, unmasked, blind)] == variants
    for wrong in ({"grid": [1, 2]}, {"uniform": [0, 1]}):
        with pytest.raises(UserError, match="mappings of keys"):
            make_sweep({"preset": "smoke", "search": "grid", "space": {"variant": wrong}}, Path())
    with pytest.raises(UserError, match="speed"):
        make_sweep({"preset": "smoke", "search": "grid", "space": {"variant": {"grid": [{"grpo.speed": 1}]}}}, Path())
