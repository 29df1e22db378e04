"""Forward-backward over an automaton: the sum over all paths and where the paths pass.

The score of a path ``a_1 ... a_T`` from the initial state to a final state is
``sum_t (weight[a_t] + scores[t, pdf[a_t]]) + final[end]``. The kernel computes ``log Z``, the log of the sum
of the exponentials of all path scores, and the posterior of each pdf in each frame, which is also the
gradient of ``log Z`` with respect to the scores. It works in the log domain and in float64 throughout, prunes nothing
and keeps one ``[T + 1, S]`` array. Method: L. R. Rabiner, "A tutorial on hidden Markov models and selected
applications in speech recognition", Proceedings of the IEEE 77(2), 1989, equations (19) to (27).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Float, Float64

from quadric.lattice.automaton import Automaton


class Statistics(NamedTuple):
    """The result of a forward-backward pass: ``log Z`` and the posteriors, which sum to one in each frame."""

    log_z: float
    posteriors: Float64[np.ndarray, " T C"]


def forward_backward(automaton: Automaton, scores: Float[np.ndarray, " T C"]) -> Statistics:
    """The exact ``log Z`` of an automaton under ``scores`` and the posterior of each pdf in each frame.

    Args:
        automaton: the paths to sum over; may be cyclic.
        scores: natural-log scores of the frames, one column per pdf. ``-inf`` forbids a pdf in a frame.

    Returns:
        ``(log_z, posteriors)``. Where no path fits (too few frames, or all forbidden) ``log_z`` is ``-inf``
        and the posteriors are zero. Where a score is NaN or ``+inf`` all results are NaN: a numerical
        failure upstream stays visible and is not mistaken for an impossible transcript.

    Raises:
        ValueError: ``scores`` is not a matrix with a column for every pdf of the automaton.

    >>> coin = Automaton.from_arcs([(0, 0, 0, 0.0), (0, 0, 1, 0.0)], final={0: 0.0})
    >>> log_z, posteriors = forward_backward(coin, np.log(np.array([[0.25, 0.75], [0.5, 0.5]])))
    >>> round(log_z, 12) + 0.0, posteriors.round(12).tolist()
    (0.0, [[0.25, 0.75], [0.5, 0.5]])
    """
    scores = _checked(automaton, scores)
    if np.any(np.isnan(scores)) or np.any(np.isposinf(scores)):
        return Statistics(float("nan"), np.full_like(scores, np.nan))
    log_z, posteriors = _forward_backward(
        automaton.source,
        automaton.target,
        automaton.pdf,
        automaton.weight,
        automaton.offsets,
        automaton.final,
        automaton.start,
        scores,
    )
    return Statistics(float(log_z), posteriors)


def forward_backward_batch(
    pairs: Sequence[tuple[Automaton, Float[np.ndarray, " T C"]]], *, jobs: int = 1
) -> list[Statistics]:
    """:func:`forward_backward` of many utterances, on ``jobs`` threads (the kernel releases the lock).

    The results do not depend on ``jobs``.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    if jobs == 1 or len(pairs) < 2:
        return [forward_backward(automaton, scores) for automaton, scores in pairs]
    with ThreadPoolExecutor(min(jobs, len(pairs))) as threads:
        return list(threads.map(lambda pair: forward_backward(*pair), pairs))


def _checked(automaton: Automaton, scores: Float[np.ndarray, " T C"]) -> Float64[np.ndarray, " T C"]:
    if np.ndim(scores) != 2:
        raise ValueError(f"scores must be a matrix of frames and pdfs, not of shape {np.shape(scores)}")
    if scores.shape[1] < automaton.num_pdfs:
        raise ValueError(
            f"scores has {scores.shape[1]} columns, but the automaton emits pdf {automaton.num_pdfs - 1}: "
            "the scores and the graph come from different sets of pdfs"
        )
    # One layout and writeability, so that the kernel is compiled once.
    return np.require(scores, np.float64, ["C", "W"])


@numba.njit(nogil=True, cache=True)
def _forward(source, target, pdf, weight, start, scores, alpha, highest):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Fills alpha [T + 1, S]: the log sum over the partial paths from the start to each state.

    The log of the sum is taken relative to the highest arc into each state: one exponential an arc, one
    logarithm a state.
    """
    num_frames, num_states = len(scores), alpha.shape[1]
    alpha[0] = -np.inf
    alpha[0, start] = 0.0
    for t in range(num_frames):
        before, after = alpha[t], alpha[t + 1]
        highest[:] = -np.inf
        for a in range(len(source)):
            x = before[source[a]] + weight[a] + scores[t, pdf[a]]
            if x > highest[target[a]]:
                highest[target[a]] = x
        after[:] = 0.0
        for a in range(len(source)):
            s = target[a]
            if highest[s] > -np.inf:
                after[s] += np.exp(before[source[a]] + weight[a] + scores[t, pdf[a]] - highest[s])
        for s in range(num_states):
            after[s] = highest[s] + np.log(after[s]) if highest[s] > -np.inf else -np.inf


@numba.njit(nogil=True, cache=True)
def _log_sum(values):  # type: ignore[no-untyped-def]  # pragma: no cover
    top = values.max()
    return top + np.log(np.exp(values - top).sum()) if top > -np.inf else top


@numba.njit(nogil=True, cache=True)
def _forward_backward(source, target, pdf, weight, offsets, final, start, scores):  # type: ignore[no-untyped-def]  # pragma: no cover
    """log Z and the posteriors [T, C].

    Arcs are sorted by source, so the backward step of a state is one run of arcs. The exponentials it needs
    for beta, divided by their sum, are the shares of the arcs in the posterior of their source state.
    """
    num_frames, num_states = len(scores), len(final)
    alpha = np.empty((num_frames + 1, num_states))
    _forward(source, target, pdf, weight, start, scores, alpha, np.empty(num_states))
    posteriors = np.zeros(scores.shape)
    log_z = _log_sum(alpha[num_frames] + final)
    if log_z == -np.inf:
        return log_z, posteriors
    after, before, share = final.copy(), np.empty(num_states), np.empty(len(source))
    for t in range(num_frames - 1, -1, -1):
        for s in range(num_states):
            first, last = offsets[s], offsets[s + 1]
            top = -np.inf
            for a in range(first, last):
                share[a] = weight[a] + scores[t, pdf[a]] + after[target[a]]
                if share[a] > top:
                    top = share[a]
            before[s] = -np.inf
            if top == -np.inf:
                continue
            total = 0.0
            for a in range(first, last):
                share[a] = np.exp(share[a] - top)
                total += share[a]
            before[s] = top + np.log(total)
            if alpha[t, s] > -np.inf:
                occupancy = np.exp(alpha[t, s] + before[s] - log_z) / total
                for a in range(first, last):
                    posteriors[t, pdf[a]] += occupancy * share[a]
        after, before = before, after
    return log_z, posteriors
