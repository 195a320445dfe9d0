"""The controller as RLlib modules: for GRPO (with a frozen reference if asked), for PPO (with a value head)."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchDistribution
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from policies.baselines import Baseline
from policies.controller import Controller
from policies.distribution import LOGITS_WIDTH, KnobDistribution
from policies.grpo.config import ControllerSettings
from policies.networks import BUDGET_WIDTH, Projections, budget_feature

REFERENCE_LOGITS = "reference_logits"
BLOCK: Final = 64
"""Rows of one forward pass without gradients: matrix products round differently for other numbers of rows."""


class KnobActions(TorchDistribution):
    """`KnobDistribution` as RLlib's connectors, PPO and offline algorithms take it."""

    def __init__(self, logits: Tensor, best: bool = False) -> None:
        self.policy, self.best = KnobDistribution(logits), best
        super().__init__()

    def _get_torch_distribution(self, *args: Any, **kwargs: Any) -> None:
        return None

    @staticmethod
    def required_input_dim(space: Any, **kwargs: Any) -> int:
        return LOGITS_WIDTH

    @classmethod
    def from_logits(cls, logits: Tensor, **kwargs: Any) -> "KnobActions":
        return cls(logits)

    def sample(self, *, sample_shape: Any = None, **kwargs: Any) -> Tensor:
        return self.policy.argmax() if self.best else self.policy.sample()

    def rsample(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("choices are discrete: they have no reparameterized samples")

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:
        return self.policy.log_prob(value)

    def entropy(self) -> Tensor:
        return self.policy.entropy()

    def kl(self, other: "KnobActions", **kwargs: Any) -> Tensor:
        return self.policy.kl(other.policy)

    def to_deterministic(self) -> "KnobActions":
        return KnobActions(self.policy.logits, best=True)


class ControllerModule(TorchRLModule, InferenceOnlyAPI):
    """Acts by the controller's masked logits.

    model_config: `hidden` (width of the MLPs), `without` (parts left out), `reference` (keep a frozen copy for the KL,
    off the env runners).
    """

    controller: Controller

    def setup(self) -> None:
        super().setup()
        config = dict(self.model_config or {})
        d_model = int(self.observation_space["language_feature"].shape[0])
        hidden = int(config.get("hidden", ControllerSettings().hidden))
        self.controller = Controller(d_model, hidden, config.get("without"))
        self.reference: Controller | None = None
        if config.get("reference") and not self.inference_only:
            self.reference = Controller(d_model, hidden, self.controller.without)
            self.refresh_reference()
        self.action_dist_cls = KnobActions

    def refresh_reference(self) -> None:
        """Make the reference a frozen copy of the controller as it is now."""
        if self.reference is not None:
            self.reference.load_state_dict(self.controller.state_dict())
            self.reference.requires_grad_(False)

    def get_non_inference_attributes(self) -> list[str]:
        return ["reference"]

    def _forward(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.controller(batch[Columns.OBS])}

    def _forward_inference(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """In passes of `BLOCK` rows each, so that no row depends on how many others there are.

        If all rows are of one stage, only its network runs.
        """
        obs = batch[Columns.OBS]
        first, last = (int(value) for value in obs["stage"].aminmax())
        stage = first if first == last else None
        rows = len(next(iter(obs.values())))
        if padding := -rows % BLOCK:
            obs = {key: torch.cat((value, value[:1].expand(padding, *value.shape[1:]))) for key, value in obs.items()}
        passes = zip(*(value.split(BLOCK) for value in obs.values()), strict=True)
        with torch.no_grad():
            parts = [self.controller(dict(zip(obs, values, strict=True)), stage) for values in passes]
        return {Columns.ACTION_DIST_INPUTS: torch.cat(parts)[:rows]}

    _forward_exploration = _forward_inference

    def _forward_train(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        outputs = self._forward(batch)
        if self.reference is not None:
            with torch.no_grad():
                outputs[REFERENCE_LOGITS] = self.reference(batch[Columns.OBS])
        return outputs


class ControllerWithValue(ControllerModule, ValueFunctionAPI):
    """The same controller with a value head of its own, so that RLlib's PPO can train it."""

    def setup(self) -> None:
        super().setup()
        d_model, hidden = self.controller.d_model, self.controller.hidden
        self.value_trunk = Projections((d_model, d_model, BUDGET_WIDTH), hidden)
        self.value_head = nn.Linear(hidden, 1)

    def get_non_inference_attributes(self) -> list[str]:
        return [*super().get_non_inference_attributes(), "value_trunk", "value_head"]

    def compute_values(self, batch: Mapping[str, Any], embeddings: Any = None) -> Tensor:
        """Expected return (B,) from the observation of either stage."""
        obs = batch[Columns.OBS]
        feature = budget_feature(obs["budget"])
        hidden = self.value_trunk(obs["language_feature"], obs["latency_token"], feature)
        values: Tensor = self.value_head(hidden)[:, 0]
        return values


class BaselineModule(TorchRLModule):
    """Stands in for the controller during evaluation and acts by a plain function of the observation."""

    def __init__(self, baseline: Baseline, seed: tuple[int, ...], like: ControllerModule) -> None:
        super().__init__(
            observation_space=like.observation_space,
            action_space=like.action_space,
            inference_only=True,
            model_config={},
        )
        self._act = baseline.start(seed)

    def setup(self) -> None:
        pass

    def _forward(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        obs = {key: value.numpy(force=True) for key, value in batch[Columns.OBS].items()}
        return {Columns.ACTIONS: torch.as_tensor(self._act(obs))}
