"""What a call does to the hardware, counted at full size on `meta` tensors: no weights, no GPU, seconds.

    with Ledger() as found:
        model.language.prefill(...)
    found.kernels, found.bytes, found.syncs

On `meta` the model takes the path it takes on a GPU. Bytes are inputs read once and outputs written once by each
kernel, so what stays in a cache counts too; views are free.

    python -m benchmarks.ledger      prints the stages of the published model
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from envs.knobs import ExecutionPlan
from envs.model.config import AdaptiveMolmoEConfig
from envs.model.fused import COSTS
from envs.model.molmoe import AdaptiveMolmoE

_FREE = {
    "view", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "as_strided",
    "t", "split", "split_with_sizes", "unbind", "chunk", "detach", "alias", "reshape", "view_as_real",
    "view_as_complex", "unfold", "empty", "new_empty", "empty_like", "empty_strided", "narrow", "lift_fresh",
}  # fmt: skip
# Their source is read only where an index points.
_GATHERS = {"index_select", "index", "gather", "embedding", "take"}
_PRODUCTS = {"linear", "mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
_KERNELS = {"sort": 4, "topk": 2, "nonzero": 3}
_READS_BACK = ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy")


class Ledger:
    """Counts while it is entered.

    `bytes` is all traffic, `elementwise_bytes` that of everything but products and attention, `flops` of products and
    attention, `copies` host to device or back, `syncs` waits of the host for the device.
    """

    def __init__(self) -> None:
        self.by_op: Counter[str] = Counter()
        self.operators = self.kernels = self.copies = self.syncs = 0
        self.bytes = self.elementwise_bytes = self.flops = 0.0
        self._modes = (_Calls(self), _Operators(self))

    def __enter__(self) -> "Ledger":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def add(self, name: str, traffic: float, flops: float = 0.0, kernels: int = 1, *, product: bool = False) -> None:
        """Book one operator."""
        self.by_op[name] += 1
        self.operators += 1
        self.kernels += kernels
        self.bytes += traffic
        self.flops += flops
        if not product:
            self.elementwise_bytes += traffic

    def transfer(self, name: str, *, waits: bool) -> None:
        """Book a copy between host and device."""
        self.by_op[name] += 1
        self.copies += 1
        self.syncs += waits


class _Calls(TorchFunctionMode):
    """Calls that are one kernel on a GPU and many operators on `meta`, and calls that wait for the device."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, call: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(call, "__name__", "")
        if name == "tensor" and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.ledger.transfer("tensor", waits=True)
        meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if meta and name in _READS_BACK:
            self.ledger.by_op[name] += 1
            self.ledger.syncs += 1
            self.ledger.copies += name in ("cpu", "numpy")
            return _read_back(name, args[0])
        if meta and name == "scaled_dot_product_attention":
            return self._attention(*args[:4], **kwargs)
        if meta and name == "rms_norm":
            return self._norm(*args, **kwargs)
        return call(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        rows, heads, queries, width = query.shape
        out = query.new_empty(rows, queries, heads, value.shape[-1]).transpose(1, 2)
        causal = 0.5 if kwargs.get("is_causal") else 1.0
        flops = causal * 4.0 * rows * heads * queries * key.shape[2] * width
        self.ledger.add("attention", sum(map(_size, (query, key, value, out))), flops, product=True)
        return out

    def _norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        out = x.new_empty(x.shape)
        self.ledger.add("rms_norm", 2.0 * _size(x))
        return out


class _Operators(TorchDispatchMode):
    """Every operator that reaches the dispatcher."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        name = str(operator).split(".")[1]
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        devices = {x.device.type for x in (*inputs, *outputs)}
        if devices == {"cpu", "meta"} and name in ("_to_copy", "copy_"):
            self.ledger.transfer(name, waits=not (kwargs or {}).get("non_blocking"))
        elif "meta" in devices and name not in _FREE and not _is_view(name, inputs, outputs):
            self._book(str(operator), name, args, inputs, outputs, out)
        return out

    def _book(
        self, full: str, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor], out: Any
    ) -> None:
        if full in COSTS:
            traffic, flops = COSTS[full](args, out)
            self.ledger.add(name, traffic, flops, product=flops > 0)
            return
        written = sum(map(_size, outputs))
        if name in _GATHERS:
            traffic = 2.0 * written
        elif name.endswith("_") or name in ("index_put", "index_copy"):
            traffic = float(sum(map(_size, inputs)))
        else:
            traffic = float(written + sum(map(_size, inputs)))
        product = name in _PRODUCTS
        self.ledger.add(name, traffic, _flops(name, inputs, outputs), _KERNELS.get(name, 1), product=product)


def _is_view(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    held = {x.untyped_storage()._cdata for x in inputs}
    return not name.endswith("_") and bool(outputs) and all(x.untyped_storage()._cdata in held for x in outputs)


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    if name not in _PRODUCTS:
        return 0.0
    left = inputs[1] if name in ("addmm", "baddbmm") else inputs[0]
    return 2.0 * outputs[0].numel() * left.shape[-1]


def _size(x: Tensor) -> int:
    """Bytes of a tensor, repeats of an expanded one not counted."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or size < 2 else 1
    return count * x.element_size()


def _read_back(name: str, x: Tensor) -> Any:
    if name == "tolist":
        return torch.zeros(x.shape).tolist()
    if name in ("cpu", "numpy"):
        return torch.zeros(x.shape, dtype=x.dtype)
    if name == "nonzero":
        raise NotImplementedError("nonzero: how many there are is not known on meta")
    return {"__bool__": True, "__float__": 0.0}.get(name, 0)


def full_model(dtype: torch.dtype = torch.bfloat16, config: AdaptiveMolmoEConfig | None = None) -> AdaptiveMolmoE:
    """The published model (or one of `config`) on `meta`, frozen."""
    with torch.device("meta"):
        model = AdaptiveMolmoE(config or AdaptiveMolmoEConfig())
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def count(call: Callable[[], Any]) -> Ledger:
    """Run once and count."""
    with Ledger() as found:
        call()
    return found


def plan_of(blocks: int, top_k: int) -> ExecutionPlan:
    """A plan that keeps the first `blocks` blocks but one, and the last."""
    return ExecutionPlan("high", 1, top_k, (*range(blocks - 1), 15))


def stages(
    model: AdaptiveMolmoE, views: Sequence[int] = (4, 13), tokens: Sequence[int] = (600, 1500, 2000)
) -> Mapping[str, Callable[[], Any]]:
    """Stages of a request as calls: vision by number of views, prefill by prompt length (the first at 12/4)."""
    language, config, device = model.language, model.config, model.device
    language.rope(max(tokens))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=model.dtype)

    def vision(count: int) -> Callable[[], Any]:
        shape = (1, count, config.vision.patches)
        crops = noise(*shape, config.vision.pixels)
        masks = torch.ones(*shape, device=device)
        return lambda: model.vision(crops, masks)

    def prefill(length: int, blocks: int, top_k: int) -> Callable[[], Any]:
        x = noise(1, length, config.d_model)
        chosen = [plan_of(blocks, top_k).top_k_per_block]
        return lambda: language.prefill(x, [length], [0], chosen)

    found = {f"vision {count} views": vision(count) for count in views}
    for place, length in enumerate(tokens):
        blocks, top_k = (16, 8) if place else (12, 4)
        found[f"prefill {length} {blocks}/{top_k}"] = prefill(length, blocks, top_k)
    return found


def main() -> None:
    print(f"{'stage':20} operators kernels     GB elementwise GB TFLOP copies syncs")
    for name, call in stages(full_model()).items():
        found = count(call)
        sizes = f"{found.bytes / 1e9:6.2f} {found.elementwise_bytes / 1e9:14.2f} {found.flops / 1e12:5.2f}"
        print(f"{name:20} {found.operators:9} {found.kernels:7} {sizes} {found.copies:6} {found.syncs:5}")


if __name__ == "__main__":
    main()
