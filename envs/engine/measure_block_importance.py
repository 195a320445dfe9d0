"""Measuring block importance on any samples, by leaving one block out at a time.

Letters: N samples, P plans (the full one, then one without each of blocks 1 to 15), T prompt and answer tokens,
A answer tokens, D model width.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from envs.data.sample import Sample
from envs.engine.engine import RolloutEngine
from envs.errors import UserError
from envs.knobs import MODEL_BLOCKS, ExecutionPlan
from envs.model.block_importance import MEASURES, Importance

Progress = Callable[[int, int], None]
Array = npt.NDArray[np.float64]
_LEAST: Final = 0.01
"""Smallest rise that block 0's score is twice of, where no block matters."""


def measure_importance(
    engine: RolloutEngine,
    samples: Sequence[Sample],
    by: str = "cross_entropy",
    tier: str = "high",
    progress: Progress | None = None,
) -> Importance:
    """Scores of the 16 blocks on these samples.

    By `cross_entropy` a score is how much the mean cross entropy of the reference answer rises when the block alone is
    left out; by `accuracy`, how much the mean accuracy of greedy answers falls. The first needs no decoding and ranks
    blocks with less noise at the same number of samples; the second is what a user sees.

    Args:
        samples: with accepted answers.
        tier: the image tier they are asked at.
        progress: called with samples done and all of them.

    Raises:
        UserError: an unknown measure or tier, fewer than two samples, or a sample without answers.
    """
    if by not in MEASURES:
        raise UserError(f"importance by {by!r} is not known: choose one of {', '.join(MEASURES)}")
    if len(samples) < 2:
        raise UserError(f"{len(samples)} samples are too few to measure importance: give at least 2")
    without = [sample.id for sample in samples if not sample.answers]
    if without:
        raise UserError(f"sample {without[0]} has no accepted answer: importance needs answers to compare with")
    plans = leave_one_out(tier)
    rows = []
    for done, sample in enumerate(samples, 1):
        rows.append(_cross_entropy(engine, sample, plans) if by == "cross_entropy" else _errors(engine, sample, plans))
        if progress is not None:
            progress(done, len(samples))
    losses_NP = np.array(rows, dtype=np.float64)
    rises_NP = losses_NP[:, 1:] - losses_NP[:, :1]
    rises, errors = rises_NP.mean(0), rises_NP.std(0, ddof=1) / np.sqrt(len(samples))
    full = float(losses_NP[:, 0].mean())
    return Importance(
        scores=(2 * max(float(rises.max()), _LEAST), *map(float, rises)),
        errors=(0.0, *map(float, errors)),
        by=by,
        full=full if by == "cross_entropy" else 1 - full,
        samples=len(samples),
        tier=tier,
    )


def leave_one_out(tier: str = "high") -> list[ExecutionPlan]:
    """The full plan, then for each of blocks 1 to 15 the plan without it."""
    everything = tuple(range(MODEL_BLOCKS))
    kept = [everything, *(everything[:block] + everything[block + 1 :] for block in everything[1:])]
    return [ExecutionPlan(tier, blocks=blocks) for blocks in kept]


def reference_answer(sample: Sample) -> str:
    """The answer that most annotators gave, the first of them where several are as frequent."""
    return Counter(sample.answers).most_common(1)[0][0]


@torch.inference_mode()
def _cross_entropy(engine: RolloutEngine, sample: Sample, plans: Sequence[ExecutionPlan]) -> list[float]:
    """Mean cross entropy of the reference answer's tokens and of the end of text after them, nats, under each plan."""
    model, processor = engine.model, engine.processor
    prompt = engine.prompts.prompt(sample, plans[0].tier)
    ids_A = torch.tensor([*processor.encode(f" {reference_answer(sample)}"), processor.eos_id], device=model.device)
    # The last answer token is predicted, never read.
    x_TD = torch.cat((engine.prompts.embed([prompt])[0], model.language.embed(ids_A[:-1])))
    losses: list[float] = []
    rows = max(1, engine.memory.batch_tokens // len(x_TD))
    for start in range(0, len(plans), rows):
        some = plans[start : start + rows]
        hidden = model.language(x_TD.expand(len(some), -1, -1).contiguous(), plans=some, experts=model.experts)
        logits = model.language.logits(hidden[:, -len(ids_A) :]).float()
        found = F.cross_entropy(logits.flatten(0, 1), ids_A.repeat(len(some)), reduction="none")
        losses += found.view(len(some), -1).mean(1).tolist()
    return losses


def _errors(engine: RolloutEngine, sample: Sample, plans: Sequence[ExecutionPlan]) -> list[float]:
    """1 - accuracy of the greedy answer under each plan."""
    outcomes = engine.outcomes([sample] * len(plans), plans)
    return [1.0 - engine.accuracy(sample, outcome) for outcome in outcomes]
