"""What a solve by conjugate gradients holds in memory, beside a gradient on the same micro-batches.

    python benchmarks/memory.py [--micro-batches 16] [--budgets 65536 64] [--device cuda] [--json FILE]

Each row is a process of its own: a gradient, or, with a budget (the ``memory=`` of an `Objective`), the recording of
the Gauss-Newton matrix and a solve by conjugate gradients of a fixed number of products. Columns:

- budget: MiB that the curvature may retain of its micro-batches; what goes beyond is recorded anew in every product.
  The first micro-batch is retained in any case, so that 0 retains one.
- peak: MiB above what the process held before, that is above model, data and two vectors of parameters. On a CPU it is
  of the resident set, and what torch itself takes has been taken before, by a gradient and a product on little data; on
  a GPU it is of torch's allocator. The C library (glibc) is told to give freed blocks of 1 MiB and more back at once
  (``MALLOC_MMAP_THRESHOLD_``): left alone it keeps some for later, up to as much again, and never the same.
- peak / gradient: the ratio to the peak of the gradient.
- ms: the median of the gradients or of the solve's products; ms / gradient: the ratio to the gradient.
- recording: ms that recording takes before the first product.

The right-hand side is random: neither memory nor time depends on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Table, now
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Identity, LinearOperator
from quadric.linalg.truncation import FixedIterations
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import TDNN
from quadric.objective.objective import Objective

MIB = 1 << 20
CLASSES = 500


class LSTM(nn.Module):
    """Two layers and an output layer, frames first: [T, B, 80] to [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.output = nn.LSTM(80, 512, 2), nn.Linear(512, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.recurrent(inputs)[0])


def mlp() -> nn.Sequential:
    """Six hidden layers on a window of 11 frames."""
    layers: list[nn.Module] = [nn.Linear(11 * 80, 1000), nn.Sigmoid()]
    for _ in range(5):
        layers += [nn.Linear(1000, 1000), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(1000, CLASSES))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "mlp": (mlp, (2000, 880), (1, 880)),
    "tdnn": (lambda: TDNN(80, CLASSES, [512] * 5), (20, 122, 80), (1, 23, 80)),
    "lstm": (LSTM, (50, 40, 80), (2, 1, 80)),
}
"""A builder, the shape of a micro-batch of 2,000 frames, and one of very few."""


class Timed(LinearOperator):
    """An operator that keeps how long each product took."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.size, self.symmetric = operator.size, operator.symmetric
        self.seconds: list[float] = []

    def apply(self, v: Tensor) -> Tensor:
        start = now()
        product = self.operator @ v
        self.seconds.append(now() - start)
        return product


class Peak:
    """The most memory held since it was made, beyond what was held then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident set so far becomes the present one
            self.before = _resident("VmRSS")

    def mib(self) -> float:
        """In MiB."""
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
        return (most - self.before) / MIB


def _resident(kind: str) -> int:
    """Bytes of the resident set, as the kernel counts them: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) << 10


def batches(model: nn.Module, shape: tuple[int, ...], count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Random inputs and classes."""
    found = []
    for _ in range(count):
        inputs = torch.randn(shape, device=device)
        with torch.no_grad():
            leading = model(inputs).shape[:-1]
        found.append((inputs, torch.randint(CLASSES, leading, device=device)))
    return found


def gradients(objective: Objective, theta: Tensor, rounds: int) -> tuple[list[float], float]:
    """The seconds of each, and nothing recorded."""
    seconds = []
    for _ in range(rounds):
        start = now()
        objective.value_and_grad(theta)
        seconds.append(now() - start)
    return seconds, 0.0


def solve(objective: Objective, theta: Tensor, b: Tensor, products: int) -> tuple[list[float], float]:
    """The seconds of each product, and of recording."""
    start = now()
    curvature = Timed(objective.curvature(theta))
    recording = now() - start
    solver = ConjugateGradient(products, FixedIterations(products))
    solver.solve(curvature + Identity(len(theta)), b)
    return curvature.seconds, recording


def case(name: str, budget: float | None, chosen: argparse.Namespace) -> dict[str, float]:
    """One row's numbers, in this process; ``budget`` in MiB, None: the gradient."""
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    build, shape, little = NETWORKS[name]
    model = build().to(device)
    data = batches(model, shape, chosen.micro_batches, device)
    first = Objective(model, CrossEntropy(), batches(model, little, 2, device), memory=0)
    theta = first.space.point()
    b = torch.randn_like(theta)
    gradients(first, theta, 1)
    solve(first, theta, b, 2)
    del first
    memory = None if budget is None else round(budget * MIB)
    objective = Objective(model, CrossEntropy(), data, memory=memory)
    peak = Peak(device)
    if budget is None:
        seconds, recording = gradients(objective, theta, chosen.products)
    else:
        seconds, recording = solve(objective, theta, b, chosen.products)
    return {
        "parameters": len(theta),
        "frames": objective.frames,
        "peak_mib": peak.mib(),
        "milliseconds": 1e3 * statistics.median(seconds),
        "recording_milliseconds": 1e3 * recording,
    }


def rows(name: str, chosen: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The table's rows of one network."""
    gradient: dict[str, float] = {}
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", f"{MIB}")
    for budget in (None, *chosen.budgets):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                found = process.submit(case, name, budget, chosen).result()
            except BrokenProcessPool:
                print(f"{name}, budget {budget}: the process was ended, perhaps for want of memory", flush=True)
                if budget is None:
                    return
                continue
        gradient = gradient or found
        yield {
            "model": name,
            "work": "gradient" if budget is None else "solve",
            "budget_mib": budget,
            **found,
            "peak_ratio": found["peak_mib"] / gradient["peak_mib"],
            "time_ratio": found["milliseconds"] / gradient["milliseconds"],
        }


COLUMNS = [
    "model", "parameters", "work", "budget, MiB", "peak, MiB", "peak / gradient", "ms", "ms / gradient",
    "recording, ms",
]  # fmt: skip


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=16, help="of 2,000 frames each")
    parser.add_argument("--products", type=int, default=10, help="of the solve, and rounds of the gradient")
    parser.add_argument("--budgets", type=float, nargs="+", default=[65536.0, 64.0], metavar="MIB")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        sys.exit("peaks of a resident set are read from /proc, which only Linux has: run there, or with --device cuda")
    table = Table(COLUMNS, chosen.json)
    for name in chosen.models:
        for row in rows(name, chosen):
            budget = "-" if row["budget_mib"] is None else f"{row['budget_mib']:.0f}"
            cells = [name, f"{row['parameters']:,}", row["work"], budget, f"{row['peak_mib']:.0f}"]
            cells += [f"{row['peak_ratio']:.2f}", f"{row['milliseconds']:.0f}", f"{row['time_ratio']:.2f}"]
            table.add(row, [*cells, f"{row['recording_milliseconds']:.0f}"])


if __name__ == "__main__":
    main()
