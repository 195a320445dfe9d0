"""What an environment needs of an engine, and what an env runner needs of an environment."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from envs.data.sample import Sample
    from envs.knobs import ExecutionPlan
    from envs.latency.record import LatencyRecord, RequestShape


class Engine(Protocol):
    """Runs requests on the frozen model; `envs.engine.RolloutEngine` documents the methods.

    Features (B, D) and latency tokens (B, 5, D), one per insertion position, are float32 on the CPU. Outcomes belong to
    the engine; the environment reads their `n_tokens` alone.

    Attributes:
        model: the frozen model, with `config` and `fingerprint`.
        importance: 16 scores, one per block.
    """

    model: Any
    importance: tuple[float, ...]

    def __hash__(self) -> int: ...
    def tiling(self, sample: "Sample", tier: str) -> tuple[int, int] | None: ...
    def shape(self, sample: "Sample", tier: str) -> "RequestShape": ...
    def language_features(self, samples: "Sequence[Sample]") -> "Tensor": ...
    def latency_tokens(self, samples: "Sequence[Sample]", tiers: Sequence[str], levels: Sequence[int]) -> "Tensor": ...
    def outcomes(self, samples: "Sequence[Sample]", plans: "Sequence[ExecutionPlan]") -> list[Any]: ...
    def text(self, outcome: Any) -> str: ...
    def accuracy(self, sample: "Sample", outcome: Any) -> float: ...
    def run_measured(
        self, sample: "Sample", plan: "ExecutionPlan", controller: Any = None
    ) -> "tuple[Any, LatencyRecord]": ...
    def stats(self) -> Mapping[str, float]: ...


class VectorEnvironment(Protocol):
    """What an env runner calls in addition to gymnasium's interface; `AdaptiveVQAVectorEnv` documents the methods.

    Attributes:
        num_envs: environments.
        group_size: environments per (sample, budget) context.
    """

    num_envs: int
    group_size: int

    @property
    def iterations(self) -> int | None: ...
    def set_worker(self, index: int, count: int) -> None: ...
    def set_iteration(self, iteration: int) -> None: ...
    def set_contexts(self, contexts: Sequence[Any] | None) -> None: ...
    def set_multipliers(self, values: "npt.ArrayLike | None") -> None: ...
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]: ...
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]: ...
    def stats(self) -> Mapping[str, float]: ...
