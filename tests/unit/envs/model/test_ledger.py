"""No stage of the full-size model grows unnoticed, counted on `meta`; and the script for a GPU runs without one."""

import json

import pytest
import torch

from benchmarks import gpu
from benchmarks.ledger import Ledger, count, full_model, stages


@pytest.fixture(scope="module")
def found():
    return {name: count(call) for name, call in stages(full_model()).items()}


@pytest.mark.parametrize(
    ("stage", "elementwise_gb", "kernels"),
    [
        ("vision 4 views", 2.2, 260),
        ("vision 13 views", 7.2, 260),
        ("prefill 600 12/4", 1.0, 190),
        ("prefill 1500 16/8", 4.8, 250),
        ("prefill 2000 16/8", 6.4, 250),
    ],
)
def test_stages_stay_within_their_limits(found, stage, elementwise_gb, kernels):
    ledger = found[stage]
    assert ledger.elementwise_bytes <= elementwise_gb * 1e9
    assert ledger.kernels <= kernels
    # A prefill sends its index lists in one copy.
    assert (ledger.copies, ledger.syncs) == (stage.startswith("prefill"), 0), ledger.by_op


def test_operations_are_those_of_the_formula(found):
    """Experts, projections and attention of 16 blocks over 2,000 tokens; the last block works on one token."""
    d, hidden, tokens = 2048, 1024, 2000
    block = 8 * d * d + 8 * 6 * d * hidden + 2 * d * 64 + 2 * tokens * d
    wanted = 15 * tokens * block + tokens * 4 * d * d
    assert found["prefill 2000 16/8"].flops == pytest.approx(wanted, rel=0.01)


def test_what_waits_for_the_device_is_counted():
    with Ledger() as ledger:
        x = torch.tensor([1.0, 2.0], device="meta")
        x.sum().item()
        y = x.view(2, 1) + 1
        y.cpu()
    assert ledger.copies == 2
    assert ledger.syncs == 3
    assert ledger.kernels == 2


def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    assert (
        gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "kernels,prefill,request,syncs"]) == 0
    )
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["request"]["600 12/4"]["new_tokens"] > 0
    assert results["kernels"]["combine"]["error"] < 1e-6
