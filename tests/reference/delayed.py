"""Asynchronous training of one vector in an explicit order of events, by plain loops in float64.

``order`` names the worker that does each unit, one after the other. A worker computes at the parameters that came back
with its own last push, or that it has pulled before its first; in between, others have pushed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from quadric.parallel.exchange import NO_UNIT

Gradient = Callable[[np.ndarray, int], np.ndarray]
"""At a point, of the minibatch of a number."""


class Sent(NamedTuple):
    """By a process of a worker, of a unit."""

    worker: int
    incarnation: int
    sequence: int
    unit: int
    vector: np.ndarray


class Averaged(NamedTuple):
    theta: np.ndarray
    average: np.ndarray
    ages: list[int]


def xu_rate(t: int, lr: float, a: float, power: float) -> float:
    """Of step t = 1, 2, ... (You and Xu, 2014)."""
    return lr * (1 + a * lr * t) ** -power


def once(theta: np.ndarray, sent: Sequence[Sent], *, lr: float, a: float, power: float) -> Averaged:
    """What a server has that takes each push once and each unit once, and nothing of processes that were replaced."""
    theta, total, t = theta.copy(), np.zeros_like(theta), 0
    processes: dict[int, int] = {}
    pushes: set[tuple[int, int, int]] = set()
    units: set[int] = set()
    for push in sent:
        key = push[:3]
        replaced = push.incarnation < processes.get(push.worker, 0)
        if replaced or key in pushes or push.unit in units:
            continue
        processes[push.worker] = push.incarnation
        pushes.add(key)
        if push.unit != NO_UNIT:
            units.add(push.unit)
        t += 1
        theta = theta - xu_rate(t, lr, a, power) * push.vector
        total = total + theta
    return Averaged(theta, total / t if t else theta, [])


def averaged_sgd(
    theta: np.ndarray,
    order: Sequence[int],
    gradient: Gradient,
    *,
    every: int,
    lr: float,
    a: float = 0.0,
    power: float = 0.75,
    scaled: bool = False,
    bound: int | None = None,
    clip: float | None = None,
    begun: Sequence[int] = (),
) -> Averaged:
    """Workers send sums of gradients along plain steps of their own; the server steps by its own clock.

    A sum older than ``bound`` pushes is computed again at what the server has then. ``scaled`` divides a step by the
    age of its sum, where that is more than one (Zhang et al., 2016). Sums longer than ``clip`` are shortened to it.
    Workers that have ``begun`` have pulled before anybody has pushed.
    """
    theta, total, t = theta.copy(), np.zeros_like(theta), 0
    at: dict[int, tuple[np.ndarray, int]] = dict.fromkeys(begun, (theta, t))
    ages = []
    for unit, worker in enumerate(order):
        x, clock = at.get(worker) or (theta, t)
        if bound is not None and t - clock > bound:
            x, clock = theta, t
        moved, vector = x.copy(), np.zeros_like(theta)
        for minibatch in range(unit * every, (unit + 1) * every):
            g = gradient(moved, minibatch)
            vector = vector + g
            moved = moved - xu_rate(clock + 1, lr, a, power) * g
        if clip is not None and np.linalg.norm(vector) > clip:
            vector = vector * clip / np.linalg.norm(vector)
        age = t - clock
        ages.append(age)
        t += 1
        theta = theta - xu_rate(t, lr, a, power) / (age if scaled and age > 1 else 1) * vector
        total = total + theta
        at[worker] = theta, t
    return Averaged(theta, total / t, ages)


def momentum(
    theta: np.ndarray, order: Sequence[int], gradient: Gradient, *, every: int, lr: float, beta: float
) -> np.ndarray:
    """Workers send the mean of gradients at one point; the server's steps have momentum."""
    theta, v = theta.copy(), np.zeros_like(theta)
    at: dict[int, np.ndarray] = {}
    for unit, worker in enumerate(order):
        x = at.get(worker, theta)
        v = beta * v + sum(gradient(x, m) for m in range(unit * every, (unit + 1) * every)) / every
        theta = theta - lr * v
        at[worker] = theta
    return theta


def elastic(
    theta: np.ndarray, order: Sequence[int], gradient: Gradient, *, every: int, lr: Callable[[int], float], alpha: float
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Asynchronous EASGD (Zhang, Choromanska and LeCun, 2015): the centre, and the parameters of each worker.

    ``lr`` is that of a minibatch, by its number.
    """
    center, own = theta.copy(), dict[int, np.ndarray]()
    for unit, worker in enumerate(order):
        x = own.get(worker, center).copy()
        for minibatch in range(unit * every, (unit + 1) * every):
            x = x - lr(minibatch) * gradient(x, minibatch)
        d = alpha * (x - center)
        own[worker], center = x - d, center + d
    return center, own


def outer_nesterov(
    theta: np.ndarray,
    order: Sequence[int],
    gradient: Gradient,
    *,
    every: int,
    lr: Callable[[int], float],
    outer: float,
    beta: float,
) -> np.ndarray:
    """Local steps, whose sum is a gradient to the server (Douillard et al., 2023), asynchronous."""
    theta, v = theta.copy(), np.zeros_like(theta)
    at: dict[int, np.ndarray] = {}
    for unit, worker in enumerate(order):
        start = at.get(worker, theta)
        x = start.copy()
        for minibatch in range(unit * every, (unit + 1) * every):
            x = x - lr(minibatch) * gradient(x, minibatch)
        delta = start - x
        v = beta * v + delta
        theta = theta - outer * (delta + beta * v)
        at[worker] = theta
    return theta
