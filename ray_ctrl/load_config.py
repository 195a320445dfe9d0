"""Reading a configuration: preset, then file, then dotted overrides; and writing it down again.

Errors name the dotted path, the value seen and what is allowed; an unknown key names the nearest
valid one.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from envs.errors import UserError
from ray_ctrl.config import Config

Tree = dict[str, Any]
SECTIONS: Mapping[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


class _Loader(yaml.SafeLoader):
    """YAML in which `3e-4` is a number, as its writers mean it (YAML 1.1 asks for a dot)."""


_Loader.yaml_implicit_resolvers = {key: list(pairs) for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def presets() -> tuple[str, ...]:
    """Names of the shipped presets."""
    folder = resources.files("ray_ctrl") / "presets"
    return tuple(sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if ".yaml" in p.name))


def load_config(
    preset: str | None = "laptop",
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
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
    return parse(tree)


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
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {first}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where} holds a {type(tree).__name__}: give sections such as 'grpo:' with keys")
    return {str(key): value for key, value in tree.items()}


def _override_tree(override: str) -> Tree:
    path, sign, text = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise UserError(f"override {override!r} is not understood: write section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"value {text!r} of override {override!r} is not valid YAML: put text in quotes") from None
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    return dict(tree)


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
    if problem["type"] == "extra_forbidden":
        return f"unknown config key {path!r}: {_nearest_key(path)}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    section, _, key = path.partition(".")
    model = SECTIONS.get(section)
    field = model.model_fields.get(key.partition(".")[0]) if model else None
    meaning = f" ({field.description})" if field and field.description else ""
    return f"{path} = {problem['input']!r} is not allowed: {message}{meaning}"


def _nearest_key(path: str) -> str:
    """The nearest valid dotted key: by whole path first, then by its last part in any section."""
    keys = list(valid_keys())
    leaf = path.rpartition(".")[2]
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    close = same_leaf or difflib.get_close_matches(path, keys, n=1, cutoff=0.6)
    if not close:
        leaves = {key.rpartition(".")[2]: key for key in keys}
        near = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.5)
        close = [leaves[name] for name in near]
    if close:
        return f"the nearest valid key is {close[0]!r}"
    return f"sections are {', '.join(Config.model_fields)}; see docs/config.md"


def anchored(config: Config) -> Config:
    """`config` with the files it names as absolute paths, so that a run can be taken up from any folder."""
    tree: Tree = config.model_dump()
    for section, key in (("clock", "table"), ("model", "importance")):
        if tree[section][key] is not None:
            tree[section][key] = str(Path(tree[section][key]).expanduser().absolute())
    return parse(tree)
