"""How many iterations of conjugate gradients NGHF needs, with and without the scaling of its products.

    python benchmarks/iterations.py an4 data=PATH/an4_mfcc [--updates 10] [--iterations 1 2 3 5 8 16 50 200]

Haider et al. (2021) report that 5 to 8 iterations do what 200 did, once every v is given the length of theta before
its product (section 4.2): without, what is small beside theta is lost in rounding. Here a network learns a recipe's
frames by AdamW for `--warm` epochs, as cross-entropy comes first in the paper; then from there, for every number of
iterations, with the scaling and without and in every `--precision` of the matrix products, it takes `--updates`
updates on the same frames. The held-out frames are looked at before and after, outside the clock, in float32.

`--method`: nghf, natural gradient and then Hessian-free; ng, natural gradient alone; hf, the same short run on the
Gauss-Newton matrix. All choose the best iterate on the curvature's frames; nghf rests at a damping of 0.01, the others
at none, unless `--damping` fixes it (0 is the paper's). `--candidates backwards` evaluates them from the last until the
loss rises. hessian_free: that of Martens with two iterations for each of
nghf's one, and Levenberg-Marquardt damping from 0.3 on.

Columns: precision, iterations of each run, scaling, held-out loss, held-out frames right, seconds of all updates,
updates accepted of all. The first row is the start. The JSON rows also count how updates and solves ended, products,
evaluations and frames touched.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import Table, Training
from frames import Speech, add_speech_options, load_speech
from quadric.objective.curvature import Curvature, CurvatureOperator
from quadric.objective.objective import Objective
from quadric.optim.damping import Fixed
from quadric.optim.sampling import FixedSizes
from quadric.optim.search import BestIterate
from quadric.optim.second_order import SecondOrder, hessian_free, natural_gradient, nghf

METHODS: dict[str, Callable[..., SecondOrder]] = {
    "nghf": nghf,
    "ng": natural_gradient,
    "hf": partial(natural_gradient, metric=Curvature.GAUSS_NEWTON),
    "hessian_free": lambda params, iterations: hessian_free(params, damping=0.3, max_steps=2 * iterations),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of matrix products, by autocast."""


class Unscaled(Objective):
    """An objective whose curvature takes every v as it is."""

    def curvatures(self, theta: Tensor, kinds: Sequence[Curvature]) -> list[CurvatureOperator]:
        operators = super().curvatures(theta, kinds)
        for operator in operators:
            operator.scale = 0.0
        return operators


def warm(speech: Speech, chosen: argparse.Namespace) -> Speech:
    """The same frames, with the model trained by AdamW."""
    model = speech.again()
    training = Training(
        torch.optim.AdamW(model.parameters(), lr=chosen.lr),
        FixedSizes(chosen.batch),
        speech.stream.total_frames,
        partial(speech.objective, model),
    )
    while speech.stream.epoch < chosen.warm:
        training.update()
    return Speech(model, speech.stream, speech.held_out)


def train(
    speech: Speech, chosen: argparse.Namespace, precision: str, iterations: int, kind: type[Objective]
) -> dict[str, Any]:
    """One row: a number of updates from the start."""
    model = speech.again()
    damping = {} if chosen.damping is None else {"damping": Fixed(chosen.damping)}
    optimizer = METHODS[chosen.method](model.parameters(), iterations=iterations, **damping)
    if isinstance(optimizer.search, BestIterate):
        optimizer.search = BestIterate(candidates=chosen.candidates)
    training = Training(
        optimizer,
        FixedSizes(speech.share(chosen.gradient), speech.share(chosen.curvature)),
        speech.stream.total_frames,
        partial(speech.objective, model, autocast=PRECISIONS[precision], kind=kind),
    )
    outcomes: Counter[str] = Counter()
    solvers: Counter[str] = Counter()
    evaluations = 0
    for _ in range(chosen.updates):
        training.update()
        assert optimizer.diagnosis is not None
        outcomes[optimizer.diagnosis.outcome.name.lower()] += 1
        solvers[optimizer.diagnosis.solver.name.lower()] += 1
        evaluations += optimizer.diagnosis.evaluations
    ends = {"outcomes": dict(outcomes), "solvers": dict(solvers), "evaluations": evaluations}
    return asdict(training.cost) | speech.look(model) | ends


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_speech_options(parser)
    parser.add_argument("--method", choices=list(METHODS), default="nghf", help="(default: %(default)s)")
    parser.add_argument("--damping", type=float, help="fixed, as a share of the curvature (default: the method's rule)")
    parser.add_argument("--candidates", choices=("all", "backwards"), default="all",
                        help="the iterates that are evaluated (default: all)")  # fmt: skip
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 3, 5, 8, 16, 50, 200], metavar="N",
                        help="of each run of conjugate gradients (default: 1 2 3 5 8 16 50 200)")  # fmt: skip
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["float32"],
                        help="of matrix products (default: float32)")  # fmt: skip
    parser.add_argument("--scaling", nargs="+", choices=("with", "without"), default=["with", "without"],
                        help="(default: both)")  # fmt: skip
    parser.add_argument("--updates", type=int, default=10, help="(default: 10)")
    parser.add_argument("--gradient", type=float, default=0.125,
                        help="share of the training frames for an update's gradient (default: 0.125)")  # fmt: skip
    parser.add_argument("--curvature", type=float, default=0.02,
                        help="and for its curvature and the choice among the iterates (default: 0.02)")  # fmt: skip
    parser.add_argument("--warm", type=float, default=1.0, help="epochs of AdamW before (default: 1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW (default: 0.001)")
    parser.add_argument("--batch", type=int, default=2048, help="frames of an update of AdamW (default: 2048)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Prints the table, and writes it."""
    chosen = parsed()
    speech = warm(load_speech(chosen), chosen)
    columns = ("precision", "iterations", "scaling", "held-out loss", "frames right", "seconds", "accepted")
    table = Table(columns, chosen.json)
    start = speech.look(speech.model)
    scores = [f"{start['loss']:.4f}", f"{start['accuracy']:.1%}"]
    table.add({"method": "start", **start}, ["start", "-", "-", *scores, "-", "-"])
    for precision in chosen.precision:
        for iterations in chosen.iterations:
            for scaling in chosen.scaling:
                kind = Objective if scaling == "with" else Unscaled
                found = train(speech, chosen, precision, iterations, kind)
                place = {"method": chosen.method, "precision": precision, "iterations": iterations, "scaling": scaling}
                scores = [f"{found['loss']:.4f}", f"{found['accuracy']:.1%}", f"{found['seconds']:.1f}"]
                accepted = f"{found['accepted']} of {found['updates']}"
                table.add(place | found, [precision, str(iterations), scaling, *scores, accepted])


if __name__ == "__main__":
    main()
