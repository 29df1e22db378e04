"""How many iterations of conjugate gradients preconditioners save, on one quadratic model for all of them.

    python benchmarks/preconditioners.py --data FOLDER [--steps 20 300] [--damping 1 0.01] [--threads 1] [--json FILE]

The MNIST autoencoder (784-1000-500-250-30 and back, a quarter as wide, tanh units, logistic loss per image) is trained
by mini-block Fisher for so many steps of 500 images. There, on 2,000 images, (G + lambda I) x = -g with the
Gauss-Newton matrix G is solved from zero: without a preconditioner; with the diagonal of the Fisher matrix (exponent
3/4); by L-BFGS with 16 pairs of a solve on 2,000 other images, ten steps before; and with the inverses of the
block-diagonal family on the same 2,000 images: KFAC, and mini-blocks of the gradients of single images.

The columns are the iterations after which the quadratic model has fallen by so much of the lowest value that any of the
runs has reached, and the time it took to make the preconditioner, in products with the curvature.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import Table, now
from quadric.data.image_sets import mnist
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Shifted
from quadric.linalg.pairs import Pair, SpreadPairs
from quadric.linalg.solver import Iterate
from quadric.linalg.truncation import FixedIterations
from quadric.loss.loss import Bernoulli
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.optim.block_inverse import BlockCurvature
from quadric.optim.descent import LocalModel
from quadric.optim.kfac import KroneckerFactors
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
ITERATIONS = 100
BEFORE = 10
"""Steps between the solve whose pairs make the L-BFGS inverse and the one it preconditions."""

PRECONDITIONERS: dict[str, Preconditioner | None] = {
    "none": None,
    "diagonal": FisherDiagonal(),
    "L-BFGS": LBFGS(),
    "KFAC": BlockCurvature(KroneckerFactors()),
    "mini-blocks": BlockCurvature(MiniBlocks(per_example=True)),
}


def network() -> nn.Sequential:
    """The autoencoder."""
    sizes = [784, 250, 125, 62, 30, 62, 125, 250, 784]
    layers: list[nn.Module] = []
    for i in range(8):
        layers += [nn.Linear(sizes[i], sizes[i + 1])] + ([] if i in (3, 7) else [nn.Tanh()])
    return nn.Sequential(*layers)


def objective(model: nn.Module, images: Tensor) -> Objective:
    """In micro-batches of 500."""
    return Objective(model, Bernoulli(), [(part, part) for part in images.split(500)])


def system(model: nn.Module, images: Tensor, damping: float) -> tuple[Objective, LocalModel, Shifted]:
    """The quadratic model, and its damped curvature."""
    made = objective(model, images)
    theta = made.space.point()
    value, gradient = made.value_and_grad(theta)
    curvature = made.curvature(theta, Curvature.GAUSS_NEWTON)
    return made, LocalModel(theta, value, gradient, curvature), Shifted(curvature, damping)


def pairs_of(model: nn.Module, images: Tensor, damping: float) -> tuple[Pair, ...]:
    """Of a solve without a preconditioner."""
    _, local, damped = system(model, images, damping)
    solver = ConjugateGradient(ITERATIONS, FixedIterations(ITERATIONS), 1.3, SpreadPairs(16))
    return solver.solve(damped, -local.gradient).pairs


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds mnist/")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 300])
    parser.add_argument("--damping", type=float, nargs="+", default=[1.0, 0.01])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    images = mnist(chosen.data / "mnist").training
    columns = (
        "steps",
        "loss",
        "damping",
        "preconditioner",
        *(f"to {share:.0%}" for share in SHARES),
        "made in products",
    )
    table, model = Table(columns, chosen.json), network()
    optimizer = mini_block_fisher(model)
    done, pairs = 0, {}
    for steps in sorted(chosen.steps):
        while done < steps:
            if done == max(0, steps - BEFORE):
                pairs = {damping: pairs_of(model, images[2_000:4_000], damping) for damping in chosen.damping}
            x = images[torch.randint(len(images), (500,))]
            optimizer.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)
            loss.backward()
            optimizer.step()
            done += 1
        for damping in chosen.damping:
            for row in compare(model, images[:2_000], damping, pairs[damping]):
                told = ["never" if n is None else str(n) for n in row["iterations"]]
                cells = [str(steps), f"{loss.item():.1f}", f"{damping:g}", row["preconditioner"], *told]
                table.add({"steps": steps, "damping": damping, **row}, [*cells, f"{row['products']:.1f}"])


def compare(model: nn.Module, images: Tensor, damping: float, pairs: tuple[Pair, ...]) -> list[dict[str, Any]]:
    """A row for each preconditioner."""
    made, local, damped = system(model, images, damping)
    product = _seconds(lambda: damped @ local.gradient)[0]
    found: dict[str, tuple[list[float], float]] = {}
    for name, preconditioner in PRECONDITIONERS.items():
        build = preconditioner.operator if preconditioner is not None else lambda *_: None
        seconds, M = _seconds(partial(build, made, local, pairs, damping))
        points = ConjugateGradient(ITERATIONS, FixedIterations(ITERATIONS)).iterates(damped, -local.gradient, M=M)
        values = [point.model for point in points if isinstance(point, Iterate)]
        found[name] = values, seconds / product if preconditioner is not None else 0.0
    lowest = min(min(values) for values, _ in found.values())
    return [
        {
            "preconditioner": name,
            "iterations": [next((k for k, q in enumerate(values) if q <= s * lowest), None) for s in SHARES],
            "lowest": min(values),
            "products": products,
        }
        for name, (values, products) in found.items()
    ]


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = now()
    done = work()
    return now() - start, done


if __name__ == "__main__":
    main()
