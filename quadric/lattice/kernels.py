"""Compiled sums over the paths of a lattice.

The paths of a lattice, each as probable as the exponential of its score says, are a Markov chain: from a state the next
arc is taken with a probability that does not depend on how the state was reached. :func:`leave` finds these
probabilities in one backward sweep; all other kernels work on them, in the linear domain, without any scaling.

A value ``v`` of arcs adds up along a path. :func:`surprise` turns it into what an arc changes in the expected sum,
``v[a] + E[rest | target] - E[rest | source]``, which is zero on average in every state. The surprises along a path add
up to its sum less the mean, and what is still to come adds nothing on average: moments about the mean need no more
than the arcs seen so far, and no large numbers are subtracted at the end.

===== ===== ================================================================
A           arcs, sorted by frame and by source
S           states, numbered frame by frame
q     [A]   probability of an arc, given that a path passes its source
d     [A]   surprise of an arc
===== ===== ================================================================

Indices are unsigned, so that none is taken to count from the end. Scratch for the states is handed in, because
new memory may cost more than the sums.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numba
import numpy as np

# A product and a sum may be rounded together; nothing else of IEEE 754 is given up.
_compiled = numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")

_LEAST = 1e-140
"""The least that a state may be of the greatest beside it, before sums of scaled probabilities are given up: times
itself, for the best arc may lead to the least state, it is far above what float64 loses to underflow."""


@_compiled
def _exp(x):  # pragma: no cover
    """exp of a number <= 0 to one unit in the last place; 0 below -708. Unlike the C library's, loops of it are
    vectorised: x = k ln 2 + r, |r| <= ln 2 / 2, Taylor's series of r, and k written into the bits of the exponent."""
    k = np.floor(x * 1.4426950408889634 + 0.5)
    r = x - k * 0.6931471803691238 - k * 1.9082149292705877e-10
    y = 1.6059043836821613e-10
    y = y * r + 2.08767569878681e-09
    y = y * r + 2.505210838544172e-08
    y = y * r + 2.755731922398589e-07
    y = y * r + 2.7557319223985893e-06
    y = y * r + 2.48015873015873e-05
    y = y * r + 1.984126984126984e-04
    y = y * r + 1.388888888888889e-03
    y = y * r + 8.333333333333333e-03
    y = y * r + 4.1666666666666664e-02
    y = y * r + 1.6666666666666666e-01
    y = y * r + 0.5
    y = y * r + 1.0
    y = y * r + 1.0
    power = (np.int64(max(k, -1022.0)) + 1023) << 52
    return 0.0 if x < -708.0 else y * np.int64(power).view(np.float64)


@_compiled
def arc_scores(pdf, weight, frames, scores, q):  # pragma: no cover
    """Fills q with the log scores of the arcs, less the best of their frame; returns the sum of the best.

    The rows are read from end to end first, for otherwise arcs wait for memory in turns; returned, too, is a number
    that depends on all that is read and means nothing.
    """
    num_frames, num_pdfs = scores.shape
    total, read = 0.0, scores[0, 0]
    step = 16 if num_pdfs <= 64 * len(q) // num_frames else num_pdfs
    for t in range(num_frames):
        row, top = scores[t], -np.inf
        for c in range(0, num_pdfs, step):
            read = max(read, row[c])
        for a in range(frames[t], frames[t + 1]):
            x = np.float64(weight[a]) + row[pdf[a]]
            q[a] = x
            if x > top:
                top = x
        total += top
        for a in range(frames[t], frames[t + 1]):
            q[a] -= top if top != -np.inf else 0.0
    return total, read


@_compiled
def leave(source, target, frames, levels, final, state, q):  # pragma: no cover
    """Turns q from the scores of the arcs into the probabilities of leaving by them; returns log Z, to which the
    sum of the best is to be added.

    Sums of probabilities are relative to the greatest in their frame. Where no state falls below ``_LEAST`` of it, no
    arc loses more than 1e-27 of its state's sum to underflow. Else returns NaN, and so it does where a score on an arc
    is no number, or forbids a state.
    """
    num_frames = len(frames) - 1
    beta, inverse = state[0], state[1]
    beta[:] = 0.0
    log_z = final.max()
    beta[levels[num_frames] :] = np.exp(final - log_z)
    if beta[levels[num_frames] :].min() < _LEAST:
        return np.nan
    # Of all frames at once, for most have too few arcs to fill vectors.
    for a in range(len(q)):
        q[a] = _exp(q[a])
    for t in range(num_frames - 1, -1, -1):
        for a in range(frames[t], frames[t + 1]):
            q[a] *= beta[target[a]]
            beta[source[a]] += q[a]
        top = 0.0
        for s in range(levels[t], levels[t + 1]):
            inverse[s] = 1.0 / beta[s]
            if beta[s] > top:
                top = beta[s]
        scale = 1.0 / top
        for s in range(levels[t], levels[t + 1]):
            beta[s] *= scale
            if not beta[s] >= _LEAST:
                return np.nan
        log_z += np.log(top)
    for a in range(len(q)):
        q[a] *= inverse[source[a]]
    return log_z


@_compiled
def leave_log(source, target, frames, levels, final, state, q):  # pragma: no cover
    """What :func:`leave` does, by logarithms: for any scores. NaN where a score is NaN or +inf."""
    num_frames = len(frames) - 1
    log_z = 0.0
    beta, total = state[0], state[1]
    beta[:], total[:] = -np.inf, 0.0
    beta[levels[num_frames] :] = final
    for t in range(num_frames - 1, -1, -1):
        for a in range(frames[t], frames[t + 1]):
            q[a] += beta[target[a]]
        for a in range(frames[t], frames[t + 1]):
            beta[source[a]] = _greater(beta[source[a]], q[a])
        for a in range(frames[t], frames[t + 1]):
            top = beta[source[a]]
            q[a] = _exp(q[a] - (top if top != -np.inf else 0.0))
        for a in range(frames[t], frames[t + 1]):
            total[source[a]] += q[a]
        best = -np.inf
        for s in range(levels[t], levels[t + 1]):
            if total[s] != 0.0:
                beta[s] += np.log(total[s])
                total[s] = 1.0 / total[s]
            best = _greater(best, beta[s])
        log_z += best
        # Relative to the best state, so that the differences between states keep their digits.
        for s in range(levels[t], levels[t + 1]):
            beta[s] -= best if best != -np.inf else 0.0
        for a in range(frames[t], frames[t + 1]):
            q[a] *= total[source[a]]
    return log_z


@_compiled
def _greater(x, y):  # pragma: no cover
    """The greater of two numbers; the second where one is NaN."""
    return x if x >= y else y


@_compiled
def surprise(source, target, rest, q, value, d):  # pragma: no cover
    """Fills d and returns the expected sum of ``value`` along a path."""
    rest[:] = 0.0
    for a in range(len(q) - 1, -1, -1):
        d[a] = value[a] + rest[target[a]]
        rest[source[a]] += q[a] * d[a]
    for a in range(len(q)):
        d[a] -= rest[source[a]]
    return rest[0]


@_compiled
def expected(source, target, rest, q, value):  # pragma: no cover
    """The expected sum of ``value`` along a path."""
    rest[:] = 0.0
    for a in range(len(q) - 1, -1, -1):
        rest[source[a]] += q[a] * (value[a] + rest[target[a]])
    return rest[0]


@_compiled
def visits(source, target, state, q, gamma):  # pragma: no cover
    """Fills gamma: the probability of every arc."""
    state[:] = 0.0
    state[0] = 1.0
    for a in range(len(q)):
        gamma[a] = q[a] * state[source[a]]
        state[target[a]] += gamma[a]


@_compiled
def occupancies(source, target, pdf, frames, state, q, occupancy):  # pragma: no cover
    """Fills occupancy [T, C]: the probability of every pdf in every frame."""
    row = np.zeros(occupancy.shape[1])
    state[:] = 0.0
    state[0] = 1.0
    for t in range(len(frames) - 1):
        for a in range(frames[t], frames[t + 1]):
            gamma = q[a] * state[source[a]]
            state[target[a]] += gamma
            row[pdf[a]] += gamma
        _flush(row, occupancy[t])


@_compiled
def derivatives(source, target, pdf, frames, state, q, d, occupancy, derivative):  # pragma: no cover
    """Fills occupancy and derivative [T, C]: for every pdf in every frame the expectation of its being passed, and
    that times what the path's sum is above the mean."""
    row = np.zeros((2, occupancy.shape[1]))
    state[:] = 0.0
    state[0, 0] = 1.0
    first, second = row[0], row[1]
    for t in range(len(frames) - 1):
        for a in range(frames[t], frames[t + 1]):
            before, after = state[source[a]], state[target[a]]
            gamma = q[a] * before[0]
            above = q[a] * before[1] + gamma * d[a]
            after[0] += gamma
            after[1] += above
            first[pdf[a]] += gamma
            second[pdf[a]] += above
        _flush(first, occupancy[t])
        _flush(second, derivative[t])


@_compiled
def curvatures(source, target, pdf, frames, state, q, d, e, product):  # pragma: no cover
    """Fills product [T, C]: of two sums along a path with the surprises d and e, for every pdf in every frame the
    expectation of its being passed times what the sums' product about their means is above their covariance.

    What an arc changes in the expected product is its own surprise: of the product of its d and e, and of the
    covariance of what is still to come.
    """
    row = np.zeros(product.shape[1])
    state[:] = 0.0
    for a in range(len(q) - 1, -1, -1):
        state[source[a], 4] += q[a] * (d[a] * e[a] + state[target[a], 4])
    state[0, 0] = 1.0
    for t in range(len(frames) - 1):
        for a in range(frames[t], frames[t + 1]):
            before, after = state[source[a]], state[target[a]]
            gamma = q[a] * before[0]
            changed = d[a] * e[a] + after[4] - before[4]
            above = q[a] * (before[3] + before[1] * e[a] + before[2] * d[a]) + gamma * changed
            after[0] += gamma
            after[1] += q[a] * before[1] + gamma * d[a]
            after[2] += q[a] * before[2] + gamma * e[a]
            after[3] += above
            row[pdf[a]] += above
        _flush(row, product[t])


@_compiled
def _flush(sums, row):  # pragma: no cover
    """Moves sums into a row of the result and begins anew. Whole rows are faster than the pdfs of the arcs alone."""
    for c in range(len(sums)):
        row[c] = sums[c]
        sums[c] = 0.0


@_compiled
def gather(pdf, frames, per_frame, values):  # pragma: no cover
    """Fills values: of every arc what ``per_frame`` [T, C] has for its frame and pdf."""
    for t in range(len(frames) - 1):
        for a in range(frames[t], frames[t + 1]):
            values[a] = per_frame[t, pdf[a]]
