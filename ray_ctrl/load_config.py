"""Reading a configuration: preset, then file, then dotted overrides; and writing it down again.

Errors name the dotted path, the value seen and what is allowed; an unknown key names the nearest
valid one.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from envs.errors import UserError
from envs.section import problem_text
from policies.grpo import config as grpo_config
from ray_ctrl.config import Config

Tree = dict[str, Any]
SECTIONS: Mapping[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}

OLD_KEYS: Mapping[str, str] = {
    "clock": "latency",
    "clock.kind": "latency.source",
    "clock.table": "latency.profile",
    "clock.folder": "latency.profile_dir",
    "clock.device": "latency.device",
    "clock.profile_samples": "latency.profile_samples",
    "clock.profile_repeats": "latency.profile_repeats",
    "model.encoder_seed": "model.latency_token_seed",
    "model.importance": "model.block_importance",
    "task.on_broken": "task.on_invalid_row",
    "budgets.low": "budgets.low_factor",
    "budgets.high": "budgets.high_factor",
    "budgets.price_bins": "budgets.penalty_bins",
    "reward.price_initial": "reward.penalty_init",
    "reward.price_step": "reward.penalty_lr",
    "reward.price_max": "reward.penalty_max",
    "reward.price_memory": "reward.penalty_smoothing",
    "reward.violation_target": "reward.max_violation_rate",
    "reward.utilisation": "reward.budget_use_bonus",
    "reward.overrun": "reward.penalty",
    "runners.envs": "runners.envs_per_runner",
    "runners.evaluation": "runners.eval_runners",
    "run.track": "run.tracker",
    **{f"grpo.{old}": f"grpo.{new}" for old, new in grpo_config.OLD_KEYS.items()},
}
"""Keys of earlier versions, each an error that names the new one."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: `3e-4` is one, `010` is ten, `1:30` is text; repeated keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.MarkedYAMLError(None, None, f"key {repeated[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")
_DIGITS = r"\d+(_\d+)*"
_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in pairs if tag not in _NUMBERS]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(rf"^[-+]?{_DIGITS}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(rf"^[-+]?(({_DIGITS}(\.\d*)?|\.\d+)([eE][-+]?\d+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor(_INT, _Loader.construct_decimal)


def presets() -> tuple[str, ...]:
    """Names of the shipped presets."""
    folder = resources.files("ray_ctrl") / "presets"
    return tuple(sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name))


def load_config(preset: str | None = "laptop", file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration: preset < file < overrides.

    Args:
        preset: name of a shipped preset; None starts from the defaults alone.
        file: a YAML file of sections.
        overrides: `section.key=value` each, the value typed as YAML.

    Raises:
        UserError: unknown preset or key, unreadable file, or a value outside its range.
    """
    tree: Tree = {}
    if preset is not None:
        _merge(tree, _preset_tree(preset))
    if file is not None:
        _merge(tree, _file_tree(Path(file)))
    for override in overrides:
        _merge(tree, _override_tree(override))
    return parse(parse(tree).model_dump())  # once more: default paths become absolute, too


def parse(tree: Mapping[str, Any]) -> Config:
    """A nested mapping as a checked `Config`.

    Raises:
        UserError: naming the first wrong key or value.
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with dotted overrides laid over it.

    Raises:
        UserError: as `load_config`.
    """
    tree: Tree = config.model_dump()
    for override in overrides:
        _merge(tree, _override_tree(override))
    return parse(tree)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; `load_config(None, file)` of it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(field: FieldInfo) -> str:
    """What a key means, with its range from the field's own limits."""
    limits = {
        name: f"{getattr(rule, name):.10g}"
        for rule in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if hasattr(rule, name)
    }
    low = f"above {limits['gt']}" if "gt" in limits else limits.get("ge", "")
    high = f"below {limits['lt']}" if "lt" in limits else limits.get("le", "")
    allowed = f"{low} to {high}" if low and high else f"{low} or more" if "ge" in limits else low
    return f"{field.description}{f' {allowed[0].upper()}{allowed[1:]}.' if allowed else ''}"


def flat(tree: Mapping[str, Mapping[str, Any]]) -> Tree:
    """{"section.key": value} of {"section": {"key": value}}."""
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def valid_keys() -> Iterator[str]:
    """All dotted keys, sections included."""
    for section, model in SECTIONS.items():
        yield section
        for key in model.model_fields:
            yield f"{section}.{key}"


def _preset_tree(name: str) -> Tree:
    if name not in presets():
        raise UserError(f"unknown preset {name!r}: {_nearest(name, presets())}")
    text = (resources.files("ray_ctrl") / "presets" / f"{name}.yaml").read_text("utf-8")
    return _tree(text, f"preset {name}")


def _file_tree(path: Path) -> Tree:
    try:
        return _tree(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise UserError(
            f"cannot read config file {path}: {error.strerror}; give a YAML file, or one of the "
            f"presets {', '.join(presets())} with --preset"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text: give a YAML file") from None


def _tree(text: str, where: str) -> Tree:
    nested: Tree = {}
    given: set[str] = set()
    for key, value in read_yaml(text, where, "sections such as 'grpo:' with keys").items():
        tree = _nested(str(key), value)
        repeated = sorted(given & set(_dotted(tree)))
        if repeated:
            raise UserError(f"{where}: {repeated[0]!r} is given twice, with a dot and in its section: leave one out")
        given |= set(_dotted(tree))
        _merge(nested, tree)
    return nested


def _dotted(tree: Mapping[str, Any]) -> Iterator[str]:
    """`section.key` of every key of the sections."""
    for section, keys in tree.items():
        yield from (f"{section}.{key}" for key in keys) if isinstance(keys, Mapping) else ()


def read_yaml(text: str, where: str, expected: str) -> Tree:
    """The mapping in a YAML file, empty for an empty file; repeated keys are errors, text is as written.

    Raises:
        UserError: other content, naming `where` it is and what is `expected`.
    """
    try:
        tree = _read(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{where} contains a {type(tree).__name__}: give {expected}")
    return tree or {}


def _override_tree(override: str) -> Tree:
    path, sign, text = override.partition("=")
    key = path.strip()
    if not sign or not all(key.split(".")):
        raise UserError(f"override {override!r} is not understood: write section.key=value")
    if _is_text(key) and text.strip()[:1] not in ("'", '"'):
        return _nested(key, None if text.strip().lower() in ("", "~", "null") else text.strip())
    try:
        return _nested(key, _read(text, key))
    except yaml.YAMLError:
        raise UserError(f"value {text!r} of override {override!r} is not valid YAML: put text in quotes") from None


def _read(text: str, key: str = "") -> Any:
    """YAML, where values of text settings stay as written: `010` is no number, `no` no boolean."""
    return _with_text(yaml.load(text, Loader=_Loader), yaml.load(text, Loader=yaml.BaseLoader), key)


def _with_text(value: Any, written: Any, key: str) -> Any:
    """`value` as `written` if `key` takes text."""
    if isinstance(value, dict) and isinstance(written, dict):
        pairs = zip(value.items(), written.values(), strict=True)
        return {name: _with_text(inner, raw, f"{key}.{name}".strip(".")) for (name, inner), raw in pairs}
    if isinstance(value, list) and isinstance(written, list):
        return [_with_text(inner, raw, key) for inner, raw in zip(value, written, strict=True)]
    return written if _is_text(key) and value is not None and isinstance(written, str) else value


def _is_text(key: str) -> bool:
    """Whether `section.name`, or `set.section.name` in a sweep's file, takes text."""
    section, name, *_ = [*key.removeprefix("set.").removeprefix("space.").split("."), ""]
    field = SECTIONS[section].model_fields.get(name) if section in SECTIONS else None
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def _nested(key: str, value: Any) -> Tree:
    """{"a.b": value} as {"a": {"b": value}}.

    Raises:
        UserError: a section that is no mapping, which later keys of the section would replace.
    """
    if key in SECTIONS and value is not None and not isinstance(value, Mapping):
        raise UserError(f"{key} = {value!r} is not allowed: it is a section; give its keys, such as {key}.KEY=VALUE")
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _merge(base: Tree, extra: Mapping[str, Any]) -> None:
    """Lays `extra` over `base` in place; an empty section (`grpo:` alone) changes nothing."""
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        elif isinstance(value, Mapping):
            base[key] = {}
            _merge(base[key], value)
        elif value is not None or key not in Config.model_fields:
            base[key] = value


def _nearest(word: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    listed = f"choose one of {', '.join(options)}"
    return f"did you mean {close[0]!r}?" if close else listed


def _explain(error: ValidationError) -> str:
    """The first problem in one line."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
    if problem["type"] == "extra_forbidden" and path in OLD_KEYS:
        if path == "clock" and isinstance(problem["input"], Mapping):
            path = next((f"clock.{key}" for key in problem["input"] if f"clock.{key}" in OLD_KEYS), path)
        return f"unknown config key {path!r}: it is {OLD_KEYS[path]!r} now"
    if path == "reward.mode" and problem["input"] == "constrained":
        return "reward.mode = 'constrained' is not allowed: it is 'lagrangian' now"
    if problem["type"] == "extra_forbidden":
        return f"unknown config key {path!r}: {_nearest_key(path)}"
    section, _, key = path.partition(".")
    model = SECTIONS.get(section)
    field = model.model_fields.get(key.partition(".")[0]) if model else None
    meaning = f" ({describe(field)})" if field else ""
    return f"{problem_text(path, problem)}{meaning}"


def _nearest_key(path: str) -> str:
    """The nearest valid dotted key: the same name in any section, the nearest path, the nearest name."""
    keys = list(valid_keys())
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys)}
    leaf = path.rpartition(".")[2]
    close = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(path, keys, n=1, cutoff=0.6)
    close = close or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]
    return (
        f"the nearest valid key is {close[0]!r}"
        if close
        else f"sections are {', '.join(Config.model_fields)}; see docs/config.md"
    )
