"""What preconditioning, flexible conjugate gradients and growing samples save Hessian-free on a recipe's frames.

    python benchmarks/acceleration.py an4 data=PATH/an4_mfcc [--updates 12] [--seconds 600] [--methods plain lbfgs]

The frame cross-entropy of one network, each method from the same start. The target is the held-out loss after
`--updates` updates of plain Hessian-free, unless `--target` gives one; every method trains until its held-out loss is
there, or for `--seconds`. After every update the held-out frames are looked at, outside the clock.

plain: all the frames for the gradient, a fixed number for the curvature, drawn anew for every update; conjugate
gradients with Martens' truncation; Levenberg-Marquardt damping. lbfgs: preconditioned by pairs of the solve before,
spread over it (lbfgs-last: its last ones). flexible: by those and the present solve's, as they come, in flexible
conjugate gradients. geometric: samples start
at `--first-gradient` and `--first-curvature` and grow by fixed factors, the curvature's up to `--curvature`. variance:
the gradient's sample starts at `--first-gradient` and grows when the variance between its micro-batches says so, the
curvature's in proportion. bfloat16: all matrix products in that type, vectors and sums in float32.

Columns: seconds to the target, interpolated linearly between the looks before and after; then at the look after it:
updates, iterations of conjugate gradients, products with the curvature, millions of frames touched (a gradient and a
product as one, an evaluation as a third); plain's seconds over the method's; and the held-out loss at the last look
with the seconds until then. The JSON rows hold every look, from which other targets can be read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from common import Table, Training
from frames import Speech, add_speech_options, load_speech
from quadric.linalg.pairs import LastPairs, PairSelection, SpreadPairs
from quadric.objective.objective import Objective
from quadric.optim.precondition import LBFGS
from quadric.optim.sampling import FixedSizes, GeometricSizes, Sampler, Sizes, VarianceTested
from quadric.optim.second_order import SecondOrder, hessian_free

COLUMNS = ("method", "seconds", "updates", "iterations", "products", "million frames", "speed-up", "loss at the end")

Look = dict[str, float]
"""Costs so far with held-out loss and accuracy."""


def fixed(speech: Speech, chosen: argparse.Namespace) -> Sampler:
    """Plain Hessian-free's sizes."""
    return FixedSizes(speech.share(chosen.gradient), speech.share(chosen.curvature))


def geometric(speech: Speech, chosen: argparse.Namespace) -> Sampler:
    """By fixed factors, the curvature's up to plain's."""
    return GeometricSizes(
        speech.share(chosen.first_gradient), speech.share(chosen.first_curvature), chosen.gradient_growth,
        chosen.curvature_growth, most=speech.share(chosen.curvature),
    )  # fmt: skip


def variance_tested(speech: Speech, chosen: argparse.Namespace) -> Sampler:
    """By the gradient's variance, the curvature's in plain's proportion to it."""
    return VarianceTested(
        speech.share(chosen.first_gradient), min(1.0, chosen.curvature / chosen.gradient), chosen.theta
    )


@dataclass(frozen=True)
class Method:
    """A form of Hessian-free.

    Attributes:
        pairs: of the solve before that precondition the next, by how many are kept; None: no preconditioner.
        flexible: whether the conjugate gradients are.
        sampler: how much data an update sees.
        autocast: the type of its matrix products.
    """

    pairs: Callable[[int], PairSelection] | None = None
    flexible: bool = False
    sampler: Callable[[Speech, argparse.Namespace], Sampler] = fixed
    autocast: torch.dtype | None = None

    def optimizer(self, params: Iterable[nn.Parameter], chosen: argparse.Namespace) -> SecondOrder:
        preconditioner = None if self.pairs is None else LBFGS(self.pairs(chosen.pairs), self.flexible)
        return hessian_free(params, damping=chosen.damping, max_steps=chosen.max_steps, preconditioner=preconditioner)


METHODS: dict[str, Method] = {
    "plain": Method(),
    "lbfgs": Method(SpreadPairs),
    "lbfgs-last": Method(LastPairs),
    "flexible": Method(SpreadPairs, flexible=True),
    "geometric": Method(sampler=geometric),
    "variance": Method(sampler=variance_tested),
    "lbfgs+geometric": Method(SpreadPairs, sampler=geometric),
    "lbfgs+variance": Method(SpreadPairs, sampler=variance_tested),
    "flexible+geometric": Method(SpreadPairs, flexible=True, sampler=geometric),
    "flexible+variance": Method(SpreadPairs, flexible=True, sampler=variance_tested),
    "bfloat16": Method(autocast=torch.bfloat16),
    "lbfgs+variance+bfloat16": Method(SpreadPairs, sampler=variance_tested, autocast=torch.bfloat16),
}


def train(method: Method, speech: Speech, chosen: argparse.Namespace, target: float | None) -> list[Look]:
    """Looks before the first update and after every one: to the target, or for a number of updates where it is None."""
    model = speech.again()
    sampler = method.sampler(speech, chosen)

    def objective(sizes: Sizes, update: int) -> Objective:
        return speech.objective(model, sizes, update, parts=sampler.parts, autocast=method.autocast)

    optimizer = method.optimizer(model.parameters(), chosen)
    training = Training(optimizer, sampler, speech.stream.total_frames, objective)
    looks = [asdict(training.cost) | speech.look(model)]
    while True:
        loss, seconds = looks[-1]["loss"], training.cost.seconds
        ended = training.cost.updates >= chosen.updates if target is None else loss <= target
        if ended or not math.isfinite(loss) or (target is not None and seconds >= chosen.seconds):
            return looks
        training.update()
        looks.append(asdict(training.cost) | speech.look(model))


def reached(looks: Sequence[Look], target: float) -> Look | None:
    """The first look at the target, with the seconds interpolated linearly from the look before; None: there is none.

    >>> reached([{"loss": 3.0, "seconds": 0.0}, {"loss": 1.0, "seconds": 4.0}], 2.5)
    {'loss': 1.0, 'seconds': 1.0}
    """
    if looks[0]["loss"] <= target:
        return looks[0]
    for before, after in pairwise(looks):
        if after["loss"] <= target:
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            return after | {"seconds": before["seconds"] + share * (after["seconds"] - before["seconds"])}
    return None


def row(name: str, looks: list[Look], target: float, plain: float | None) -> tuple[dict[str, Any], list[str]]:
    """For the file and for the reader; ``plain`` are plain Hessian-free's seconds to the target."""
    at, last = reached(looks, target), looks[-1]
    speed_up = plain / at["seconds"] if at and plain and at["seconds"] else None
    cells = [name, *["-"] * 6]
    if at:
        counts = (f"{at[key]}" for key in ("updates", "solver_steps", "products"))
        cells = [name, f"{at['seconds']:.1f}", *counts, f"{at['touched'] / 1e6:.2f}"]
        cells.append(f"{speed_up:.2f}" if speed_up else "-")
    cells.append(f"{last['loss']:.4f} ({last['seconds']:.1f} s)")
    record = {"method": name, "target": target, "reached": at, "speed_up": speed_up, "looks": looks}
    return record, cells


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_speech_options(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
                        help=f"of {' '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--updates", type=int, default=12, help="of plain, that set the target (default: 12)")
    parser.add_argument("--target", type=float, help="held-out loss; plain is then trained only if it is a method")
    parser.add_argument("--seconds", type=float, default=600.0, help="of a method at most (default: 600)")
    for name, default, what in (
        ("--gradient", 1.0, "plain's share of the training frames for the gradient"),
        ("--curvature", 0.05, "and for the curvature"),
        ("--first-gradient", 0.1, "growing samples' first share for the gradient"),
        ("--first-curvature", 0.01, "and for the curvature, geometric"),
        ("--gradient-growth", 1.1, "factor an update, geometric"),
        ("--curvature-growth", 1.1, "factor an update, geometric"),
        ("--theta", 0.5, "of the variance's test: the relative error of the gradient that is allowed"),
        ("--damping", 1.0, "the first lambda"),
    ):
        parser.add_argument(name, type=float, default=default, help=f"{what} (default: {default})")
    parser.add_argument(
        "--max-steps", type=int, default=100, help="conjugate-gradient iterations of an update at most (default: 100)"
    )
    parser.add_argument("--pairs", type=int, default=16, help="of the L-BFGS preconditioner (default: 16)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Prints the table, and writes it."""
    chosen = parsed()
    speech = load_speech(chosen)
    plain, target, names = None, chosen.target, list(chosen.methods)
    if target is None or "plain" in names:
        first = train(METHODS["plain"], speech, chosen, target)
        target = first[-1]["loss"] if target is None else target
        at = reached(first, target)
        plain = at["seconds"] if at else None
        names = ["plain", *(name for name in names if name != "plain")]
    print(f"target: a held-out loss of {target:.4f}\n")
    table = Table(COLUMNS, chosen.json)
    for name in names:
        looks = first if name == "plain" else train(METHODS[name], speech, chosen, target)
        table.add(*row(name, looks, target, plain))


if __name__ == "__main__":
    main()
