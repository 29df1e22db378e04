"""Sums over the paths of a lattice, slow and plain: the twins of quadric.lattice.expectation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quadric.lattice.lattice import Lattice


def paths(lattice: Lattice) -> Iterator[tuple[int, ...]]:
    """The arcs of every path."""

    def extend(state: int, arcs: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(arcs) == lattice.num_frames:
            yield arcs
            return
        for arc in np.flatnonzero(lattice.source == state):
            yield from extend(int(lattice.target[arc]), (*arcs, int(arc)))

    yield from extend(0, ())


class Listed(NamedTuple):
    """What :class:`quadric.lattice.expectation.PathSums` has, and more."""

    log_z: float
    mean: float
    occupancy: np.ndarray
    derivative: np.ndarray
    curvature: np.ndarray
    """Of the mean, along the direction."""
    arcs: np.ndarray
    """The posterior of every arc."""


def list_paths(lattice: Lattice, scores: np.ndarray, value: np.ndarray, direction: np.ndarray | None = None) -> Listed:
    """The definitions, with every path written out; some path must be allowed."""
    direction = np.zeros_like(scores) if direction is None else direction
    listed = list(paths(lattice))
    first_end = lattice.num_states - len(lattice.final)
    frames = np.arange(lattice.num_frames)
    totals, values, directions = [], [], []
    for path in listed:
        arcs = list(path)
        end = int(lattice.target[arcs[-1]]) - first_end
        on_path = scores[frames, lattice.pdf[arcs]]
        totals.append(lattice.weight[arcs].astype(np.float64).sum() + on_path.sum() + lattice.final[end])
        values.append(value[arcs].sum())
        directions.append(direction[frames, lattice.pdf[arcs]].sum())
    log_z = float(np.logaddexp.reduce(totals))
    p = np.exp(np.array(totals) - log_z)
    mean = float(p @ np.array(values))
    above, along = np.array(values) - mean, np.array(directions) - p @ np.array(directions)
    occupancy, derivative, curvature = (np.zeros(scores.shape) for _ in range(3))
    posterior = np.zeros(lattice.num_arcs)
    for i, path in enumerate(listed):
        for t, arc in enumerate(path):
            at = t, int(lattice.pdf[arc])
            posterior[arc] += p[i]
            occupancy[at] += p[i]
            derivative[at] += p[i] * above[i]
            curvature[at] += p[i] * (above[i] * along[i] - (p * above) @ along)
    return Listed(log_z, mean, occupancy, derivative, curvature, posterior)


def log_z_by_recursion(lattice: Lattice, arc_scores: Tensor) -> Tensor:
    """``log Z`` of scores [A] by a forward recursion over states, of logarithms, that autograd differentiates."""
    alpha = [arc_scores.new_zeros(())]
    for state in range(1, lattice.num_states):
        into = np.flatnonzero(lattice.target == state)
        alpha.append(torch.logsumexp(torch.stack([alpha[lattice.source[a]] + arc_scores[a] for a in into]), 0))
    ends = torch.stack(alpha[-len(lattice.final) :]) + torch.as_tensor(lattice.final, dtype=arc_scores.dtype)
    return torch.logsumexp(ends, 0)


def arc_scores(lattice: Lattice, scores: Tensor) -> Tensor:
    """The whole score of every arc."""
    weight = torch.as_tensor(lattice.weight, dtype=scores.dtype)
    return weight + scores[torch.as_tensor(lattice.frame).long(), torch.as_tensor(lattice.pdf).long()]


def mean_by_autograd(lattice: Lattice, scores: Tensor, value: Tensor) -> Tensor:
    """The mean of a value: how log Z changes as the arcs' scores change by it."""
    moved = arc_scores(lattice, scores)
    step = torch.zeros((), dtype=scores.dtype, requires_grad=True)
    log_z = log_z_by_recursion(lattice, moved + step * value)
    (mean,) = torch.autograd.grad(log_z, step, create_graph=True)
    return mean
