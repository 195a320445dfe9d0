"""Every configuration key has one declaration: no function or class declares a second default for it."""

import ast
from pathlib import Path

import pytest

from ray_ctrl.config import Config

ROOT = Path(__file__).parents[2]
PACKAGES = ("envs", "policies", "ray_ctrl", "cluster")
OTHER_MEANING = {
    "name": "of a latency source, a baseline or an image in a message",
    "path": "of a data source",
    "revision": "of a data source",
    "source": "the file that a message names",
    "seed": "of one draw, profile or baseline; callers in a run pass `run.seed` or `task.seed`",
    "device": "torch's, of a library function that loads a model",
    "dtype": "torch's, of a library function that loads a model",
    "iterations": "boosting steps of a baseline",
    "cpus": "of the entrypoint of a Ray job, not of an env runner",
    "gpus": "of the entrypoint of a Ray job, not of an env runner",
    "address": "of a job server",
}
"""Parameters that share a key's name and mean something else."""
EXCEPTIONS = {
    "envs/latency/guardrail.py Guardrail.noise": "factor for the wall clock, not `latency.noise`",
    "envs/data/__init__.py load_task.on_invalid_row": "of a direct call; a run passes `task.on_invalid_row`",
    "envs/adaptive_vqa.py get.group_size": "environments outside GRPO need no groups",
    "envs/model/config.py AdaptiveMolmoEConfig.blank_crops": "published checkpoints say nothing about it",
    "envs/model/molmoe.py generate.max_new_tokens": "length of a direct call, which no run makes",
}
"""Single places where a key's name means something else."""


def key_names():
    return {key for section in Config.model_fields.values() for key in section.annotation.model_fields}


def second_defaults(source, names):
    """`owner.parameter` for each default of a parameter or class attribute that bears a key's name.

    None is no default: it says that the value comes from elsewhere.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            pairs = [*zip(positional[::-1], node.args.defaults[::-1], strict=False)]
            pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            pairs = [(argument.arg, default) for argument, default in pairs]
        elif isinstance(node, ast.ClassDef) and not any("Section" in ast.unparse(b) for b in node.bases):
            statements = [s for s in node.body if isinstance(s, ast.AnnAssign)]
            pairs = [(ast.unparse(s.target), s.value) for s in statements if not _is_field(s.value)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get") and len(node.args) == 2:
            pairs = (
                [(getattr(node.args[0], "value", None), node.args[1])] if isinstance(node.args[1], ast.Constant) else []
            )
        for name, default in pairs:
            if name in names and default is not None and not _is_none(default):
                found.append(f"{getattr(node, 'name', 'get')}.{name}")
    return found


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def _is_field(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "Field"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_key_has_a_second_default(package):
    names = key_names() - set(OTHER_MEANING)
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    found = [
        f"{path.relative_to(ROOT).as_posix()} {place}"
        for path in paths
        for place in second_defaults(path.read_text("utf-8"), names)
    ]
    assert sorted(set(found) - set(EXCEPTIONS)) == []


def test_the_exceptions_still_exist():
    for place in EXCEPTIONS:
        path, _, name = place.partition(" ")
        assert name in second_defaults((ROOT / path).read_text("utf-8"), key_names()), place
    assert set(OTHER_MEANING) <= key_names()


def test_sections_do_not_declare_the_same_key_twice():
    seen = {}
    for name, section in Config.model_fields.items():
        for key in section.annotation.model_fields:
            seen.setdefault(key, []).append(name)
    assert {key: where for key, where in seen.items() if len(where) > 1 and key not in OTHER_MEANING} == {}


def test_the_walk_sees_every_form_of_default():
    source = """
def f(a, lr=1e-3, *, hidden: int = 3, kl_coef=None): ...
a.get("epochs", 4), a.get("epochs"), a.get("epochs", other)
class Loss:
    clip_low: float = 0.2
    entropy_coef: float | None = None
class Settings(Section):
    epochs: int = Field(default=4)
"""
    names = {"lr", "hidden", "kl_coef", "clip_low", "entropy_coef", "epochs"}
    assert sorted(second_defaults(source, names)) == sorted(["f.lr", "f.hidden", "Loss.clip_low", "get.epochs"])
