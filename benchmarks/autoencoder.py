"""Deep autoencoders: Hessian-free with and without its accelerations, NGHF, and their peers, in one run.

    python benchmarks/autoencoder.py --data FOLDER [--dataset mnist|curves|faces] [--narrow] [--seconds 60]
        [--methods hf hf+lbfgs adam] [--rates 0.001] [--target 75] [--json FILE]

The networks of Hinton and Salakhutdinov (2006) with Martens' sparse initialisation (2010), sigmoid units and a linear
code: 784-1000-500-250-30 and back on MNIST, 784-400-200-100-50-25-6 on curves, 625-2000-1000-500-30 on faces
(`images.py` says how the last two are made). Cross-entropy of logistic outputs per image; on faces half the squared
error of linear ones. Each method trains for the same seconds (evaluations excluded) from the same start.

Hessian-free takes the gradient on all data, the curvature on 5,000 images and up to 150 iterations of conjugate
gradients; `+sampling` starts at 1,000 and 250 images, which grow by 3 % an update, with up to 15 iterations, and `+all`
adds a diagonal preconditioner to that. nghf starts at 1,000 and 500, with twice eight iterations. Adam and SGD
(Nesterov's momentum, 0.9) take minibatches of 200 at each of ``--rates``; the row with the lowest final training loss
is the method's best, named at the end. L-BFGS is torch's, on all data, with a history of 20 and a search by the strong
Wolfe conditions. `pytorch-hessian-free` is https://github.com/ltatzel/PyTorchHessianFree with the settings it comes
with, on the same data as hf; where it is not installed (it needs BackPACK; the `hessianfree` of the package index is
another) it is left out. Columns:

- products: with the curvature; million images: touched by forward and reverse passes together, a product as one and
  an evaluation as a third. A dash: the method does not tell.
- training loss: mean per image, on 10,000 fixed images of the training set; training error: their squared
  reconstruction error per image, as the papers report it. The same two of the held-out images.
- s to target: seconds, evaluations excluded, until the training loss was first seen at ``--target`` or below.

The JSON file has each row's curve beside: seconds, updates, training loss, held-out loss.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Table, Training
from images import SETS, Images
from quadric.linalg.pairs import SpreadPairs
from quadric.loss.loss import Bernoulli, Loss, SquaredError
from quadric.objective.objective import MicroBatch, Objective
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner
from quadric.optim.sampling import FixedSizes, GeometricSizes, Sampler, Sizes
from quadric.optim.second_order import SecondOrder, hessian_free, nghf

MICRO = 5000
"""Images of a micro-batch."""
EVALUATED = 10_000
"""Images of the training set whose loss is reported."""
LOOKS = 100
"""Evaluations in a run, at most."""
ALL = 1 << 40


class Batches(Objective):
    """An objective that shows its data, to optimisers that want to see it.

    Attributes:
        shown: micro-batches of the gradient and of the curvature.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, gradient: list[MicroBatch], curvature: list[MicroBatch] | None, seed: int
    ) -> None:
        super().__init__(model, loss, gradient, curvature, seed=seed)
        self.shown = gradient, curvature


class PyTorchHessianFree(torch.optim.Optimizer):
    """The package of that name with the settings it comes with, stepped by an objective."""

    def __init__(self, model: nn.Module) -> None:
        from hessianfree.optimizer import HessianFree

        super().__init__(model.parameters(), {})
        self.inner = HessianFree(model.parameters())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        objective: Batches = closure
        gradient, curvature = objective.shown

        def mean(output: Tensor, target: Tensor) -> Tensor:
            return objective.loss(output, target) / len(target)

        with torch.enable_grad():
            self.inner.acc_step(objective.model, mean, gradient, mvp_datalist=curvature, reduction="mean")


@dataclass(frozen=True)
class Method:
    """An optimiser and how much data a step of it sees.

    Attributes:
        build: makes the optimiser, of a learning rate where it is tuned.
        sampler: of a step's data.
        tuned: whether it is run at each of the rates.
        tells: whether its products and evaluations are known.
    """

    build: Callable[[nn.Module, float], torch.optim.Optimizer]
    sampler: Sampler
    tuned: bool = False
    tells: bool = True


def _hessian_free(preconditioner: Preconditioner | None, model: nn.Module, max_steps: int = 150) -> SecondOrder:
    return hessian_free(model.parameters(), max_steps=max_steps, preconditioner=preconditioner)


def _lbfgs(model: nn.Module) -> torch.optim.LBFGS:
    # Five iterations a call: each call evaluates where the last one ended once more.
    return torch.optim.LBFGS(model.parameters(), max_iter=5, history_size=20, line_search_fn="strong_wolfe")


def _sgd(model: nn.Module, rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)


FIXED = FixedSizes(ALL, 5_000)
GROWING = GeometricSizes(1_000, 250, 1.03, 1.03, most=5_000)
FEW = 15
"""Iterations on samples that grow: more of them fit a small sample."""
PAIRS = SpreadPairs(16)
METHODS: dict[str, Method] = {
    "hf": Method(lambda model, _: _hessian_free(None, model), FIXED),
    "hf+diagonal": Method(lambda model, _: _hessian_free(FisherDiagonal(), model), FIXED),
    "hf+lbfgs": Method(lambda model, _: _hessian_free(LBFGS(PAIRS), model), FIXED),
    "hf+flexible": Method(lambda model, _: _hessian_free(LBFGS(PAIRS, changes=True), model), FIXED),
    "hf+sampling": Method(lambda model, _: _hessian_free(None, model, FEW), GROWING),
    "hf+all": Method(lambda model, _: _hessian_free(FisherDiagonal(draws=1), model, FEW), GROWING),
    "nghf": Method(lambda model, _: nghf(model.parameters()), GeometricSizes(1_000, 500, 1.03, 1.03, most=5_000)),
    "adam": Method(lambda model, rate: torch.optim.Adam(model.parameters(), lr=rate), FixedSizes(200), tuned=True),
    "sgd": Method(_sgd, FixedSizes(200), tuned=True),
    "lbfgs": Method(lambda model, _: _lbfgs(model), FixedSizes(ALL)),
    "pytorch-hessian-free": Method(lambda model, _: PyTorchHessianFree(model), FIXED, tells=False),
}
"""Of Hessian-free as in Martens (2010): all data for the gradient, a part for the curvature."""


def network(images: Images, *, narrow: bool) -> nn.Sequential:
    """An encoder and its mirror image, sparsely initialised: 15 incoming weights a unit, N(0, 1)."""
    torch.manual_seed(0)
    pixels, *widths, code = images.sizes
    widths = [width // (images.narrower if narrow else 1) for width in widths]
    sizes = [pixels, *widths, code, *widths[::-1], pixels]
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layer = nn.Linear(sizes[i], sizes[i + 1])
        with torch.no_grad():
            chosen = torch.rand(layer.weight.shape).argsort(1)[:, :15]
            layer.weight.zero_().scatter_(1, chosen, torch.randn(chosen.shape))
            layer.bias.zero_()
        linear = i in (len(sizes) // 2 - 1, len(sizes) - 2)
        layers += [layer] if linear else [layer, nn.Sigmoid()]
    return nn.Sequential(*layers)


def micro_batches(x: Tensor) -> list[MicroBatch]:
    """Inputs that are their own targets."""
    return [(part, part) for part in x.split(MICRO)]


class Draws:
    """Samples without replacement within a pass, and curvature samples from the whole set."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(0)
        self.left = torch.empty(0, dtype=torch.long)

    def draw(self, count: int) -> Tensor:
        while len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(len(self.data), generator=self.generator)])
        taken, self.left = self.left[:count], self.left[count:]
        return self._at(taken)

    def sample(self, count: int) -> Tensor:
        return self._at(torch.randperm(len(self.data), generator=self.generator)[:count])

    def _at(self, places: Tensor) -> Tensor:
        return self.data[places.to(self.data.device)]


@torch.no_grad()
def measures(model: nn.Module, loss: Loss, data: Tensor) -> tuple[float, float]:
    """The loss and the squared reconstruction error, means per image."""
    total = error = 0.0
    for x in data.split(MICRO):
        output = model(x)
        total += float(loss(output, x))
        error += float(((output.sigmoid() if isinstance(loss, Bernoulli) else output) - x).square().sum())
    return total / len(data), error / len(data)


def train(name: str, rate: float, images: Images, chosen: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    method, loss = METHODS[name], Bernoulli() if images.logistic else SquaredError()
    seen, unseen = images.training[:EVALUATED], images.held_out
    model = network(images, narrow=chosen.narrow).to(seen.device)
    draws = Draws(images.training)

    def objective(sizes: Sizes, update: int) -> Batches:
        curvature = micro_batches(draws.sample(sizes.curvature)) if sizes.curvature else None
        return Batches(model, loss, micro_batches(draws.draw(sizes.gradient)), curvature, update)

    training = Training(method.build(model, rate), method.sampler, len(images.training), objective)
    cost, next_look, reached = training.cost, 0.0, None
    curve = []
    while True:
        over = cost.seconds >= chosen.seconds
        if cost.seconds >= next_look or over:
            training_loss, training_error = measures(model, loss, seen)
            held_out_loss, held_out_error = measures(model, loss, unseen)
            curve.append((round(cost.seconds, 3), cost.updates, _known(training_loss), _known(held_out_loss)))
            next_look = cost.seconds + chosen.seconds / LOOKS
            if reached is None and chosen.target is not None and training_loss <= chosen.target:
                reached = cost.seconds
            if over or not math.isfinite(training_loss) or (reached is not None and chosen.stop):
                break
        training.update()
    return {
        "dataset": chosen.dataset, "method": name, "rate": rate if method.tuned else None, "seconds": cost.seconds,
        "updates": cost.updates, "products": cost.products if method.tells else None,
        "million_images": cost.touched / 1e6 if method.tells else None,
        "training_loss": _known(training_loss), "training_error": _known(training_error),
        "held_out_loss": _known(held_out_loss), "held_out_error": _known(held_out_error),
        "seconds_to_target": reached, "curve": curve,
    }  # fmt: skip


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


COLUMNS = [
    "method", "rate", "s", "updates", "products", "million images", "training loss", "training error",
    "held-out loss", "held-out error", "s to target",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row for the reader."""
    formats = {
        "method": "", "rate": ".2g", "seconds": ".1f", "updates": "d", "products": "d", "million_images": ".2f",
        "training_loss": ".3f", "training_error": ".3f", "held_out_loss": ".3f", "held_out_error": ".3f",
        "seconds_to_target": ".1f",
    }  # fmt: skip
    return ["-" if row[name] is None else format(row[name], how) for name, how in formats.items()]


def mark_best(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Marks the best rate of each method that has rates, by the final training loss, and returns these rows."""
    best = []
    for name in dict.fromkeys(row["method"] for row in table if row["rate"] is not None):
        rows = [row for row in table if row["method"] == name and row["training_loss"] is not None]
        for row in rows:
            row["best"] = row is min(rows, key=lambda row: row["training_loss"])
        best += [row for row in rows if row["best"]]
    return best


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder that holds mnist/ and orl_faces/; curves need none")
    parser.add_argument("--dataset", default="mnist", choices=list(SETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--target", type=float, help="a training loss")
    parser.add_argument("--stop", action="store_true", help="stop a method where it reaches the target")
    parser.add_argument("--narrow", action="store_true", help="halve the widths but the code's, quarter those of faces")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="learning rates of Adam and SGD"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.data is None and chosen.dataset != "curves":
        sys.exit(f"--dataset {chosen.dataset} is read from files: give their folder with --data")
    return chosen


def main() -> None:
    """Prints the table, and writes it."""
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    images = SETS[chosen.dataset](chosen.data).to(torch.device(chosen.device))
    table = Table(COLUMNS, chosen.json)
    best: list[dict[str, Any]] = []
    for name in chosen.methods:
        for rate in chosen.rates if METHODS[name].tuned else [math.nan]:
            try:
                row = train(name, rate, images, chosen)
            except ImportError as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr, flush=True)
                continue
            best = mark_best([*table.rows, row])
            table.add(row, cells(row))
    for row in best if len(chosen.rates) > 1 else []:
        print(f"\nthe best rate of {row['method']}: {row['rate']:.2g}")


if __name__ == "__main__":
    main()
