"""`config.md` from the settings: `python docs/config_page.py > docs/config.md`."""

import inspect
import json
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_ctrl.load_config import SECTIONS, describe, presets

INTRO = """# Configuration

Generated from the sections of `ray_ctrl/config.py` by `python docs/config_page.py`; a test keeps it current.

Values are laid over one another: defaults, then `--preset` ({presets}), then `--config FILE` (YAML), then overrides on
the command line such as `grpo.lr=3e-4`. Unknown keys are errors that name the nearest valid one; relative paths become
absolute when they are read. Text is taken as it is written, numbers are decimal (`010` is ten). `--dry-run` prints the
result and writes nothing.
"""


def render() -> str:
    """The complete page."""
    parts = [INTRO.format(presets=", ".join(f"`{name}`" for name in presets()))]
    parts += [_section(name, section) for name, section in SECTIONS.items()]
    return "\n".join(parts)


def _section(name: str, section: type[BaseModel]) -> str:
    lines = [f"## {name}", "", inspect.cleandoc(section.__doc__ or ""), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section.model_fields.items():
        default = json.dumps(field.default)
        meaning = describe(field).replace("|", "\\|")
        lines.append(f"| `{name}.{key}` | {_type(field)} | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


def _type(field: FieldInfo) -> str:
    """The annotation as a user would say it: `int`, `float or null`, or the allowed words."""
    return _words(field.annotation)


def _words(annotation: object) -> str:
    if isinstance(annotation, type):
        return {"NoneType": "null", "str": "text", "bool": "true/false"}.get(annotation.__name__, annotation.__name__)
    arguments = get_args(annotation)
    if arguments and all(isinstance(a, str) for a in arguments):
        return ", ".join(f"`{a}`" for a in arguments)
    if "Annotated" in str(annotation) and not str(annotation).startswith("typing.Union"):
        first = arguments[0] if arguments else annotation
        if len(arguments) > 1 and not isinstance(arguments[1], type):
            return _words(first)
    if Ellipsis in arguments:
        return f"list of {_words(arguments[0])}"
    return " or ".join(_words(a) for a in arguments)


if __name__ == "__main__":
    print(render(), end="")
