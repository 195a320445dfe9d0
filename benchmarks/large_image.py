"""What a large photo costs before the model sees it: processor time and memory, at each tier.

    python benchmarks/large_image.py [--width 5000] [--height 3000] [--model embedded] [--repeat 5]

A smooth random picture as JPEG, one thread. `plain` resizes it without strips, as small images are; both results are
compared bit for bit.
"""

import argparse
import io
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from envs.knobs import TIERS
from envs.processing import MolmoEProcessor, image_processor
from envs.processing.images import open_image


def best_ms(function: Callable[[], Any], repeat: int) -> float:
    """Least processor time of a call, ms."""
    times = []
    for _ in range(repeat):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return 1000 * min(times)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=5000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = MolmoEProcessor.from_pretrained(args.model)
    coarse = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((args.width, args.height)).save(file, "JPEG", quality=90)
    image = open_image(file.getvalue())
    print(f"decode {best_ms(lambda: open_image(file.getvalue()), args.repeat):.0f} ms, {peak_mib():.0f} MiB at most")
    limits, results = (image_processor.STRIPS_ABOVE, args.width * args.height), []
    for name, image_processor.STRIPS_ABOVE in zip(("strips", "plain"), limits, strict=True):  # type: ignore[misc]
        tilings = [processor.tiling(image.size, tier) for tier in TIERS]
        times = [best_ms(lambda t=t: processor.image_processor.patches(image, t), args.repeat) for t in tilings]
        results.append([processor.image_processor.patches(image, tiling)[0] for tiling in tilings])
        listed = ", ".join(f"{tier} {ms:.0f} ms" for tier, ms in zip(TIERS, times, strict=True))
        print(f"{name}: {listed}, {peak_mib():.0f} MiB at most")
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


if __name__ == "__main__":
    main()
