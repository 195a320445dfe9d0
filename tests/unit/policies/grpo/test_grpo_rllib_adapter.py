"""Private names of Ray and RLlib: only the adapter uses them, and each still exists."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import ray

from policies.grpo.rllib_adapter import PRIVATE_NAMES

FOLDER = Path(__file__).parents[4] / "policies" / "grpo"


@pytest.mark.parametrize(
    ("owner", "name", "purpose"), PRIVATE_NAMES, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_private_name_still_exists(owner: Any, name: str, purpose: str) -> None:
    families = inspect.getmro(owner) if inspect.isclass(owner) else ()
    sources = "".join(inspect.getsource(one) for one in families if one.__module__.startswith("ray."))
    assert hasattr(owner, name) or f"self.{name}" in sources, (
        f"Ray {ray.__version__} has no {owner.__name__}.{name} any more, which policies/grpo/rllib_adapter.py needs "
        f"{purpose}: look for its successor there, or pin an older Ray"
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_only_the_adapter_touches_private_names_of_others(path: Path) -> None:
    if path.name == "rllib_adapter.py":
        return
    tree = ast.parse(path.read_text("utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    assert {name for name in used - own if not name.startswith("__")} <= {"_asdict"}
