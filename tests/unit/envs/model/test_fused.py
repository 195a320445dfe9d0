"""Fused operators: Triton's kernels in its interpreter against float64, and compiled for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.model import fused

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = st.sampled_from(list(LIMITS))
few = settings(max_examples=6, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def fresh_triton():
    """Triton decides while it is imported whether its own library is interpreted, and torch may have imported it."""

    def written_in_it(name):
        return name.startswith(("triton", "envs.model.kernels")) and not name.startswith("triton._C")

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if written_in_it(name)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield
    for name in list(filter(written_in_it, sys.modules)):
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module", autouse=True)
def interpreter(fresh_triton):
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def repaired(tensor, scope):
        # Triton 3.6 turns arrays of one number into loop bounds in a way that numpy 2.4 refuses.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(self, a, b, *args):
        # Its numpy products take bfloat16 for the integers that contain it.
        return dot(self, *(_wide(operand, interpreter) for operand in (a, b)), *args)

    interpreter._patch_lang_tensor, builder.create_dot = repaired, widened
    yield
    interpreter._patch_lang_tensor, builder.create_dot = patch, dot


def _wide(operand, interpreter):
    import triton.language as tl

    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(scope="module")
def kernels(interpreter):
    from envs.model.kernels import prefill as prefill_kernels

    return prefill_kernels


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory contains NaN or a wild index, so that an element nobody wrote shows."""

    def poison(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 10**9)

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, **kwargs: poison(real(*args, **kwargs)))


def close(found, wanted, dtype):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    assert float(error) <= LIMITS[dtype], f"{dtype}: relative error {float(error):.2e}"


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([5, 8, 12]), st.booleans())
def test_route_and_sort(kernels, seed, n, experts, ragged):
    logits = (3 * randn(seed, n, experts)).float()
    most = min(5, experts)
    per_token = torch.randint(0, most + 1, (n,), generator=torch.Generator().manual_seed(seed)) if ragged else None
    weights, chosen = kernels.route(logits, most, per_token)
    wanted, expected = torch.ops.ray_ctrl.route(logits.double(), most, per_token)
    close(weights, wanted, torch.float32)
    assert torch.equal(chosen, expected)
    pairs = n * most if per_token is None else int(per_token.sum())
    for found, right in zip(
        kernels.sort_pairs(weights, chosen, experts, pairs),
        torch.ops.ray_ctrl.sort_pairs(weights, chosen, experts, pairs),
        strict=True,
    ):
        assert torch.equal(found, right)


def test_equal_logits_go_to_the_first_expert(kernels):
    assert kernels.route(torch.zeros(3, 12), 4, None)[1].tolist() == [[0, 1, 2, 3]] * 3


@few
@given(st.integers(0, 99), DTYPES, st.integers(0, 7), st.sampled_from([8, 24, 1024]), st.booleans())
def test_silu_mul(kernels, seed, dtype, pairs, hidden, shared):
    gate_up, shares = randn(seed, pairs, 2 * hidden).to(dtype), randn(seed + 1, pairs).float() if shared else None
    wanted = torch.nn.functional.silu(gate_up.double()[:, :hidden]) * gate_up.double()[:, hidden:]
    close(kernels.silu_mul(gate_up, shares), wanted if shares is None else wanted * shares.double()[:, None], dtype)


@few
@given(st.integers(0, 99), DTYPES, st.integers(1, 7), st.booleans())
def test_combine(kernels, seed, dtype, n, added):
    inverse = torch.randperm(3 * n, generator=torch.Generator().manual_seed(seed)).view(n, 3).int()
    inverse[inverse >= 2 * n] = -1
    pairs, residual = randn(seed, 2 * n, 24).to(dtype), randn(seed + 1, n, 24).to(dtype) if added else None
    wanted = (pairs.double()[inverse.clamp(min=0).long()] * (inverse >= 0).unsqueeze(-1)).sum(1)
    close(kernels.combine(pairs, inverse, residual), wanted if residual is None else wanted + residual.double(), dtype)


@few
@given(st.integers(0, 99), DTYPES, st.integers(1, 7), st.integers(1, 2), st.sampled_from([4, 8]))
def test_norm_rope(kernels, seed, dtype, n, parts, width):
    heads, positions = 2, max(1, n // 2)
    x = randn(seed, n, 3, 16 * width).to(dtype)[:, :parts]
    weight, angles = randn(seed + 1, parts, 16 * width).to(dtype), randn(seed + 2, positions, 8 * width // heads)
    rope = torch.stack((angles.cos(), angles.sin()), -1)
    found = kernels.norm_rope(x, weight, rope.float(), 1e-5)
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    turned = torch.view_as_complex(normed.view(n, parts, heads, -1, 2)) * torch.view_as_complex(
        rope[torch.arange(n) % positions]
    ).view(n, 1, 1, -1)
    close(found, torch.view_as_real(turned).reshape(x.shape), dtype)


@few
@given(st.integers(0, 99), DTYPES, st.sampled_from([1, 100, 5000]))
def test_quick_gelu(kernels, seed, dtype, n):
    x = (3 * randn(seed, n)).to(dtype)
    close(kernels.quick_gelu(x), x.double() * torch.sigmoid(1.702 * x.double()), dtype)


@few
@given(
    st.integers(0, 99),
    DTYPES,
    st.lists(st.sampled_from([0, 1, 15, 33]), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_grouped_mm(kernels, seed, dtype, counts, gather, turned):
    pairs, depth, width = sum(counts), 40, 72
    x = randn(seed, 30 if gather else pairs, depth).to(dtype)
    weight = randn(seed + 1, *((len(counts), width, depth) if turned else (len(counts), depth, width))).to(dtype)
    weight = weight.transpose(1, 2) if turned else weight
    rows = torch.randint(0, 30, (pairs,), generator=torch.Generator().manual_seed(seed)).int() if gather else None
    ends = torch.tensor(counts).cumsum(0).int()
    source = (x if rows is None else x[rows.long()]).double().split(counts)
    wanted = torch.cat([part @ matrix for part, matrix in zip(source, weight.double(), strict=True)])
    close(kernels.grouped_mm(x, weight, ends, rows, pairs), wanted, dtype)


_COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from envs.model.kernels import prefill as kernels
B, F, I = "*bf16", "*fp32", "*i32"
cases = [
    (kernels._route, dict(logits=F, per_token="*i64", weights=F, experts=I, E="i32"),
     dict(K=8, RAGGED=True, WIDTH=64), 1, 3),
    (kernels._sort_pairs, dict(weights=F, experts=I, tokens=I, shares=F, inverse=I, ends=I, n="i32", E="i32"),
     dict(K=8, BLOCK=4096), 8, 3),
    (kernels._silu_mul, dict(gate_up=B, shares=F, out=B, H="i32"), dict(SHARED=True, BLOCK=1024), 4, 3),
    (kernels._combine, dict(residual=B, pairs=B, inverse=I, out=B, D="i32"), dict(K=8, ADDED=True, BLOCK=1024), 4, 3),
    (kernels._norm_rope, dict(x=B, weight=B, rope=F, out=B, stride="i32", parts="i32", positions="i32", eps="fp32"),
     dict(D=2048, d=128), 8, 3),
    (kernels._quick_gelu, dict(x=B, out=B, n="i32"), dict(BLOCK=1024), 4, 3),
]
for dtype, name, sizes in (
    (torch.bfloat16, B, (64, 4000, 16000)), (torch.float32, F, (64, 4000)), (torch.float16, "*fp16", (16000,))
):
    for pairs in sizes:
        bm, bn, bk, warps, stages = kernels.tiles(pairs, 64, dtype)
        ints = dict.fromkeys(("E", "depth", "width", "stride_e", "stride_k", "stride_n"), "i32")
        cases.append((kernels._grouped_mm, dict(x=name, rows=I, weight=name, ends=I, out=name, **ints),
            dict(GATHER=True, WIDTH=64, PRECISION="ieee" if name == F else "tf32", BM=bm, BN=bn, BK=bk), warps, stages))
arch, shared, bad = int(sys.argv[1]), int(sys.argv[2]), False
for kernel, signature, constants, warps, stages in cases:
    names = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = [["tt.divisibility", 16]]
    even = ("depth", "width", "stride_e", "stride_n", "D", "H", "stride")
    attributes = {
        (i,): aligned
        for i, n in enumerate(kernel.arg_names)
        if names[n].startswith("*") or (n in even and n not in constants)
    }
    constexprs = dict(constants)
    if "stride_k" in signature:
        names["stride_k"] = "constexpr"; constexprs["stride_k"] = 1
        attributes = {k: v for k, v in attributes.items() if kernel.arg_names[k[0]] != "stride_k"}
    source = ASTSource(kernel, names, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert done.asm["cubin"], kernel
    import tempfile, subprocess, pathlib
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"]); file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    local = [int(w.split(":")[1]) for w in usage.split() if w.startswith(("LOCAL:", "STACK:"))]
    print(kernel.__name__, constants, done.metadata.shared, usage.split("REG:")[-1].split()[0], local)
    ok = bool(local) and not any(local)
    bad = not ok or bad
    assert done.metadata.shared <= shared, kernel
assert not bad, "registers spilled, see LOCAL and STACK above"
"""


@pytest.mark.parametrize(("arch", "shared"), [(90, 227 * 1024), (80, 163 * 1024)])
def test_compiles_without_a_gpu(arch, shared):
    """No register spilled to memory, shared memory within what a block may have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(arch), str(shared)],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_operators_have_no_gradient_path():
    x = torch.ones(2, 2, requires_grad=True, device="meta")
    assert not fused.available(x)
    with torch.no_grad():
        assert fused.available(x)
    assert not fused.available(torch.ones(2))
