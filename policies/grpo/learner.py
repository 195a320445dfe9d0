"""The learner: RLlib's torch learner with the GRPO loss. Nothing is drawn here: the driver cuts the minibatches."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import torch
from ray.rllib.core import COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import Tensor

from envs.errors import UserError
from policies.grpo.digests import digest
from policies.grpo.losses import LossInputs, LossSettings, grpo_loss
from policies.grpo.rl_module import REFERENCE_LOGITS, ControllerModule

WEIGHTS = "row_weights"
ENTROPY_SHARES = "entropy_shares"
T = TypeVar("T")


class LearnerDied(UserError):
    """A learner's process is gone, and with it the weights since the last checkpoint."""


@contextmanager
def learner_errors(round_number: int) -> Iterator[None]:
    """Say that a learner died: deaths of runners never come this far.

    Raises:
        LearnerDied: with the cause of death.
    """
    try:
        yield
    except ray.exceptions.RayActorError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = next(
            (line for line in reversed(lines) if "exit" in line or "dead" in line), lines[-1] if lines else "?"
        )
        raise LearnerDied(
            f"a learner died in round {round_number}: {cause.split(' Some common causes')[0]}; resume from the last "
            "checkpoint"
        ) from error


@contextmanager
def answering(group: LearnerGroup, timeout_s: float) -> Iterator[None]:
    """End learners that give no answer in time: RLlib would wait for ever.

    Raises:
        LearnerDied: they did not, and are gone.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        for actor in group._worker_manager.actors().values():
            ray.kill(actor)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    if not group.is_local:
        timer.start()
    try:
        yield
    except ray.exceptions.RayActorError as error:
        if not late.is_set():
            raise
        raise LearnerDied(
            f"a learner gave no answer within {timeout_s:g} s and was killed; resume from the last checkpoint"
        ) from error
    finally:
        timer.cancel()


def each_learner(group: LearnerGroup, ask: Callable[[Any], T]) -> list[T]:
    """What every learner answers; RLlib alone would pass over those that died, or that failed at something before."""
    answers = []
    for answer in group.foreach_learner(ask, healthy_only=False, mark_healthy=True):
        if not answer.ok:
            raise answer.get()
        answers.append(answer.get())
    return answers


class GRPOLearner(TorchLearner):
    """One Adam over the controller; the frozen reference is left out.

    Attributes:
        failed_write: why its part of the last checkpoint could not be written; None where it was.
    """

    failed_write: str | None = None

    def get_parameters(self, module: Any) -> Sequence[torch.nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: Mapping[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> Tensor:
        inputs = LossInputs(
            old_logits=batch[Columns.ACTION_DIST_INPUTS],
            actions=batch[Columns.ACTIONS],
            old_log_prob=batch[Columns.ACTION_LOGP],
            advantages=batch[Columns.ADVANTAGES],
            weights=batch[WEIGHTS],
            reference_logits=fwd_out.get(REFERENCE_LOGITS),
            entropy_shares=batch[ENTROPY_SHARES],
        )
        settings = LossSettings(
            config.clip_low,
            config.clip_high,
            config.kl_coeff,
            config.entropy_coeff,
            ratio_max=config.ratio_max if config.max_staleness else math.inf,
        )
        loss, metrics = grpo_loss(fwd_out[Columns.ACTION_DIST_INPUTS], inputs, settings)
        for name, value in metrics.items():
            self.metrics.log_value((module_id, name), value.item(), reduce="mean")
        return loss

    def postprocess_gradients(self, gradients_dict: dict[Any, Tensor]) -> Any:
        norms = [gradient.norm() for gradient in gradients_dict.values() if gradient is not None]
        norm = torch.stack(norms).norm().item() if norms else 0.0
        for module_id in self.module.keys():  # noqa: SIM118 (a MultiRLModule, not a dict)
            self.metrics.log_value((module_id, "grad_norm"), norm, reduce="mean")
        return super().postprocess_gradients(gradients_dict)

    def refresh_reference(self) -> None:
        """Copy the controller into its frozen reference."""
        for module in self.module.values():
            plain = module.unwrapped()
            if isinstance(plain, ControllerModule):
                plain.refresh_reference()

    def set_state(self, state: Mapping[str, Any]) -> None:
        # RLlib skips weights older than its own; a restore means exactly these weights, older or not.
        self._weights_seq_no = 0
        super().set_state(state)

    def save_to_path(self, *args: Any, **kwargs: Any) -> str:
        # RLlib never looks at what came of this in another process: kept for `checkpoint.check_written`.
        self.failed_write = None
        try:
            return str(super().save_to_path(*args, **kwargs))
        except Exception as error:
            self.failed_write = f"{type(error).__name__}: {error}"
            raise

    def held(self) -> str:
        """Checksum of the weights, the reference and the optimizer's state."""
        return digest(self.get_state(components=[COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER]))
