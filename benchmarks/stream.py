"""How fast minibatches of frames are made.

    python benchmarks/stream.py [--threads 1] [--repeats 7] [--seed 0]

Random features of 500 utterances of 400 frames in 40 dimensions, drawn 100,000 frames at a time as windows of 50 frames
with 10 frames of context on either side, in minibatches of 4,000; plain and with spectral masks. Prints the median and
the best of the repeats in frames a second.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from quadric.data.augment import SpecAugment
from quadric.data.stream import FrameStream, Transform

UTTERANCES, FRAMES, DIMENSIONS, DRAWN = 500, 400, 40, 100_000


def rates(transform: Transform | None, repeats: int, seed: int) -> list[float]:
    """Frames a second of each repeat."""
    rng = np.random.default_rng(seed)
    features = {f"{n:03}": rng.standard_normal((FRAMES, DIMENSIONS), dtype=np.float32) for n in range(UTTERANCES)}
    targets = {id: np.arange(FRAMES) for id in features}
    stream = FrameStream(
        features, targets, context=(10, 10), chunk=50, micro_frames=4000, seed=seed, transform=transform
    )
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        frames = sum(batch.frames for batch in stream.draw(DRAWN))
        found.append(frames / (time.perf_counter() - start))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print("| inputs | median, frames/s | best, frames/s |\n|---|---|---|")
    for what, transform in (("plain", None), ("masked", SpecAugment())):
        found = rates(transform, chosen.repeats, chosen.seed)
        print(f"| {what} | {statistics.median(found):,.0f} | {max(found):,.0f} |")


if __name__ == "__main__":
    main()
