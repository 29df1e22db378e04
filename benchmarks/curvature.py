"""The price of a Gauss-Newton product, as a multiple of a gradient on the same data.

    python benchmarks/curvature.py [--threads 2] [--repeats 7]

Three ways in one run: the operator of the library (two retained reverse passes), the same product by
``torch.func.jvp`` and ``vjp`` anew each time, and a gradient. Medians; one float32 network per row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import DNN, TDNN
from quadric.objective.objective import Objective

FRAMES, CLASSES = 4000, 120


def networks() -> dict[str, TDNN]:
    """The networks of the table."""
    return {
        "DNN 4x640, window 21": DNN(40, CLASSES, [640] * 4, context=10),
        "TDNN 5x512": TDNN(40, CLASSES, [512] * 5),
        "TDNN 5x512, layer norm": TDNN(40, CLASSES, [512] * 5, norm="layer"),
        "TDNN 5x512, sigmoid": TDNN(40, CLASSES, [512] * 5, activation="sigmoid"),
    }


def recomputed(model: nn.Module, objective: Objective, inputs: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> Gv by a forward-mode and a reverse-mode pass, each from the start."""
    space, theta = objective.space, objective.space.point()
    loss = CrossEntropy()

    def product(v: Tensor) -> Tensor:
        parameters = dict(space.views(theta))

        def forward(p: dict[str, Tensor]) -> Tensor:
            return functional_call(model, p, (inputs,))

        output, tangent = jvp(forward, (parameters,), (dict(space.views(v)),))
        curved = loss.curvature(output, target, tangent)
        (gradient,) = vjp(forward, parameters)[1](curved)
        return space.flatten(gradient[name] for name in space.names) / objective.curvature_frames

    return product


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median over ``repeats``, after one run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print("| network | parameters | gradient, frames/s | product / gradient | jvp + vjp / gradient | difference |")
    print("|---|---|---|---|---|---|")
    for name, model in networks().items():
        torch.manual_seed(0)
        model = model.to(chosen.device)
        frames = model.left_context + 50 + model.right_context
        inputs = torch.randn(FRAMES // 50, frames, 40, device=chosen.device)
        target = torch.randint(CLASSES, (FRAMES // 50, 50), device=chosen.device)
        objective = Objective(model, CrossEntropy(), [(inputs, target)])
        theta = objective.space.point()
        v = torch.randn_like(theta)
        operator, again = objective.curvature(theta), recomputed(model, objective, inputs, target)
        difference = float((operator @ v - again(v)).norm() / again(v).norm())
        gradient = seconds(lambda o=objective, t=theta: o.value_and_grad(t), chosen.repeats)
        retained = seconds(lambda o=operator, x=v: o @ x, chosen.repeats)
        anew = seconds(lambda f=again, x=v: f(x), chosen.repeats)
        print(
            f"| {name} | {len(theta):,} | {FRAMES / gradient:,.0f} | {retained / gradient:.2f} | {anew / gradient:.2f} "
            f"| {difference:.0e} |"
        )


if __name__ == "__main__":
    main()
