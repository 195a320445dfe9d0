"""Memory and time that reading a sharded checkpoint takes, against the model's own size.

    python benchmarks/loading.py [--gib 4] [--shard-mib 512] [--dtype bfloat16] [--folder DIR]

Writes random bfloat16 weights in the published layout into a temporary folder, shard by shard, reads them in a process
of its own whose anonymous and shared memory is watched from outside, and removes the folder. Exit status 1 where the
peak is above the resident model plus 1.3 times the largest shard.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from envs.model.checkpoint import INDEX
from envs.model.config import AdaptiveMolmoEConfig, VisionConfig
from envs.model.inspect import parameter_counts
from envs.model.molmoe import published_shapes

ALLOWED_SHARDS = 1.3
WATCH_S = 0.002
HELD = ("RssAnon:", "RssShmem:")
# The reader says when its libraries are in and when the model is, and waits for an answer each time, so that what is
# seen in between is the loading.
READER = """
import sys, time
import torch
from envs.model import AdaptiveMolmoE

def tell(word):
    print(word, flush=True)
    sys.stdin.readline()

tell("ready")
started = time.perf_counter()
model = AdaptiveMolmoE.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - started
tell("loaded")
print(sum(p.numel() * p.element_size() for p in model.parameters()), seconds)
"""


def config_of(gib: float) -> AdaptiveMolmoEConfig:
    """A MolmoE with the published number of blocks, experts, words and image layers, of about `gib` in bfloat16.

    Half as wide as MolmoE-1B, an eighth below 1 GiB; the experts' hidden width fills the rest.
    """
    width = 1024 if gib >= 1 else 256

    def shaped(hidden: int) -> AdaptiveMolmoEConfig:
        vision = VisionConfig(336, 14, width, 23, 16, width // 16, 4 * width, 1e-5, (-2, -9), (2, 2))
        return AdaptiveMolmoEConfig(d_model=width, mlp_hidden_size=2 * hidden, vision_backbone=vision.to_published())

    def size(hidden: int) -> int:
        return 2 * sum(parameter_counts(shaped(hidden)).values())

    rest = gib * 2**30 - size(1)
    return shaped(max(1, 1 + round(rest / (size(2) - size(1)))))


def write_checkpoint(folder: Path, config: AdaptiveMolmoEConfig, shard_bytes: int) -> list[int]:
    """Random bfloat16 weights in shards of at most `shard_bytes`, one in memory at a time; their sizes in bytes."""
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(config)
    weight_map: dict[str, str] = {}
    sizes: list[int] = []
    for number, keys in enumerate(_shards(config, shard_bytes), 1):
        name = f"model-{number:05d}.safetensors"
        tensors = {
            key: torch.empty(shapes[key], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for key in keys
        }
        save_file(tensors, folder / name)
        sizes.append(sum(tensor.numel() * 2 for tensor in tensors.values()))
        weight_map.update(dict.fromkeys(keys, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.to_published()), encoding="utf-8")
    return sizes


def _shards(config: AdaptiveMolmoEConfig, shard_bytes: int) -> Iterator[list[str]]:
    keys: list[str] = []
    filled = 0
    for key, shape in published_shapes(config).items():
        size = 2 * torch.Size(shape).numel()
        if keys and filled + size > shard_bytes:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys


def held_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process: its own memory, mapped files left out, which the kernel may drop."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(HELD))


def watch_loading(folder: Path, dtype: str) -> dict[str, float]:
    """Peak of what a process uses while it reads the checkpoint, and before; bytes and seconds."""
    command = [sys.executable, "-c", READER, str(folder), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        _expect(reader.stdout.readline(), "ready")
        before = held_bytes(reader.pid)
        answer = _Line(reader.stdout)
        _continue(reader.stdin)
        peak = before
        while not answer.there:
            peak = max(peak, held_bytes(reader.pid))
            time.sleep(WATCH_S)
        _expect(answer.text, "loaded")
        peak = max(peak, held_bytes(reader.pid))
        _continue(reader.stdin)
        resident, seconds = reader.stdout.readline().split()
    return {"before": before, "peak": peak, "resident": int(resident), "seconds": float(seconds)}


class _Line:
    """The next line of a stream, read in a thread."""

    def __init__(self, stream: Any) -> None:
        self.text, self.there = "", False
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: Any) -> None:
        self.text, self.there = stream.readline(), True


def _continue(stdin: Any) -> None:
    stdin.write("\n")
    stdin.flush()


def _expect(line: str, word: str) -> None:
    if line.strip() != word:
        raise RuntimeError(f"the reading process said {line!r} instead of {word!r}")


def run(gib: float, shard_mib: int, dtype: str, where: Path | None) -> dict[str, Any]:
    """Write, read and remove a checkpoint; the figures, sizes in MiB."""
    config = config_of(gib)
    with tempfile.TemporaryDirectory(dir=where) as name:
        sizes = write_checkpoint(Path(name), config, shard_mib * 2**20)
        found = watch_loading(Path(name), dtype)
    allowed = found["resident"] + ALLOWED_SHARDS * max(sizes)
    figures = {
        "checkpoint_mib": sum(sizes),
        "largest_shard_mib": max(sizes),
        "resident_model_mib": found["resident"],
        "before_mib": found["before"],
        "peak_mib": found["peak"],
        "peak_above_before_mib": found["peak"] - found["before"],
        "allowed_mib": allowed,
    }
    return {
        "shards": len(sizes),
        "keys": len(published_shapes(config)),
        "dtype": dtype,
        **{key: round(value / 2**20, 1) for key, value in figures.items()},
        "peak_over_resident_in_shards": round((found["peak"] - found["resident"]) / max(sizes), 3),
        "seconds": round(found["seconds"], 2),
        "within": found["peak"] <= allowed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint in bfloat16")
    parser.add_argument("--shard-mib", type=int, default=512, help="largest shard")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype to load into")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    figures = run(options.gib, options.shard_mib, options.dtype, options.folder)
    print(json.dumps(figures, indent=1))
    return 0 if figures["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
