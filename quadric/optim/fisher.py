"""Which Fisher matrix statistics are of: at the targets of the data, or at targets drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from quadric.objective.objective import Objective
from quadric.optim.layers import Gradient, Layer, gradients_kept

Fisher = Literal["empirical", "sampled"]


def check_fisher(fisher: Fisher) -> Fisher:
    """What it is given, unless it is none of the two."""
    if fisher not in get_args(Fisher):
        raise ValueError(f"fisher={fisher!r}: give 'empirical' or 'sampled'")
    return fisher


def check_closure(fisher: Fisher, closure: Callable[[], Any] | None) -> None:
    """Refuses a closure that draws no targets where they are wanted."""
    if fisher == "sampled" and not isinstance(closure, Objective):
        raise ValueError(
            f"closure={closure!r} draws no targets, which fisher='sampled' wants: give a quadric Objective of the "
            "batch, or build the optimiser with fisher='empirical'"
        )


def drawn(objective: Objective, draw: int, layers: Sequence[Layer]) -> list[Gradient]:
    """The gradients of layers at targets drawn from the model; afterwards the parameters have their own back."""
    with gradients_kept(objective.space.parameters):
        objective.sampled(draw)
        return [layer.gradient for layer in layers]
