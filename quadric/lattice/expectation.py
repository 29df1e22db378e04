"""Expectations over the paths of a lattice: log Z, the mean of a value along a path, and their derivatives.

The score of a path is ``sum_t (weight[a_t] + scores[t, pdf[a_t]]) + final[end]``; its probability is the exponential
of its score over their sum, Z. Of a value that adds up along a path, such as the accuracy of its phones, one
forward-backward pass gives the mean and the derivative of the mean with respect to the scores, by the first-order
expectation semiring; a second value, a direction of the scores, and the two values' product give the derivative of
that in the direction, by the second-order semiring.

=============================== ================================================================================
log Z, occupancy                L. R. Rabiner, "A tutorial on hidden Markov models", Proc. IEEE 77(2), 1989,
                                equations (19) to (27)
mean, derivative                D. Povey, "Discriminative training for large vocabulary speech recognition", PhD
                                thesis, University of Cambridge, 2003: minimum phone error, gamma_a (c_a - c_avg)
``mean_curvature``              Z. Li and J. Eisner, "First- and second-order expectation semirings", EMNLP 2009
=============================== ================================================================================

Nothing is pruned. Sums are in float64, of scaled probabilities where these keep every path, and else of logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float64

from quadric.lattice import kernels
from quadric.lattice.lattice import Lattice

Item = tuple[Lattice, Float[np.ndarray, "T C"], Float[np.ndarray, " A"] | None]
"""A lattice, the scores of its frames, and the values of its arcs if there are any."""

_Work = TypeVar("_Work")
_Result = TypeVar("_Result")


class PathSums(NamedTuple):
    """Sums over the paths of one utterance.

    ============ ======= ==============================================================================================
    log_z        float   log of the sum over paths of the exponential of their scores, in nats
    mean         float   expected sum of the value along a path; 0.0 without a value
    occupancy    [T, C]  posterior of each pdf in each frame: the derivative of log Z with respect to the scores; None
                         for the forward half alone
    derivative   [T, C]  derivative of the mean with respect to the scores: of each pdf in each frame the sum over its
                         arcs a of gamma_a (c_a - mean), c_a being the mean of the paths through a; None without a
                         value, and for the forward half alone
    ============ ======= ==============================================================================================
    """

    log_z: float
    mean: float
    occupancy: Float[np.ndarray, "T C"] | None
    derivative: Float[np.ndarray, "T C"] | None


def path_sums(
    lattice: Lattice,
    scores: Float[np.ndarray, "T C"],
    value: Float[np.ndarray, " A"] | None = None,
    *,
    backward: bool = True,
    out: PathSums | None = None,
) -> PathSums:
    """log Z of a lattice under ``scores``, the mean of ``value`` along a path, and their derivatives.

    Args:
        lattice: the paths to sum over.
        scores: natural-log scores of its frames, already scaled, float32 or float64; more columns than it has pdfs
            are welcome. ``-inf`` forbids a pdf in a frame.
        value: of every arc, such as its accuracy.
        backward: False gives log Z and the mean alone, in about half the time.
        out: an earlier result for the same shape and type of scores, whose arrays are written over. New memory may
            take a system longer than the sums.

    Returns:
        The sums; arrays are of the type of ``scores``. Where all paths are forbidden, ``log_z`` is ``-inf`` and all
        else is zero. Where a score on an arc is NaN or ``+inf`` all results are NaN; where a value is not finite, the
        mean and its derivative.

    Raises:
        ValueError: ``scores`` is not a matrix with a row for every frame and a column for every pdf, ``value`` has
            not one entry for every arc, or ``out`` has arrays of another shape or type.

    >>> lattice = Lattice.from_arcs([(0, 1, 0), (0, 1, 1), (1, 2, 0)], final={2: 0.0})
    >>> sums = path_sums(lattice, np.log(np.array([[0.25, 0.75], [1.0, 1.0]])), np.array([1.0, 0.0, 2.0]))
    >>> round(sums.log_z, 12) + 0.0, round(sums.mean, 12)
    (0.0, 2.25)
    >>> sums.occupancy.round(12).tolist(), sums.derivative.round(12).tolist()
    ([[0.25, 0.75], [1.0, 0.0]], [[0.1875, -0.1875], [0.0, 0.0]])
    """
    scores = _matrix("scores", lattice, scores)
    value = None if value is None else _values(lattice, value)
    with _scratch(lattice) as scratch:
        log_z = _leave(lattice, scores, scratch)
        if not backward:
            return PathSums(log_z, _mean(lattice, log_z, value, scratch), None, None)
        arcs, leave, above = _arcs(lattice), scratch.leave, scratch.above
        occupancy = _room("out.occupancy", out and out.occupancy, scores)
        if value is None:
            kernels.occupancies(*arcs, lattice.frames, scratch.states(), leave, occupancy)
            sums = PathSums(log_z, 0.0, occupancy, None)
        else:
            derivative = _room("out.derivative", out and out.derivative, scores)
            mean = kernels.surprise(*arcs[:2], scratch.states(), leave, value, above)
            kernels.derivatives(*arcs, lattice.frames, scratch.states(2), leave, above, occupancy, derivative)
            sums = PathSums(log_z, float(mean), occupancy, derivative)
    return _told(sums)


def path_sums_batch(
    items: Sequence[Item], *, backward: bool = True, jobs: int = 1, out: Sequence[PathSums] | None = None
) -> list[PathSums]:
    """:func:`path_sums` of many utterances, on ``jobs`` threads (the kernels release the lock).

    The results do not depend on ``jobs``. ``out`` has an earlier result for every item, as in :func:`path_sums`.
    """
    if out is not None and len(out) != len(items):
        raise ValueError(f"out has {len(out)} results for {len(items)} items: pass one for each, or none")
    reused: Sequence[PathSums | None] = [None] * len(items) if out is None else out

    def one(work: tuple[Item, PathSums | None]) -> PathSums:
        (lattice, scores, value), arrays = work
        return path_sums(lattice, scores, value, backward=backward, out=arrays)

    return _threaded(one, list(zip(items, reused, strict=True)), jobs)


def mean_curvature(
    lattice: Lattice,
    scores: Float[np.ndarray, "T C"],
    value: Float[np.ndarray, " A"],
    direction: Float[np.ndarray, "T C"],
    *,
    out: Float[np.ndarray, "T C"] | None = None,
) -> Float[np.ndarray, "T C"]:
    """The product of the Hessian of the mean of ``value`` with ``direction``: how ``derivative`` changes along it.

    Of each pdf in each frame it is the joint third cumulant of the path's passing it, of the sum of ``value`` and of
    the sum of ``direction`` along the path.

    Args:
        lattice, scores, value: as in :func:`path_sums`.
        direction: of the scores' shape.
        out: an array of the scores' shape and type that the product is written to.

    Returns:
        A matrix of the scores' shape and type; NaN where a score on an arc is NaN or ``+inf``, or a value or the
        direction on an arc is not finite; zero where all paths are forbidden.

    Raises:
        ValueError: as in :func:`path_sums`, and ``direction`` or ``out`` has not the scores' shape.

    >>> lattice = Lattice.from_arcs([(0, 1, 0), (0, 1, 1)], final={1: 0.0})
    >>> direction = np.array([[1.0, 0.0]])
    >>> mean_curvature(lattice, np.log([[0.25, 0.75]]), np.array([1.0, 0.0]), direction).round(12).tolist()
    [[0.09375, -0.09375]]
    """
    scores, value, direction = (
        _matrix("scores", lattice, scores),
        _values(lattice, value),
        _matrix("direction", lattice, direction),
    )
    if direction.shape != scores.shape:
        raise ValueError(f"direction has shape {direction.shape}, but scores has {scores.shape}: they must agree")
    product = _room("out", out, scores)
    with _scratch(lattice) as scratch:
        log_z = _leave(lattice, scores, scratch)
        arcs, leave, above, along = _arcs(lattice), scratch.leave, scratch.above, scratch.along
        kernels.gather(arcs[2], lattice.frames, direction, along)
        mean = kernels.surprise(*arcs[:2], scratch.states(), leave, value, above)
        mean += kernels.surprise(*arcs[:2], scratch.states(), leave, along, along)
        kernels.curvatures(*arcs, lattice.frames, scratch.states(5), leave, above, along, product)
    if not np.isfinite(mean) or np.isnan(log_z):
        product.fill(np.nan)
    return product


def arc_values(lattice: Lattice, per_frame: Float[np.ndarray, "T C"]) -> Float64[np.ndarray, " A"]:
    """What ``per_frame`` has for the frame and the pdf of every arc.

    As a value of :func:`path_sums`, the ``derivative`` is the Hessian of log Z times ``per_frame``.
    """
    per_frame = _matrix("per_frame", lattice, per_frame)
    values = np.empty(lattice.num_arcs)
    kernels.gather(lattice.pdf.view(np.uint32), lattice.frames, per_frame, values)
    return values


def arc_occupancy(lattice: Lattice, scores: Float[np.ndarray, "T C"]) -> Float64[np.ndarray, " A"]:
    """The posterior of every arc; NaN where a score on an arc is NaN or ``+inf``, zero where no path is allowed."""
    scores, gamma = _matrix("scores", lattice, scores), np.empty(lattice.num_arcs)
    with _scratch(lattice) as scratch:
        log_z = _leave(lattice, scores, scratch)
        kernels.visits(*_arcs(lattice)[:2], scratch.states(), scratch.leave, gamma)
    if np.isnan(log_z):
        gamma.fill(np.nan)
    return gamma


class _Scratch(NamedTuple):
    """Memory for one utterance: for each arc the probability of leaving by it and two surprises, and for the states."""

    leave: Float64[np.ndarray, " A"]
    above: Float64[np.ndarray, " A"]
    along: Float64[np.ndarray, " A"]
    rest: Float64[np.ndarray, " 5*S"]

    def states(self, *columns: int) -> np.ndarray:
        """An array [S], or [S, columns]."""
        size = len(self.rest) // 5
        return self.rest[: size * columns[0]].reshape(size, *columns) if columns else self.rest[:size]


_spare: list[np.ndarray] = []
"""Memory that no call uses at present: as many pieces as there have been calls at the same time."""


@contextmanager
def _scratch(lattice: Lattice) -> Iterator[_Scratch]:
    arcs, states = lattice.num_arcs, lattice.num_states
    try:
        memory = _spare.pop()
    except IndexError:
        memory = np.empty(0)
    if len(memory) < 3 * arcs + 5 * states:
        memory = np.empty(3 * arcs + 5 * states)
    leave, above, along = memory[: 3 * arcs].reshape(3, arcs)
    try:
        yield _Scratch(leave, above, along, memory[3 * arcs : 3 * arcs + 5 * states])
    finally:
        _spare.append(memory)


def _leave(lattice: Lattice, scores: np.ndarray, scratch: _Scratch) -> float:
    """log Z; fills ``scratch.leave``."""
    source, target, pdf = _arcs(lattice)
    states = scratch.states(2).reshape(2, -1)
    log_z = np.nan
    for sums in (kernels.leave, kernels.leave_log):
        if np.isnan(log_z):
            best, _ = kernels.arc_scores(pdf, lattice.weight, lattice.frames, scores, scratch.leave)
            log_z = best + sums(source, target, lattice.frames, lattice.levels, lattice.final, states, scratch.leave)
    return float(log_z)


def _mean(lattice: Lattice, log_z: float, value: np.ndarray | None, scratch: _Scratch) -> float:
    """The forward half of the mean."""
    if np.isnan(log_z) or value is None:
        return log_z if np.isnan(log_z) else 0.0
    mean = kernels.expected(*_arcs(lattice)[:2], scratch.states(), scratch.leave, value)
    return float(mean) if np.isfinite(mean) else np.nan


def _told(sums: PathSums) -> PathSums:
    """With NaN for all that is not known."""
    unknown = np.isnan(sums.log_z)
    if unknown and sums.occupancy is not None:
        sums.occupancy.fill(np.nan)
    if (unknown or not np.isfinite(sums.mean)) and sums.derivative is not None:
        sums.derivative.fill(np.nan)
    mean = np.nan if unknown or not np.isfinite(sums.mean) else sums.mean
    return sums._replace(mean=mean)


def _arcs(lattice: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return lattice.source.view(np.uint32), lattice.target.view(np.uint32), lattice.pdf.view(np.uint32)


def _matrix(name: str, lattice: Lattice, matrix: np.ndarray) -> np.ndarray:
    """In float32 or float64, and one layout, so that the kernels are compiled for no others."""
    if np.ndim(matrix) != 2 or len(matrix) != lattice.num_frames:
        raise ValueError(
            f"{name} must be a matrix with a row for each of the lattice's {lattice.num_frames} frames, not of shape "
            f"{np.shape(matrix)}"
        )
    if matrix.shape[1] < lattice.num_pdfs:
        raise ValueError(
            f"{name} has {matrix.shape[1]} columns, but the lattice emits pdf {lattice.num_pdfs - 1}: "
            "it and the lattice come from different sets of pdfs"
        )
    if matrix.dtype not in (np.float32, np.float64):
        raise ValueError(f"{name} is of {matrix.dtype}: pass float32 or float64")
    return np.require(matrix, requirements=["C", "W"])


def _values(lattice: Lattice, value: np.ndarray) -> np.ndarray:
    if np.shape(value) != (lattice.num_arcs,):
        raise ValueError(
            f"value must have one entry for each of the {lattice.num_arcs} arcs, not shape {np.shape(value)}"
        )
    return np.require(value, np.float64, ["C", "W"])


def _room(name: str, array: np.ndarray | None, scores: np.ndarray) -> np.ndarray:
    """The array that a result may be written to, or a new one."""
    if array is None:
        return np.empty_like(scores)
    if array.shape != scores.shape or array.dtype != scores.dtype or not array.flags.carray:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, but scores is {scores.dtype} of shape {scores.shape}: "
            "pass a contiguous array like it, or none"
        )
    return array


def _threaded(one: Callable[[_Work], _Result], items: Sequence[_Work], jobs: int) -> list[_Result]:
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    if jobs == 1 or len(items) < 2:
        return [one(item) for item in items]
    with ThreadPoolExecutor(min(jobs, len(items))) as threads:
        return list(threads.map(one, items))
