"""docs/serving.md has every key with its default, and every metric."""

import re
from pathlib import Path

import ray_ctrl.serve.monitoring as monitoring
from ray_ctrl.load_config import describe
from ray_ctrl.serve.settings import ServeSettings

PAGE = Path(__file__).resolve().parents[4] / "docs" / "serving.md"


def settings_table() -> str:
    """The table of all settings."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in ServeSettings.model_fields.items():
        default = "" if field.is_required() else "null" if field.default is None else f"{field.default}"
        lines.append(f"| `{name}` | {default} | {describe(field)} |")
    return "\n".join(lines)


def test_settings_are_those_of_the_code() -> None:
    assert settings_table() in PAGE.read_text("utf-8"), f"write this:\n{settings_table()}"


def test_metrics_are_those_of_the_code() -> None:
    text = PAGE.read_text("utf-8")
    names = re.findall(r'make\(\s*\w+,\s*"(\w+)"', Path(monitoring.__file__).read_text("utf-8"))
    assert len(names) == 8
    assert [name for name in names if f"_{name}" not in text] == []
