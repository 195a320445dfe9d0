"""A sweep as its YAML file describes it: fixed values, search space, search method, number of trials.

Every range and choice is checked against the configuration before Ray starts, so that no trial fails of a typing
mistake.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from envs.errors import UserError
from envs.section import Flag, Int, Section, problem_text
from ray_ctrl.config import Config
from ray_ctrl.load_config import flat, load_config, read_yaml, valid_keys, with_overrides

VARIANT = "variant"
"""A key of the space whose choices are several keys each, to change one thing at a time."""
KINDS = ("uniform", "log_uniform", "int", "log_int", "choice", "grid")
# Trials that differ here have different profiles or budgets.
BUDGET_SECTIONS = ("budgets.", "latency.", "model.", "task.")


class AshaSettings(Section):
    """Early stopping of the worst trials (asynchronous successive halving)."""

    grace: Int = Field(default=1, ge=1, description="Iterations every trial gets before it may be stopped.")
    reduction: Int = Field(default=3, ge=2, le=64, description="One in so many trials survives each rung. 2 to 64.")


class SweepFile(Section):
    """The file's keys."""

    preset: str | None = Field(default="laptop", description="Shipped configuration to start from.")
    config: str | None = Field(default=None, description="YAML file that overrides the preset.")
    set: dict[str, Any] = Field(default_factory=dict, description="Fixed values: dotted key to value.")
    space: dict[str, dict[str, Any]] = Field(
        description="Dotted key to one of " + ", ".join(KINDS) + "; `variant` to a grid or choice of mappings of keys."
    )
    search: Literal["random", "grid", "bayesian"] = Field(default="random", description="How values are drawn.")
    scheduler: Literal["none", "asha"] = Field(default="none", description="Which trials are stopped early.")
    trials: Int | None = Field(default=None, ge=1, le=100_000, description="Trials; a grid counts its own.")
    concurrent: Int | None = Field(default=None, ge=1, description="Most trials at a time; by default what fits.")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="Seed of the draws.")
    metric: str = Field(default="validation/score", pattern=r"^validation/\w+$", description="What ranks trials.")
    mode: Literal["max", "min"] = Field(default="max", description="Whether more of the metric is better.")
    retries: Int = Field(default=2, ge=0, le=100, description="Restarts of a trial whose process died.")
    asha: AshaSettings = AshaSettings()
    share_store: Flag = Field(default=True, description="One outcome store for all trials, unless store.path is set.")


@dataclass(frozen=True)
class Range:
    """One searched key of the configuration.

    Attributes:
        kind: one of KINDS.
        values: (low, high) of a range, or the choices.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    @property
    def is_range(self) -> bool:
        return self.kind not in ("choice", "grid")


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: the configuration that all trials share, and the search space."""

    file: SweepFile
    base: Config
    space: tuple[Range, ...]

    @property
    def trials(self) -> int:
        """How many trials there will be."""
        grids = [len(item.values) for item in self.space if item.kind == "grid"]
        return math.prod(grids) * (1 if self.file.search == "grid" else self.file.trials or 1)

    @property
    def shares_budgets(self) -> bool:
        """Whether all trials have the same profile and budgets."""
        return not any(item.key.startswith(BUDGET_SECTIONS) for item in self.space)

    def config(self, chosen: Mapping[str, Any]) -> Config:
        """Configuration of one trial.

        Raises:
            UserError: a value that the configuration does not allow.
        """
        pairs = [
            pair for key, value in chosen.items() for pair in (value.items() if key == VARIANT else [(key, value)])
        ]
        return with_overrides(self.base, [f"{key}={_as_yaml(value)}" for key, value in pairs])

    def samples(self) -> Iterator[dict[str, Any]]:
        """Every end and choice of a key with the first ones of the others: what is checked before the start."""
        first = {item.key: item.values[0] for item in self.space}
        yield first
        for item in self.space:
            for value in item.values[1:]:
                yield first | {item.key: value}


def find_sweep(name: str) -> Path:
    """The file of a sweep: a path, or the name of a shipped one.

    Raises:
        UserError: neither.
    """
    shipped = {path.stem: path for path in (Path(__file__).parents[1] / "presets" / "sweeps").glob("*.yaml")}
    path = Path(name).expanduser()
    if not path.is_file() and name not in shipped:
        raise UserError(
            f"no sweep {name!r}: give a YAML file (docs/cluster.md), or one of {', '.join(sorted(shipped))}"
        )
    return path if path.is_file() else shipped[name]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a YAML file, with overrides of all its trials.

    Raises:
        UserError: an unreadable file, an unknown key, or a range that is not allowed.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read sweep {path}: {error.strerror}; give a YAML file (docs/cluster.md)") from None
    except UnicodeDecodeError:
        raise UserError(f"sweep {path} is not UTF-8 text: give a YAML file (docs/cluster.md)") from None
    return make_sweep(read_yaml(text, f"sweep {path}", "keys such as 'space:'"), path.parent, overrides)


def make_sweep(tree: Mapping[str, Any], folder: Path, overrides: Sequence[str] = ()) -> Sweep:
    """A checked sweep from its file's content, whose paths are relative to `folder`."""
    if tree.get("scheduler") == "pbt" or "pbt" in tree:
        raise UserError(
            "scheduler: pbt is not a scheduler of sweeps: run Ray Tune's own PopulationBasedTraining on the algorithm, "
            "tune.Tuner(GRPO, ...); see Sweeps in docs/cluster.md"
        )
    try:
        file = SweepFile.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    fixed = [f"{key}={_as_yaml(value)}" for key, value in file.set.items()]
    config = folder / file.config if file.config else None
    base = load_config(file.preset, config, [*fixed, *overrides])
    space = tuple(_with_absolute_paths(_range(key, given), base) for key, given in file.space.items())
    sweep = Sweep(file, base, space)
    _check(sweep)
    return sweep


def dump(sweep: Sweep) -> str:
    """The sweep as YAML that `make_sweep` reads again, with the resolved configuration."""
    tree = sweep.file.model_dump(mode="json") | {"preset": None, "config": None}
    tree["set"] = flat(sweep.base.model_dump(mode="json"))
    return yaml.safe_dump(tree, sort_keys=False)


def _range(key: str, given: Mapping[str, Any]) -> Range:
    known = [name for name in valid_keys() if "." in name]
    if key not in [*known, VARIANT]:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "all keys are in docs/config.md"
        raise UserError(f"space: unknown key {key!r}: {hint}")
    if len(given) != 1 or next(iter(given)) not in KINDS:
        raise UserError(f"space: {key} = {dict(given)!r} is not understood: give one of {', '.join(KINDS)}")
    kind, values = next(iter(given.items()))
    if key == VARIANT and (kind not in ("choice", "grid") or not all(isinstance(value, dict) for value in values)):
        raise UserError(f"space: {key}.{kind} = {values!r} is not allowed: give a grid or choice of mappings of keys")
    if not isinstance(values, list) or not values:
        allowed = "give a list"
    elif kind in ("choice", "grid"):
        if len({_as_yaml(value) for value in values}) == len(values):
            return Range(key, kind, tuple(values))
        allowed = "each value once"
    else:
        ends, allowed = _ends(kind, values)
        if ends:
            return Range(key, kind, ends)
    raise UserError(f"space: {key}.{kind} = {values!r} is not allowed: {allowed}")


def _with_absolute_paths(item: Range, base: Config) -> Range:
    """The choices as a configuration reads them: a trial runs in Ray's own folder."""
    section, _, name = item.key.partition(".")
    changed = [
        getattr(getattr(with_overrides(base, [f"{item.key}={_as_yaml(value)}"]), section), name)
        if isinstance(value, str)
        else value
        for value in item.values
    ]
    return replace(item, values=tuple(changed))


def _ends(kind: str, values: Sequence[Any]) -> tuple[tuple[Any, ...], str]:
    """Lowest and highest value, or none and what is allowed."""
    integers = kind in ("int", "log_int")
    numbers = [_number(value) for value in values]
    if len(numbers) != 2 or not all(type(n) is int or (type(n) is float and not integers) for n in numbers):
        return (), f"give two {'whole numbers' if integers else 'numbers'}, lowest and highest"
    low, high = numbers
    positive = kind.startswith("log")
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not positive)):
        return (), "the lower end comes first" + (", both above 0" if positive else "")
    return (low, high), ""


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check(sweep: Sweep) -> None:
    """Constraints between keys, and every value of the space against the configuration."""
    from ray_ctrl.preflight import plan_layout

    file, space = sweep.file, sweep.space
    if not space:
        raise UserError("space: is empty: name at least one key to search")
    grids = [item.key for item in space if item.kind == "grid"]
    if file.search == "grid" and len(grids) != len(space):
        other = next(item for item in space if item.kind != "grid")
        raise UserError(f"search: grid takes grids alone, but {other.key} is a {other.kind}: write {{grid: [...]}}")
    if file.search == "bayesian" and grids:
        raise UserError(f"search: bayesian takes no grid, but {grids[0]} is one: write {{choice: [...]}}")
    if file.search != "grid" and file.trials is None:
        raise UserError(f"trials: is missing: search {file.search} needs a number")
    if file.search == "grid" and file.trials not in (None, sweep.trials):
        raise UserError(f"trials: {file.trials} is not the size of the grid, {sweep.trials}: leave it out")
    if not sweep.base.evaluation.every:
        raise UserError("evaluation.every = 0 is not allowed in a sweep: trials are ranked by validation")
    for chosen in sweep.samples():
        plan_layout(sweep.config(chosen))


def _as_yaml(value: Any) -> str:
    """A value as one line of YAML, read back as it was."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, list(SweepFile.model_fields), n=1, cutoff=0.5)
        hint = f"the nearest valid key is {near[0]!r}" if near else f"keys are {', '.join(SweepFile.model_fields)}"
        return f"unknown sweep key {path!r}: {hint}"
    if problem["type"] == "missing":
        return f"sweep key {path!r} is missing"
    return f"sweep: {problem_text(path, problem)}"
