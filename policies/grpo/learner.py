"""The learner: RLlib's torch learner with the GRPO loss. Nothing is drawn here: the driver cuts the minibatches."""

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.rllib.core import COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import Tensor

from envs.errors import UserError
from policies.grpo.checkpoint import state_checksum
from policies.grpo.decisions import CREDITS, ENTROPY_SHARES, WEIGHTS
from policies.grpo.objective import LossInputs, grpo_loss
from policies.grpo.rl_module import REFERENCE_LOGITS, ControllerModule
from policies.grpo.rllib_adapter import cause_of, force_next_weights, kill_learners


class LearnerDied(UserError):
    """A learner's process is gone, and with it the weights since the last checkpoint."""


@contextmanager
def learner_errors(iteration: int) -> Iterator[None]:
    """Say that a learner died: deaths of runners never come this far.

    Raises:
        LearnerDied: with the cause of death.
    """
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise LearnerDied(
            f"a learner died in iteration {iteration}: {cause_of(error)}; resume from the last checkpoint"
        ) from error


@contextmanager
def kill_on_timeout(group: LearnerGroup, timeout_s: float) -> Iterator[None]:
    """Kill learners that give no answer within the timeout: RLlib would wait indefinitely.

    Raises:
        LearnerDied: they did not, and are gone.
    """
    expired = threading.Event()

    def end() -> None:
        expired.set()
        kill_learners(group)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    if not group.is_local:
        timer.start()
    try:
        yield
    except ray.exceptions.RayActorError as error:
        if not expired.is_set():
            raise
        raise LearnerDied(
            f"a learner gave no answer within {timeout_s:g} s and was killed; resume from the last checkpoint"
        ) from error
    finally:
        timer.cancel()


class GRPOLearner(TorchLearner):
    """One Adam over the controller; the frozen reference is left out.

    Attributes:
        failed_write: why its part of the last checkpoint could not be written; None where it was.
    """

    failed_write: str | None = None
    _begun: Mapping[str, Any] | None = None

    def get_parameters(self, module: Any) -> Sequence[torch.nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: Mapping[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> Tensor:
        inputs = LossInputs(
            old_logits=batch[Columns.ACTION_DIST_INPUTS],
            credits=batch[CREDITS],
            weights=batch[WEIGHTS],
            reference_logits=fwd_out.get(REFERENCE_LOGITS),
            entropy_shares=batch[ENTROPY_SHARES],
        )
        loss, metrics = grpo_loss(fwd_out[Columns.ACTION_DIST_INPUTS], inputs, config.grpo)
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

    def remember(self) -> None:
        """Keep a copy of the weights, the reference and the optimizer's state, for `roll_back`."""
        self._begun = copy.deepcopy(self.get_state(components=[COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER]))

    def roll_back(self) -> None:
        """Return to the state of the last `remember`; losses logged since are thrown away."""
        if self._begun is not None:
            self.set_state(self._begun)
        self.metrics.reduce()

    def set_state(self, state: Mapping[str, Any]) -> None:
        force_next_weights(self)  # a restore means exactly these weights, older or not
        super().set_state(state)
        if isinstance(self.config.lr, float):
            # The configuration decides: population based training restores another trial's state with a new rate.
            for _, optimizer in self.get_optimizers_for_module():
                for group in optimizer.param_groups:
                    group["lr"] = self.config.lr

    def save_to_path(self, *args: Any, **kwargs: Any) -> str:
        # RLlib never looks at what came of this in another process: kept for `checkpoint.check_written`.
        self.failed_write = None
        try:
            return str(super().save_to_path(*args, **kwargs))
        except Exception as error:
            self.failed_write = f"{type(error).__name__}: {error}"
            raise

    def state_checksum(self) -> str:
        """Checksum of the weights, the reference and the optimizer's state."""
        return state_checksum(self.get_state(components=[COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER]))
