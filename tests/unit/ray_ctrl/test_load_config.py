"""Presets, files and overrides become one checked configuration; mistakes are named."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from envs.errors import UserError
from policies.grpo.config import GRPOSettings
from ray_ctrl.config import Config
from ray_ctrl.load_config import (
    OLD_KEYS,
    SECTIONS,
    describe,
    load_config,
    presets,
    to_yaml,
    valid_keys,
    with_overrides,
)
from ray_ctrl.preflight import plan_layout
from ray_ctrl.profiles import fit_warning

DOCS = Path(__file__).resolve().parents[3] / "docs" / "config.md"


def test_every_preset_parses_and_laptop_is_the_default() -> None:
    assert set(presets()) >= {"laptop", "smoke", "molmoe-1b"}
    for name in presets():
        load_config(name)
    assert load_config() == load_config("laptop")


@pytest.mark.parametrize("name", ["laptop", "smoke"])
def test_presets_for_two_cores_are_feasible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ctrl.preflight.machine_cpus", lambda: 2)
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
        ("latency.source=sundial", ["latency.source = 'sundial'", "roofline"]),
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
    page = runpy.run_path(str(DOCS.with_name("config_page.py")))["render"]()
    assert DOCS.read_text("utf-8") == page, "run: python docs/config_page.py > docs/config.md"
    for key in valid_keys():
        if "." in key:
            assert f"`{key}`" in page


def test_defaults_live_in_the_models_alone() -> None:
    """The laptop preset changes nothing, so that defaults are in one place."""
    assert load_config("laptop") == with_overrides(Config(), [])
    assert yaml.safe_load(to_yaml(Config()))["grpo"]["lr"] == Config().grpo.lr


def test_a_profile_that_does_not_fit_comes_with_a_warning() -> None:
    assert fit_warning(0.05) == ""
    assert "the device was busy" in fit_warning(0.08)


def test_files_named_in_settings_are_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    moved = load_config("smoke", None, ["latency.profile=mine.json", "model.block_importance=~/scores.json"])
    assert moved.latency.profile == str(tmp_path / "mine.json")
    assert moved.model.block_importance == str(Path.home() / "scores.json")
    assert with_overrides(moved, []) == moved


@pytest.mark.parametrize("text", ["~/runs", "runs", "./runs"])
def test_every_path_is_absolute_once_settings_are_read(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.jsonl").touch()
    paths = ["run.folder", "store.path", "latency.profile", "latency.profile_dir", "model.block_importance"]
    given = ["model.name=model", "task.name=3*textvqa=mine.jsonl+scenes", *(f"{key}={text}" for key in paths)]
    read = load_config("smoke", None, given)
    expected = tmp_path / "home" / "runs" if text == "~/runs" else tmp_path / "runs"
    for section, _, key in (path.partition(".") for path in paths):
        assert getattr(getattr(read, section), key) == str(expected)
    assert read.model.name == str(tmp_path / "model")
    assert read.task.name == f"3*textvqa={tmp_path / 'mine.jsonl'}+scenes"


def test_tasks_that_are_no_paths_stay_as_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    (tmp_path / "owner").mkdir()
    for name in ("scenes", "textvqa", "2*scenes+textvqa", "owner/data@main", "none.jsonl"):
        assert load_config("smoke", None, [f"task.name={name}"]).task.name == name


@pytest.mark.parametrize("text", ["010", "001", "0123456", "1e5", "2024-01-01", "no", "0x10", "1_000", "12"])
def test_text_stays_as_written(text: str, tmp_path: Path) -> None:
    assert load_config("smoke", None, [f"run.name={text}"]).run.name == text
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {{revision: {text}}}\nrun.name: {text}\n", encoding="utf-8")
    read = load_config("smoke", file)
    assert (read.model.revision, read.run.name) == (text, text)
    file.write_text(to_yaml(read), encoding="utf-8")
    assert load_config(None, file) == read


@pytest.mark.parametrize("text", ["my #1 runs", "a: b", "[a]", "%a", "@a", "*a", "{a: b}", "a 'b'"])
def test_text_on_the_command_line_is_no_yaml(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("smoke", None, [f"run.folder={text}"]).run.folder == str(tmp_path / text)
    assert load_config("smoke", None, [f'run.folder="{text}"']).run.folder == str(tmp_path / text)


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("1_000", 1000), ("+7", 7), ("0", 0)])
def test_numbers_are_decimal(text: str, seed: int, tmp_path: Path) -> None:
    assert load_config("smoke", None, [f"run.seed={text}"]).run.seed == seed
    file = tmp_path / "mine.yaml"
    file.write_text(f"run: {{seed: {text}}}\nbudgets.low_ms: {text}.5\n", encoding="utf-8")
    read = load_config("smoke", file)
    assert (read.run.seed, read.budgets.low_ms) == (seed, seed + 0.5)


@pytest.mark.parametrize("text", ["0x10", "1:30", "0o17", "0b1", "2024-99-99", "2024-01-01"])
def test_what_is_no_decimal_number_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"run: {{iterations: {text}}}\n", encoding="utf-8")
    for given in ((None, [f"run.iterations={text}"]), (file, [])):
        with pytest.raises(UserError, match=rf"run\.iterations = '{text}' is not allowed"):
            load_config("smoke", *given)


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_run_is_named_by_more_than_dots(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name"):
        load_config("smoke", None, [f"run.name={name}"])


@pytest.mark.parametrize("key", ["run.folder", "store.path", "latency.profile", "model.name", "run.tracker"])
def test_the_home_of_an_unknown_user_is_named(key: str) -> None:
    text = "mlflow:~nobody-here/x" if key == "run.tracker" else "~nobody-here/x"
    with pytest.raises(UserError, match=rf"{key} = .* is not allowed: ~nobody-here is no home on this machine"):
        load_config("smoke", None, [f"{key}={text}"])


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("mlflow:mlruns", "mlflow:{cwd}/mlruns"),
        ("mlflow:sqlite:///mlflow.db", "mlflow:sqlite:///{cwd}/mlflow.db"),
        ("mlflow:file:./mlruns", "mlflow:file:{cwd}/mlruns"),
        ("mlflow:sqlite:////data/mlflow.db", "mlflow:sqlite:////data/mlflow.db"),
        *(
            (uri, uri)
            for uri in ("mlflow:http://h:5000", "mlflow:file:///data/runs", "mlflow:databricks", "wandb:mine")
        ),
    ],
)
def test_a_trackers_files_are_absolute(given: str, read: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("smoke", None, [f"run.tracker={given}"])
    assert config.run.tracker == read.format(cwd=tmp_path)
    assert with_overrides(config, []) == config


@pytest.mark.parametrize(
    "text",
    [
        *("grpo: {lr: 1}\ngrpo: {epochs: 1}\n", "grpo:\n  lr: 1\n  lr: 2\n"),
        *("grpo.lr: 1\ngrpo: {epochs: 1, lr: 2}\n", "grpo: {lr: 1}\ngrpo.lr: 2\n"),
    ],
)
def test_a_repeated_key_is_an_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml.*is given twice"):
        load_config("smoke", file)


@pytest.mark.parametrize("text", ["run: seed", "run: [seed]", "run: !!omap [seed: 3]", "run: ''"])
def test_a_section_without_keys_is_never_replaced(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    for given in ((file, ["run.iterations=1"]), (None, ["run=3", "run.iterations=1"])):
        with pytest.raises(UserError, match=r"run = .* is a section"):
            load_config("smoke", *given)


def test_dotted_keys_in_a_file_are_sections(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("grpo.lr: 5e-4\ngrpo: {epochs: 3}\ngrpo.clip_low: 0.1\n", encoding="utf-8")
    grpo = load_config("smoke", file).grpo
    assert (grpo.lr, grpo.epochs, grpo.clip_low) == (5e-4, 3, 0.1)


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items())
def test_an_old_key_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(UserError, match=f"'{re.escape(old)}'.*'{re.escape(new)}' now"):
        load_config("smoke", None, [f"{old}=1"])
    assert new in valid_keys()


def test_ranges_are_generated_from_the_fields() -> None:
    fields = Config.model_fields["model"].annotation.model_fields | GRPOSettings.model_fields
    assert describe(fields["threads"]).endswith(" 1 to 256.")
    assert describe(fields["batch_tokens"]).endswith(" 64 or more.")
    assert describe(fields["lr"]).endswith(" Above 0 to 1.")
    assert describe(fields["ema_decay"]).endswith(" 0 to below 1.")
    for model in SECTIONS.values():
        for field in model.model_fields.values():
            assert not re.search(r"(or more|\d to \d+|Above \d.*)\.$", field.description or "")
