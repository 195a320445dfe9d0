"""The decoding kernels: in Triton's interpreter against float64, and compiled for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'ray-ctrl[kernels]'")

ROOT = Path(__file__).parents[4]


def run(script, interpret):
    """Run a script in a process of its own, as Triton decides on import whether it interprets; its JSON output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, sys.path))),
        "OMP_NUM_THREADS": "1",
    }
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PROPERTY = """
import dataclasses, json, os
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from benchmarks.decode_checks import GOLDEN, kernel_errors, prefilled
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.decode import DecodeBatch
from envs.model.kernels.decode_step import Tuning
from envs.model.language import Language
from envs.model.static import StaticDecoder

torch.set_grad_enabled(False)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
worst = {"torch.float32": 0.0, "torch.bfloat16": 0.0}

def language(dtype, experts, heads, head, hidden, vocabulary, seed):
    config = dataclasses.replace(
        AdaptiveMolmoEConfig.from_pretrained(GOLDEN), d_model=heads * head, n_heads=heads, moe_num_experts=experts,
        mlp_hidden_size=2 * hidden, embedding_size=vocabulary, vocab_size=vocabulary, eos_token_id=5)
    torch.manual_seed(seed)
    found = Language(config)
    for name, parameter in found.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name or name == "ln_f" else parameter.normal_(0, 0.1)
    return found.to(dtype).requires_grad_(False)

power = lambda *values: st.sampled_from(values)

examples = int(os.environ["EXAMPLES"])

@settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def check(data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(LIMITS)))
    heads, head = draw(st.integers(1, 3)), draw(power(8, 16, 24))
    experts, hidden, vocabulary = draw(st.integers(8, 20)), draw(st.integers(3, 40)), draw(st.integers(330, 400))
    rows = draw(power(*[r for r in (2, 4, 8) if heads * head % r == 0]))
    tuning = Tuning(
        qkv=(rows, 4), attention=(draw(power(1, 2, 8)), draw(power(4, 16)), 4), out=(draw(power(4, 16)), 4),
        router=(draw(power(2, 8)), 4), gate_up=(draw(power(4, 16)), 4),
        down=(draw(power(8, 16)), draw(power(16, 32)), 4),
        head=(draw(power(16, 32)), draw(st.integers(1, 3)), 4))
    model = language(dtype, experts, heads, head, hidden, vocabulary, draw(st.integers(0, 99)))
    for name, value in kernel_errors(model, draw(st.integers(4, 8)), draw(st.integers(0, 40)), tuning).items():
        assert value <= LIMITS[dtype], (name, value, dtype)
        worst[str(dtype)] = max(worst[str(dtype)], value)
    if dtype == torch.float32:
        top_k = (8, 0, 5) + (0,) * 12 + (4,)
        length = draw(st.integers(1, 20))
        start = prefilled(model, top_k, length)
        batch, decoder = DecodeBatch(model, [(start, [0])]), StaticDecoder(model, 64, 4, kernels=True, tuning=tuning)
        decoder.start(start, 0, 7)
        token = 7
        for _ in range(2):
            wanted = batch.step([token])[0]
            decoder.step()
            torch.testing.assert_close(decoder.cell.logits, wanted, rtol=1e-3, atol=1e-4)
            token = int(wanted.argmax())
            assert int(decoder.cell.token) == token

check()
print(json.dumps(worst))
"""


@pytest.mark.parametrize("examples", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_every_kernel_against_float64_and_complete_steps_against_the_growing_batch(examples, monkeypatch):
    pytest.importorskip("hypothesis")
    monkeypatch.setenv("EXAMPLES", str(examples))
    worst = run(PROPERTY, interpret=True)
    assert 0 < worst["torch.float32"] <= 1e-6
    assert 0 < worst["torch.bfloat16"] <= 1e-2


LIMITS = """
import json
import torch
from benchmarks.decode_checks import launches
from benchmarks.ledger import full_model, plan_of
from envs.model.kernels import decode, decode_step
from envs.model.static import Cell

language = full_model().language
weights = {id(parameter) for parameter in language.parameters()}
step, launched = decode_step.KernelStep(language, Cell(language, 1100, 16)), []

class Recorder:
    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        return lambda *args, **_: launched.append((self.name, args))

for name in ("embed", "norm_project", "attention", "project_add", "route", "gate_up", "down", "choose"):
    setattr(decode, name, Recorder(name))
found = []
for blocks, top_k in ((16, 8), (16, 4), (12, 4)):
    launched.clear()
    plan = plan_of(blocks, top_k)
    step(plan.blocks)
    floor = sum(size for _, size in launches(language, plan.top_k_per_block, 1099))
    # What passes between kernels comes on top of the weights and the cache; most of it never leaves the chip.
    between = sum(
        x.numel() * x.element_size() for _, args in launched for x in args
        if isinstance(x, torch.Tensor) and id(x) not in weights and x.shape[:1] != (1100,))
    found.append([blocks, top_k, len(launched), floor, between])
print(json.dumps(found))
"""


def test_a_step_stays_within_its_limits():
    """Launches on the published model on `meta`, where reading a number back would be an error."""
    for blocks, top_k, launched, floor, between in run(LIMITS, interpret=False):
        assert launched == 6 * blocks + 2 <= 130
        # The block before the insertion runs at full top-k.
        experts = (8 + (blocks - 1) * top_k) * 3 * 1024 * 2048
        rest = 4 * 2048**2 + 64 * 2048 + 2200 * 2048
        assert floor == 2 * (experts + blocks * rest + (50304 + 1) * 2048)
        assert floor + between <= 1.15 * floor


TIES = """
import json
import torch
from benchmarks.decode_checks import GOLDEN
from envs.model import AdaptiveMolmoE
from envs.model.kernels.decode_step import KernelStep, Tuning
from envs.model.static import Cell
language = AdaptiveMolmoE.from_pretrained(GOLDEN).language
step = KernelStep(language, Cell(language, 8, 4), Tuning(router=(4, 4), head=(32, 2, 4)))
block = language.blocks[0]
block.router[1::2] = block.router[:1]
# One token has the highest logit, at many ids.
language.lm_head[:] *= 1e-3
language.lm_head[41::3] = language.lm_head[40] = 1.0
step.x.normal_().abs_()
step.route(block)
step.choose()
order = step.router_logits.sort(descending=True, stable=True).indices
logits = step.cell.logits
print(json.dumps([step.chosen.tolist(), order.tolist(), int(step.cell.token), int(logits.argmax())]))
"""


def test_of_equal_logits_the_lowest_index_wins():
    chosen, order, token, lowest = run(TIES, interpret=True)
    assert chosen == order
    assert token == lowest


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from envs.model.kernels import decode as kernels
F, W, I, L = "*fp32", "*bf16", "*i32", "*i64"
D = {"D": 2048}
B = {**D, "BLOCK": 2048}
SPECS = {
    "embed": ([L, W, F], B, 4),
    "norm_project": ([F, W, W, F, F, "fp32"], {**B, "N": 6144, "ROWS": 4}, 4),
    "attention": ([F, F, W, F, W, W, L, F, F, I, F, "fp32", "fp32"],
                  {**D, "HEAD": 128, "WIDTH": 128, "SUMS": 512, "SUMS_WIDTH": 512, "SPLITS": 32, "SLOTS": 64}, 4),
    "project_add": ([F, W, F], {**B, "ROWS": 8}, 8),
    "route": ([F, W, W, W, F, I, F, I, "fp32"], {**B, "E": 64, "WIDTH": 64, "ROWS": 1}, 8),
    "gate_up": ([W, W, I, I, F, F], {**B, "HIDDEN": 1024, "ROWS": 2}, 8),
    "down": ([F, W, I, I, F, I, F], {**D, "HIDDEN": 1024, "DEPTH": 256, "COLS": 32, "PARTS": 4, "ALL": 32}, 4),
    "choose": ([F, W, W, F, F, I, L, L, I, L, L, "i32", "fp32"],
               {**B, "N": 50304, "ROWS": 8, "TILES": 2, "PROGRAMS": 3144, "WIDTH": 4096}, 4),
}
found = {}
for name, (types, constants, warps) in SPECS.items():
    function, left = getattr(kernels, name), iter(types)
    constants = {**constants, "PDL": CAPABILITY == 90}
    signature = {n: "constexpr" if n in constants else next(left) for n in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if signature[n][0] == "*"}
    options = {"num_warps": warps, **({"launch_pdl": True} if CAPABILITY == 90 else {})}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    path = sys.argv[1] if len(sys.argv) > 1 else FOLDER
    with open(f"{path}/{name}.cubin", "wb") as file:
        file.write(built.asm["cubin"])
    found[name] = built.metadata.shared
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_without_spills_and_with_wide_loads(capability, tmp_path):
    import triton

    script = f"CAPABILITY, FOLDER = {capability}, {str(tmp_path)!r}\n{COMPILE}"
    shared = run(script, interpret=False)
    assert len(shared) == 8
    assert max(shared.values()) <= 48 * 1024
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name in shared:
        code = subprocess.run([tool, "-sass", tmp_path / f"{name}.cubin"], capture_output=True, text=True, check=True)
        usage = subprocess.run(
            [tool, "-res-usage", tmp_path / f"{name}.cubin"], capture_output=True, text=True, check=True
        )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
        assert (stack, registers <= 128) == (0, True), (name, usage.stdout)
        assert not re.search(r"\b(STL|LDL)\b", code.stdout), f"{name} spills"
        assert "LDG.E.128" in code.stdout, f"{name} has no 16-byte loads"
        if capability == 90:
            assert "ACQBULK" in code.stdout, f"{name} does not wait for the kernel before it"
