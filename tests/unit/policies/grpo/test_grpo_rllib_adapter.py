"""Private names of Ray, RLlib and Tune: only the adapters use them, and each still exists."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import ray_adapter
from policies.grpo import rllib_adapter

ROOT = Path(__file__).parents[4]
ADAPTERS = {Path(module.__file__): module.PRIVATE_NAMES for module in (rllib_adapter, ray_adapter)}
FILES = sorted(
    path for package in ("envs", "policies", "ray_ctrl", "cluster") for path in (ROOT / package).rglob("*.py")
)


def message(owner: Any, name: str, purpose: str) -> str:
    return (
        f"Ray {ray.__version__} has no {owner.__name__}.{name} any more, which an adapter needs {purpose}: look for "
        "its successor there, or pin an older Ray"
    )


def exists(owner: Any, name: str) -> bool:
    families = inspect.getmro(owner) if inspect.isclass(owner) else ()
    sources = "".join(inspect.getsource(one) for one in families if one.__module__.startswith("ray."))
    return hasattr(owner, name) or f"self.{name}" in sources


@pytest.mark.parametrize(
    ("owner", "name", "purpose"),
    [entry for names in ADAPTERS.values() for entry in names],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_private_name_still_exists(owner: Any, name: str, purpose: str) -> None:
    assert exists(owner, name), message(owner, name, purpose)


def test_a_name_that_has_moved_is_named() -> None:
    owner, _, purpose = rllib_adapter.PRIVATE_NAMES[0]
    assert not exists(owner, "_moved_away")
    assert f"has no {owner.__name__}._moved_away any more, which an adapter needs {purpose}" in message(
        owner, "_moved_away", purpose
    )


def private(path: Path) -> set[str]:
    """Private attributes that a file uses, and private modules that it imports."""
    tree = ast.parse(path.read_text("utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray"):
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in used if name.startswith("_") and not name.startswith("__")}


def own_names() -> set[str]:
    """Every name that the packages define or assign themselves."""
    own = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return own - {name for names in ADAPTERS.values() for _, name, _ in names}


def test_only_the_adapters_touch_private_names_of_ray() -> None:
    own = own_names()
    found = {
        str(path.relative_to(ROOT)): private(path) - own
        for path in FILES
        if path not in ADAPTERS and ROOT / "envs" not in path.parents
    }
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.name)
def test_every_private_name_of_an_adapter_is_listed(path: Path) -> None:
    listed = {name for _, name, _ in ADAPTERS[path]}
    assert private(path) - own_names() - {"_private"} <= listed
