"""Presets, files and overrides become one checked configuration; mistakes are named."""

from pathlib import Path

import pytest
import yaml

from envs.errors import UserError
from ray_ctrl import config_docs
from ray_ctrl.config import Config
from ray_ctrl.feasibility import plan_layout
from ray_ctrl.setting import doubt
from ray_ctrl.settings import anchored, load_config, presets, to_yaml, valid_keys

DOCS = Path(__file__).resolve().parents[3] / "docs" / "config.md"


def test_every_preset_parses_and_laptop_is_the_default() -> None:
    assert set(presets()) >= {"laptop", "smoke", "molmoe-1b"}
    for name in presets():
        load_config(name)
    assert load_config() == load_config("laptop")


@pytest.mark.parametrize("name", ["laptop", "smoke"])
def test_presets_for_two_cores_are_feasible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ctrl.feasibility.machine_cpus", lambda: 2)
    assert plan_layout(load_config(name)).resources.cpus <= 2


def test_overrides_win_over_file_and_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("grpo: {lr: 5e-4, groups_per_iteration: 8}\nrun:\n", encoding="utf-8")
    config = load_config("smoke", file, ["grpo.lr=3e-4", "run.name=first"])
    assert config.grpo.lr == 3e-4
    assert config.grpo.groups_per_iteration == 8
    assert config.grpo.group_size == load_config("smoke").grpo.group_size
    assert config.run.name == "first"


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config("smoke", None, ["grpo.lr=1e-5", "grpo.minibatch_size=8"])
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(None, file) == config


def test_null_override_takes_a_value_back() -> None:
    assert load_config("smoke", None, ["grpo.minibatch_size=8", "grpo.minibatch_size=null"]).grpo.minibatch_size is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.lrr=1", ["unknown config key 'grpo.lrr'", "'grpo.lr'"]),
        ("gpro.lr=1", ["unknown config key 'gpro'", "'grpo'"]),
        ("lr=1", ["unknown config key 'lr'", "'grpo.lr'"]),
        ("grpo.seed=1", ["unknown config key 'grpo.seed'", "seed'"]),
        ("grpo.lr=-1", ["grpo.lr = -1", "greater than 0"]),
        ("grpo.lr=.nan", ["grpo.lr = nan", "finite"]),
        ("grpo.lr=fast", ["grpo.lr = 'fast'", "number"]),
        ("grpo.groups_per_iteration=true", ["grpo.groups_per_iteration = True", "integer"]),
        ("grpo.groups_per_iteration=2.5", ["grpo.groups_per_iteration = 2.5", "integer"]),
        ("clock.kind=sundial", ["clock.kind = 'sundial'", "roofline"]),
        ("model.device=tpu", ["model.device = 'tpu'"]),
        ("grpo=3", ["grpo = 3"]),
        ("run.name=../up", ["run.name = '../up'"]),
        ("grpo.lr", ["write section.key=value"]),
        ("grpo.lr=[1", ["not valid YAML"]),
    ],
)
def test_mistakes_are_named_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("smoke", None, [override])
    message = caught.value.message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["- a\n- b\n", "grpo: [", "just text"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config("smoke", file)


def test_missing_file_and_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read config file"):
        load_config("smoke", tmp_path / "none.yaml")
    with pytest.raises(UserError, match="did you mean 'laptop'"):
        load_config("labtop")


def test_every_field_is_described_and_every_number_bounded() -> None:
    for name, field in Config.model_fields.items():
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert inner.description, f"{name}.{key} has no description"
            if isinstance(inner.default, int | float) and not isinstance(inner.default, bool):
                assert inner.metadata, f"{name}.{key} has no bounds"


def test_docs_page_is_current_and_complete() -> None:
    page = config_docs.render()
    assert DOCS.read_text("utf-8") == page, "run: python -m ray_ctrl.config_docs > docs/config.md"
    for key in valid_keys():
        if "." in key:
            assert f"`{key}`" in page


def test_defaults_live_in_the_models_alone() -> None:
    """The laptop preset changes nothing, so that one place holds the defaults."""
    assert load_config("laptop") == Config()
    assert yaml.safe_load(to_yaml(Config()))["grpo"]["lr"] == Config().grpo.lr


def test_a_profile_that_does_not_fit_is_doubted_aloud() -> None:
    assert doubt(0.05) == ""
    assert "the device was busy" in doubt(0.08)


def test_files_named_in_settings_are_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("smoke", None, ["clock.table=mine.json", "model.importance=~/scores.json"])
    moved = anchored(config)
    assert moved.clock.table == str(tmp_path / "mine.json")
    assert moved.model.importance == str(Path.home() / "scores.json")
    assert anchored(moved) == moved
    assert anchored(Config()) == Config()
