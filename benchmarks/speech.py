"""Real-time factors, training speed and peak memory on a data directory with a trained system.

    python benchmarks/speech.py exp/speechocean/adamw/decoded/system PATH/speechocean762/data/dev --jobs 2

Prints seconds of work per second of audio for features, network and search, frames a second of training (forward and
backward of the same network on the same features), and the largest resident memory of this process and of a worker.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from quadric.data.stream import FrameStream
from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective
from quadric.progress import silent
from quadric.speech.corpus import read_data_dir
from quadric.train.prepare import make_features
from quadric.train.sources import Material
from quadric.train.system import System


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--utterances", type=int, default=200)
    parser.add_argument("--autocast", action="store_true", help="compute matrix products in bfloat16")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.jobs)
    system = System.load(chosen.system)
    corpus = read_data_dir(chosen.data).head(chosen.utterances)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        features = make_features(Material(corpus, None), system.front, Path(folder), chosen.jobs, silent)
        extraction = time.perf_counter() - start
    frames = sum(map(len, features.values()))
    audio = frames * system.front.fbank.frame_shift_ms / 1000

    likelihoods = system.likelihoods(features, autocast=chosen.autocast)
    start = time.perf_counter()
    scores = {id: likelihoods[id] for id in likelihoods}
    network = time.perf_counter() - start

    with system.decoder(jobs=chosen.jobs) as decoder:
        few = dict(list(scores.items())[: 2 * chosen.jobs])
        system.recognise(decoder, few, progress=silent)  # starts the processes and reads the graph
        start = time.perf_counter()
        system.recognise(decoder, scores, progress=silent)
        search = time.perf_counter() - start

    model = system.model.train()
    targets = {id: np.argmax(row, 1) for id, row in scores.items()}
    stream = FrameStream(features, targets, context=(model.left_context, model.right_context))
    batches = [list(stream.draw(2048)) for _ in range(24)]
    autocast = torch.bfloat16 if chosen.autocast else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for warm in batches[:4]:
        optimizer.step(Objective(model, CrossEntropy(), warm, autocast=autocast))
    start = time.perf_counter()
    for batch in batches[4:]:
        optimizer.step(Objective(model, CrossEntropy(), batch, autocast=autocast))
    training = time.perf_counter() - start

    seen = sum(batch.frames for step in batches[4:] for batch in step)
    own, worker = (
        resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"{len(corpus)} utterances, {audio:.0f} s of audio, {chosen.jobs} processes or threads")
    print("| what | real-time factor |\n|---|---|")
    for what, seconds in (("features, start-up included", extraction), ("network", network), ("search", search)):
        print(f"| {what} | {seconds / audio:.4f} |")
    print(f"training: {seen / training:,.0f} frames/s; peak memory: {own:.2f} GiB, largest worker {worker:.2f} GiB")


if __name__ == "__main__":
    main()
