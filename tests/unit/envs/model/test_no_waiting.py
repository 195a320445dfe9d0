"""Prefill and decoding never wait for the device: no number is read back, and indices travel in one copy.

Run on `meta` tensors, which stand for a device here: reading one back is an error there, and every other way from host
to device is counted.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE
from envs.model.decode import DecodeBatch
from envs.model.device_indices import DeviceIndices

GOLDEN = Path(__file__).parents[3] / "golden"
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "repeat_interleave")


class Crossings(TorchDispatchMode):
    """Counts operators that wait for the device, and copies from host to device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        found = func(*args, **(kwargs or {}))
        if name in WAITING:
            self.seen[name] += 1
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen["nonzero"] += 1
        if name in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            self.seen["copies"] += found.device != source.device
        return found


@pytest.fixture(scope="module")
def language():
    model = AdaptiveMolmoE.from_pretrained(GOLDEN).to(torch.bfloat16).to("meta")
    # The first call makes the rotary table, which is kept.
    model.language.rope(400)
    return model.language


def crossings(call):
    """What `call` returns, and what it sent or waited for. `torch.tensor(numbers, device=...)` shows in no operator."""
    make, mode = torch.tensor, Crossings()

    def counted(*args, device=None, **kwargs):
        mode.seen["torch.tensor"] += device is not None and torch.device(device).type != "cpu"
        return make(*args, device=device, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), mode:
        patch.setattr(torch, "tensor", counted)
        found = call()
    return found, +mode.seen


KEPT = (tuple(range(16)), (0, 1, 2, 5, 6), (0, 1, 2, 3, 4, 5, 9, 15))
TOP_K = [ExecutionPlan("low", 1 + i % 3, 4 + i, KEPT[i % 3]).top_k_per_block for i in range(5)]


def prefill(language, lengths=(40, 31), prompts=(0, 0, 0, 1, 1)):
    x = torch.empty(len(lengths), max(lengths), language.config.d_model, dtype=torch.bfloat16, device="meta")
    return language.prefill(x, lengths, prompts, TOP_K)


def test_the_count_sees_each_kind():
    x = torch.zeros(3)
    calls = (
        lambda: torch.tensor([1, 2], device="meta"),
        lambda: x.to("meta"),
        lambda: x[x > 0],
        lambda: float(x.sum()),
    )
    kinds = ("torch.tensor", "copies", "nonzero", "_local_scalar_dense")
    assert [crossings(call)[1] for call in calls] == [{kind: 1} for kind in kinds]


@pytest.mark.parametrize("lengths", [(40, 31), (40, 40)])
def test_a_prefill_sends_one_buffer_and_reads_nothing(language, lengths):
    done, seen = crossings(lambda: prefill(language, lengths))
    assert done.last.shape == (5, language.config.d_model)
    assert seen == {"copies": 1}


def test_prefill_from_a_kept_prefix_sends_one_buffer(language):
    x = torch.empty(2, 40, language.config.d_model, dtype=torch.bfloat16, device="meta")
    prefix = language.run_prefix(x, [40, 31])
    _, seen = crossings(lambda: language.prefill(None, [40, 31], (0, 0, 0, 1, 1), TOP_K, prefix=prefix))
    assert seen == {"copies": 1}


@pytest.mark.parametrize("lengths", [(40, 31), (40, 40)])
def test_a_step_sends_one_buffer_and_reads_nothing(language, lengths):
    batch, seen = crossings(lambda: DecodeBatch(language, [(prefill(language, lengths), range(5))]))
    # Prefill, gathering caches, and what stays the same from step to step.
    assert seen == {"copies": 3}
    for _ in range(20):
        logits, seen = crossings(lambda: batch.step([1, 2, 3, 4, 5]))
        assert seen == {"copies": 1}
    assert logits.shape == (5, language.config.embedding_size)
    _, seen = crossings(lambda: batch.keep([0, 2, 4]))
    assert seen == {"copies": 2}
    _, seen = crossings(lambda: batch.step([1, 2, 3]))
    assert seen == {"copies": 1}


def test_index_lists_come_back_as_given():
    indices = DeviceIndices(torch.device("cpu"))
    lists = [[3, 1], [], [7], list(range(9))]
    handles = [indices.add(numbers) for numbers in lists]
    indices.send()
    assert [indices[handle].tolist() for handle in handles] == lists
