"""Prefill and decoding never wait for the device: no number is read back, and indices travel in one copy.

Run on `meta` tensors, which stand for a device here: reading one back is an error there, and every other way from host
to device is counted.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE
from envs.model.decode import DecodeBatch
from envs.model.device_indices import DeviceIndices
from tests.unit.model.conftest import GOLDEN

WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique")


class Crossings(TorchDispatchMode):
    """Counts operators that wait for the device, and copies from host to device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.seen[name] += 1
        source = next((a for a in args if isinstance(a, torch.Tensor)), None)
        found = func(*args, **kwargs)
        if name == "copy_" and args[0].device != args[1].device:
            self.seen["copies"] += 1
        if name == "_to_copy" and source is not None and found.device != source.device:
            self.seen["copies"] += 1
        # `torch.tensor(numbers, device=...)` ends in this operator, wherever the tensor lies.
        if name == "lift_fresh" and found.device.type != "cpu":
            self.seen["torch.tensor"] += 1
        return found


@pytest.fixture(scope="module")
def language():
    model = AdaptiveMolmoE.from_pretrained(GOLDEN).to(torch.bfloat16).to("meta")
    # The first call makes the rotary table, which is kept.
    model.language.rope(400)
    return model.language


def crossings(call):
    with torch.inference_mode(), Crossings() as mode:
        found = call()
    return found, mode.seen


KEPT = (tuple(range(16)), (0, 1, 2, 5, 6), (0, 1, 2, 3, 4, 5, 9, 15))
TOP_K = [ExecutionPlan("low", 1 + i % 3, 4 + i, KEPT[i % 3]).top_k_per_block for i in range(5)]


def prefill(language, lengths=(40, 31), prompts=(0, 0, 0, 1, 1)):
    x = torch.empty(len(lengths), max(lengths), language.config.d_model, dtype=torch.bfloat16, device="meta")
    return language.prefill(x, lengths, prompts, TOP_K)


def test_the_count_sees_each_kind():
    x = torch.zeros(3)
    _, seen = crossings(lambda: (torch.tensor([1, 2], device="meta"), x.to("meta"), x[x > 0], float(x.sum())))
    assert seen["torch.tensor"] == 1
    assert seen["nonzero"] + seen["_local_scalar_dense"] == 2
    assert seen["copies"] >= 1


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
