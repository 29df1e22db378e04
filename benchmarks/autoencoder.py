"""Deep autoencoders: Hessian-free with and without its accelerations, NGHF, and first-order optimisers, in one run.

    python benchmarks/autoencoder.py PATH/mnist [--seconds 60] [--target 75] [--methods hf hf+lbfgs adam] [--json FILE]

The network of Hinton and Salakhutdinov on MNIST (`--narrow` halves its widths), logistic outputs, cross-entropy per
image; Martens' sparse initialisation. Each method trains for the same seconds (evaluations excluded) from the same
start, or until the held-out loss reaches the target, on the first 50,000 images; the last 10,000 are held out. Columns:
seconds, updates, products with the curvature, and millions of images touched (forward and reverse passes together, a
product as one) when the target was first reached, and the loss at the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import Training
from quadric.linalg.krylov import FlexibleCG
from quadric.linalg.pairs import SpreadPairs
from quadric.linalg.truncation import RelativeProgress
from quadric.loss.loss import Bernoulli
from quadric.objective.objective import Objective
from quadric.optim.damping import LevenbergMarquardt
from quadric.optim.descent import NewtonCG
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner
from quadric.optim.sampling import FixedSizes, GeometricSizes, Sampler, Sizes
from quadric.optim.search import Backtracking
from quadric.optim.second_order import SecondOrder, hessian_free, nghf

MICRO = 5000
"""Images of a micro-batch."""

Build = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimiser and how much data a step of it sees."""

    build: Build
    sampler: Sampler


def _flexible(preconditioner: Preconditioner) -> Build:
    def build(model: nn.Module) -> SecondOrder:
        solver = FlexibleCG(150, RelativeProgress(5e-4), pairs=preconditioner.pairs)
        return SecondOrder(
            model.parameters(), descent=NewtonCG(solver, 0.95), search=Backtracking(), damping=LevenbergMarquardt(1.0),
            preconditioner=preconditioner,
        )  # fmt: skip

    return build


def _hessian_free(preconditioner: Preconditioner | None = None) -> Build:
    return lambda model: hessian_free(model.parameters(), max_steps=150, preconditioner=preconditioner)


FIXED = FixedSizes(50_000, 5_000)
GROWING = GeometricSizes(10_000, 1_000, 1.2, 1.3, most=5_000)
PAIRS = SpreadPairs(16)
METHODS: dict[str, Method] = {
    "hf": Method(_hessian_free(), FIXED),
    "hf+diagonal": Method(_hessian_free(FisherDiagonal()), FIXED),
    "hf+lbfgs": Method(_hessian_free(LBFGS(PAIRS)), FIXED),
    "hf+lbfgs+flexible": Method(_flexible(LBFGS(PAIRS)), FIXED),
    "hf+sampling": Method(_hessian_free(), GROWING),
    "hf+all": Method(_flexible(LBFGS(PAIRS)), GROWING),
    "nghf": Method(lambda model: nghf(model.parameters()), FixedSizes(10_000, 5_000)),
    "adam": Method(lambda model: torch.optim.Adam(model.parameters(), lr=1e-3), FixedSizes(200, 1)),
    "sgd": Method(
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True), FixedSizes(200, 1)
    ),
}
"""Of Hessian-free as in Martens (2010): all data for the gradient, a tenth for the curvature."""


def images(folder: Path) -> Tensor:
    """The 60,000 training images as probabilities, [60000, 784]."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        raw = file.read()
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).astype(np.float32) / 255)


def network(*, narrow: bool) -> nn.Sequential:
    """784-1000-500-250-30 and back, sparsely initialised: 15 incoming weights a unit, N(0, 1)."""
    torch.manual_seed(0)
    widths = [w // 2 if narrow else w for w in (1000, 500, 250)]
    sizes = [784, *widths, 30, *widths[::-1], 784]
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layer = nn.Linear(sizes[i], sizes[i + 1])
        with torch.no_grad():
            chosen = torch.rand(layer.weight.shape).argsort(1)[:, :15]
            layer.weight.zero_().scatter_(1, chosen, torch.randn(len(layer.weight), 15))
            layer.bias.zero_()
        code = i == len(sizes) // 2 - 1
        layers += [layer] if code or i == len(sizes) - 2 else [layer, nn.Sigmoid()]
    return nn.Sequential(*layers)


def micro_batches(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs that are their own targets."""
    return [(part, part) for part in x.split(MICRO)]


class Draws:
    """Samples without replacement within a pass, and curvature samples from the whole set."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(0)
        self.order: Iterator[Tensor] = iter(())
        self.left = torch.empty(0, dtype=torch.long)

    def draw(self, count: int) -> Tensor:
        while len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(len(self.data), generator=self.generator)])
        taken, self.left = self.left[:count], self.left[count:]
        return self.data[taken]

    def sample(self, count: int) -> Tensor:
        return self.data[torch.randperm(len(self.data), generator=self.generator)[:count]]


def held_out_loss(model: nn.Module, data: Tensor) -> float:
    """Mean per image."""
    with torch.no_grad():
        return sum(float(Bernoulli()(model(x), x)) for x in data.split(MICRO)) / len(data)


def train(name: str, data: Tensor, held_out: Tensor, chosen: argparse.Namespace) -> dict[str, Any]:
    """One method's row."""
    method = METHODS[name]
    model = network(narrow=chosen.narrow)
    optimizer, draws = method.build(model), Draws(data)

    def objective(sizes: Sizes, update: int) -> Objective:
        curvature = micro_batches(draws.sample(sizes.curvature)) if isinstance(optimizer, SecondOrder) else None
        return Objective(model, Bernoulli(), micro_batches(draws.draw(sizes.gradient)), curvature, seed=update)

    training = Training(optimizer, method.sampler, len(data), objective)
    cost, reached = training.cost, None
    next_look, curve = 0.0, []
    while True:
        if cost.seconds >= next_look:
            loss = held_out_loss(model, held_out)
            curve.append((round(cost.seconds, 2), cost.updates, round(loss, 3)))
            next_look = cost.seconds if isinstance(optimizer, SecondOrder) else cost.seconds + 1.0
            if reached is None and loss <= chosen.target:
                reached = {
                    "seconds": cost.seconds, "updates": cost.updates, "products": cost.products,
                    "images": cost.touched / 1e6,
                }  # fmt: skip
            if cost.seconds >= chosen.seconds or not math.isfinite(loss) or (reached and chosen.stop):
                break
        training.update()
    return {"method": name, "reached": reached, "final_loss": loss, "updates": cost.updates, "curve": curve}


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--target", type=float, default=75.0)
    parser.add_argument("--stop", action="store_true", help="stop a method where it reaches the target")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    data = images(chosen.data)
    table = []
    print("| method | seconds to target | updates | products | million images | loss at the end (after updates) |")
    print("|---|---|---|---|---|---|")
    for name in chosen.methods:
        row = train(name, data[:50_000], data[50_000:], chosen)
        table.append(row)
        at = row["reached"]
        reached = (
            f"{at['seconds']:.1f} | {at['updates']} | {at['products']} | {at['images']:.2f}" if at else "- | - | - | -"
        )
        print(f"| {name} | {reached} | {row['final_loss']:.2f} ({row['updates']}) |", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
