"""Hessian-free steps of several ranks on this machine: what they send, how long they take, and what of it is sums.

    python benchmarks/ranks.py [--ranks 1 2 3] [--steps 5] [--micro-batches 12] [--iterations 20] [--json FILE]

A TDNN and a fixed joint batch, whose micro-batches are dealt to the ranks: every number of ranks takes the same steps
on the same data, up to rounding. Ranks are processes of one thread each that meet over the loopback interface (gloo);
one rank alone has nothing to send. More ranks than cores share them, so that no efficiency above cores / ranks is to
be had there.

Communication does not overlap computation: the sum of a gradient or of a product begins when its last micro-batch is
done, and the next product waits for it. Columns:

- products: with the curvature, a step, as the optimiser's diagnosis counts them.
- MB sent: that each rank puts into sums, a step; model: (gradients + products) x parameters x 4 bytes, one gradient a
  step; the rest are values of the objective.
- s: seconds of a step, of its slowest rank; median.
- in sums: the share of a step's time spent in sums, mean of the ranks; it holds the waiting for slower ranks.
- in bare sums: the same if every sum of a vector took what it takes when all ranks come to it at once.
- efficiency: seconds of one rank / (ranks x seconds of these), where one rank was timed before.

Bytes are counted as a rank hands them over; a ring of N ranks carries each 2 (N - 1) / N times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from common import Table
from quadric.comm.collective import Collective
from quadric.comm.communicator import Communicator, Solo
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import TDNN
from quadric.objective.objective import MicroBatch, Objective
from quadric.optim.second_order import hessian_free

FEATURES, CLASSES, WINDOWS, FRAMES = 40, 100, 10, 100
"""A micro-batch is 10 windows of 100 frames."""
BARE = 10
"""Sums of one vector that are timed for themselves."""


def micro_batch(model: TDNN, index: int) -> MicroBatch:
    """The joint batch's ``index``-th: noise around the centre of each frame's class."""
    generator = torch.Generator().manual_seed(index)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    length = model.left_context + FRAMES + model.right_context
    classes = torch.randint(CLASSES, (WINDOWS, length), generator=generator)
    inputs = centres[classes] + torch.randn(WINDOWS, length, FEATURES, generator=generator)
    return inputs, classes[:, model.left_context : model.left_context + FRAMES]


def train(communicator: Communicator, chosen: argparse.Namespace) -> dict[str, Any]:
    """What one rank saw: a list of each number, one entry a step, after a step that does not count."""
    torch.manual_seed(0)
    model = TDNN(FEATURES, CLASSES, [chosen.width] * 5)
    share = [micro_batch(model, i) for i in range(chosen.micro_batches) if i % communicator.size == communicator.rank]
    objective = Objective(model, CrossEntropy(), share, communicator=communicator, clock=time.perf_counter)
    optimizer = hessian_free(model.parameters(), max_steps=chosen.iterations)
    found: dict[str, list[float]] = {"seconds": [], "in_sums": [], "bytes": [], "products": [], "values": []}
    for step in range(chosen.steps + 1):
        communicator.sum_(torch.zeros(1))  # all begin at once
        start, sent = time.perf_counter(), communicator.bytes_sent
        value = float(optimizer.step(objective))
        seconds = time.perf_counter() - start
        assert optimizer.diagnosis is not None
        if step:
            in_sums = optimizer.diagnosis.seconds.get("communication", 0.0)
            numbers = (seconds, in_sums, communicator.bytes_sent - sent, optimizer.diagnosis.products, value)
            for name, number in zip(found, numbers, strict=True):
                found[name].append(number)
    return {**found, "parameters": objective.space.size, "frames": objective.frames, "bare": bare(communicator, model)}


def bare(communicator: Communicator, model: TDNN) -> float:
    """Seconds of a sum of a vector as long as the parameters, all ranks at once."""
    vector = torch.zeros(sum(p.numel() for p in model.parameters()))
    seconds = []
    for _ in range(BARE):
        communicator.sum_(torch.zeros(1))
        start = time.perf_counter()
        communicator.sum_(vector)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def rank(rank: int, size: int, meeting: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with Solo() if size == 1 else Collective(rank, size, meeting, timeout=chosen.timeout) as communicator:
        return train(communicator, chosen)


def row(size: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The table's row of ``size`` ranks."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, get_context("spawn")) as processes:
        futures = [processes.submit(rank, r, size, f"file://{folder}/meeting", chosen) for r in range(size)]
        ranks = [future.result() for future in futures]
    first = ranks[0]
    seconds = [max(each) for each in zip(*(r["seconds"] for r in ranks), strict=True)]
    products = statistics.mean(first["products"])
    shares = [sum(r["in_sums"]) / sum(r["seconds"]) for r in ranks]
    vectors = 1 + products
    return {
        "ranks": size,
        "cores": len(os.sched_getaffinity(0)),
        "parameters": first["parameters"],
        "frames": first["frames"],
        "products": products,
        "bytes_sent": statistics.mean(first["bytes"]),
        "bytes_of_the_model": vectors * first["parameters"] * 4 if size > 1 else 0.0,
        "seconds": statistics.median(seconds),
        "seconds_of_steps": seconds,
        "share_in_sums": statistics.mean(shares) if size > 1 else 0.0,
        "share_in_bare_sums": vectors * max(r["bare"] for r in ranks) / statistics.mean(seconds) if size > 1 else 0.0,
        "value_before_last_step": first["values"][-1],
    }


COLUMNS = (
    "ranks",
    "parameters",
    "frames",
    "products",
    "MB sent",
    "model, MB",
    "s",
    "in sums",
    "in bare sums",
    "efficiency",
)


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one that is not")
    parser.add_argument("--micro-batches", type=int, default=12, help="of 1,000 frames, of all ranks together")
    parser.add_argument("--width", type=int, default=256, help="units of each of the five hidden layers")
    parser.add_argument("--iterations", type=int, default=20, help="of conjugate gradients a step, at most")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a rank waits for the others")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    print(f"cores: {len(os.sched_getaffinity(0))}\n")
    table = Table(COLUMNS, chosen.json)
    for size in chosen.ranks:
        found = row(size, chosen)
        alone = next((r["seconds"] for r in [*table.rows, found] if r["ranks"] == 1), None)
        found["efficiency"] = None if alone is None else alone / (size * found["seconds"])
        cells = [f"{size}", f"{found['parameters']:,}", f"{found['frames']:,.0f}", f"{found['products']:.1f}"]
        cells += [f"{found[name] / 1e6:.3f}" for name in ("bytes_sent", "bytes_of_the_model")]
        cells += [f"{found['seconds']:.2f}", f"{found['share_in_sums']:.1%}", f"{found['share_in_bare_sums']:.1%}"]
        table.add(found, [*cells, "-" if alone is None else f"{found['efficiency']:.2f}"])


if __name__ == "__main__":
    main()
