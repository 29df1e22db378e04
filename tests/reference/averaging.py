"""Averaged SGD, entry by entry, by Python's own floats: the recursion as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def averaged(
    theta: Sequence[float],
    gradient: Callable[[int, list[float]], list[float]],
    steps: int,
    *,
    lr: Callable[[int], float],
    a: float,
    power: float,
    start: int,
    weight_decay: float,
) -> tuple[list[float], list[float]]:
    """The iterate and the average after so many steps; ``gradient`` is of the step, from 1, and the iterate."""
    theta, average = list(theta), list(theta)
    for t in range(1, steps + 1):
        eta = lr(t) * (1 + a * lr(1) * t) ** -power
        g = gradient(t, theta)
        for i in range(len(theta)):
            theta[i] = (1 - weight_decay * eta) * theta[i] - eta * g[i]
            average[i] += (theta[i] - average[i]) / max(1, t - start)
    return theta, average


def mean_of_every(iterates: Sequence[float], start: int, every: int) -> float:
    """Of those after start + every, start + 2 every, ... steps; the last of all while there is none."""
    taken = [x for t, x in enumerate(iterates, start=1) if t > start and (t - start) % every == 0]
    return sum(taken) / len(taken) if taken else iterates[-1]
