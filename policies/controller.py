"""The two-stage controller: observations in, masked knob logits out. Plain torch; exported as safetensors + JSON."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from envs.errors import UserError, first_line
from envs.files import atomic_folder
from envs.knobs import INSERTIONS, PAIRS, STAGE1_PAIRS
from policies.distribution import MASKED, KnobDistribution, mask_logits, pair_logits
from policies.networks import Stage1, Stage2, budget_feature

FORMAT_VERSION: Final = 1
WEIGHTS_FILE: Final = "controller.safetensors"
CARD_FILE: Final = "controller.json"
PARTS: Final = ("question", "token", "position")
CLOSED: Final = MASKED / 2
"""Logit of a pair that a controller without a choice of position never takes."""


class Controller(nn.Module):
    """Both stages behind one observation.

    Args:
        d_model: width of the model whose language features and latency tokens it reads.
        hidden: width of the MLPs.
        without: parts left out, to measure what they are worth: `question` (stage 1 does not read it), `token` (stage 2
            does not read it), `position` (always 1).
    """

    open_pairs: Tensor

    def __init__(self, d_model: int, hidden: int, without: Collection[str] | None = None) -> None:
        super().__init__()
        if d_model < 1 or hidden < 1:
            raise UserError(f"controller of d_model {d_model} and hidden {hidden} is not allowed: give positive widths")
        self.d_model = d_model
        self.hidden = hidden
        self.stage1 = Stage1(d_model, hidden)
        self.stage2 = Stage2(d_model, hidden)
        self.without = frozenset(without or ())
        if not self.without <= set(PARTS):
            raise UserError(f"parts {sorted(self.without)} cannot be left out: choose from {', '.join(PARTS)}")
        positions = torch.arange(STAGE1_PAIRS) % len(INSERTIONS)
        self.register_buffer("open_pairs", (positions == 0) | ("position" not in self.without), persistent=False)

    def forward(self, obs: Mapping[str, Tensor], stage: int | None = None) -> Tensor:
        """Masked logits (B, 40) of the 15 (tier, insertion) pairs, then the 25 (top-k, blocks) pairs.

        Args:
            obs: budget (B, 1), language_feature (B, D), latency_token (B, D), insertion (B, 1), action_mask (B, 40).
                Rows of both stages may be mixed: the mask alone decides which stage counts.
            stage: 0 or 1 if all rows are of that stage: the other one's network does not run, and its one legal pair
                has logit 0.
        """
        feature, mask = budget_feature(obs["budget"]), obs["action_mask"]
        first = second = feature.new_zeros(1, 1)
        if stage != 1:
            first = self._first(obs["language_feature"], feature)
        if stage != 0:
            second = self._second(obs["latency_token"], feature, obs["insertion"][:, 0].round())
        parts = (first.expand(len(mask), STAGE1_PAIRS), second.expand(len(mask), PAIRS - STAGE1_PAIRS))
        return mask_logits(torch.cat(parts, dim=-1), mask)

    def _first(self, language_feature: Tensor, feature: Tensor) -> Tensor:
        """Logits (B, 15) of stage 1; a closed pair stays above an illegal one."""
        read = language_feature.float() * ("question" not in self.without)
        logits = pair_logits(*self.stage1(read, feature).values())
        return logits if "position" not in self.without else torch.where(self.open_pairs, logits, CLOSED)

    def _second(self, latency_token: Tensor, feature: Tensor, insertion: Tensor) -> Tensor:
        """Logits (B, 25) of stage 2."""
        read = latency_token.float() * ("token" not in self.without)
        return pair_logits(*self.stage2(read, feature, insertion).values())

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Most likely legal action (B, 4) int64, one index per head."""
        return KnobDistribution(self(obs)).argmax()

    def save(self, folder: str | os.PathLike[str], metadata: Mapping[str, Any], *, overwrite: bool = False) -> Path:
        """Export to `folder` as safetensors + JSON, which readers see completely or not at all.

        Args:
            metadata: JSON-able facts about the run; `fingerprint` names the model the controller was trained on.
            overwrite: replace an existing export.

        Raises:
            UserError: the folder exists (without `overwrite`) or cannot be written.
        """
        target = Path(folder)
        if target.exists() and not overwrite:
            raise UserError(f"controller folder {target} exists already: choose another or remove it first")
        weights = save_tensors({name: tensor.contiguous() for name, tensor in self.state_dict().items()})
        card = {
            "format_version": FORMAT_VERSION,
            "d_model": self.d_model,
            "hidden": self.hidden,
            "without": sorted(self.without),
            "sha256": hashlib.sha256(weights).hexdigest(),
            "metadata": dict(metadata),
        }
        try:
            with atomic_folder(target) as temporary:
                (temporary / WEIGHTS_FILE).write_bytes(weights)
                (temporary / CARD_FILE).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise UserError(f"controller could not be written to {target}: {error.strerror or error}") from error
        return target

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, d_model: int | None = None, fingerprint: str | None = None
    ) -> tuple["Controller", dict[str, Any]]:
        """Read an export.

        Args:
            d_model: width of the model it is used with, checked if given.
            fingerprint: fingerprint of that model, checked if given and recorded.

        Returns:
            The controller in eval mode, and the metadata given to `save`.

        Raises:
            UserError: missing, truncated, corrupt or foreign files, or a controller for another model.
        """
        source = Path(folder)
        card = _read_card(source)
        weights = _read(source / WEIGHTS_FILE)
        if hashlib.sha256(weights).hexdigest() != card["sha256"]:
            raise UserError(
                f"{source / WEIGHTS_FILE} is corrupt: its {len(weights)} bytes do not match the checksum in "
                f"{CARD_FILE}; export the controller again"
            )
        if d_model is not None and card["d_model"] != d_model:
            raise UserError(
                f"controller {source} is for a model of width {card['d_model']}, not {d_model}: "
                "use the model it was trained on"
            )
        recorded = card["metadata"].get("fingerprint")
        if fingerprint is not None and recorded is not None and recorded != fingerprint:
            raise UserError(
                f"controller {source} was trained on another model (fingerprint {str(recorded)[:12]}, "
                f"this one is {fingerprint[:12]}): use the model it was trained on"
            )
        controller = cls(card["d_model"], card["hidden"], card.get("without"))
        try:
            controller.load_state_dict(load_tensors(weights))
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise UserError(f"{source / WEIGHTS_FILE} does not contain this controller: {first_line(error)}") from error
        return controller.eval(), card["metadata"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): give a folder written by a training run's export"
        ) from error


def _read_card(source: Path) -> dict[str, Any]:
    """The checked JSON card of an export."""
    path = source / CARD_FILE
    try:
        card = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): export the controller again") from error
    if not isinstance(card, dict) or card.get("format_version") != FORMAT_VERSION:
        version = card.get("format_version") if isinstance(card, dict) else None
        raise UserError(f"{path} has format version {version!r}: this version reads {FORMAT_VERSION}")
    wanted = {"d_model": int, "hidden": int, "sha256": str, "metadata": dict}
    for key, kind in wanted.items():
        if not isinstance(card.get(key), kind) or (kind is int and not 0 < card[key] <= 1 << 20):
            raise UserError(f"{path} has {key} = {card.get(key)!r}: expected {kind.__name__}; export again")
    return card
