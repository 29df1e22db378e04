"""Lattices from a graph and the scores of an utterance: every path that is nearly as good as the best.

A time-synchronous beam search for the best path into every state finds, frame by frame, the states worth following;
a second pass from the end finds the best path out of each of them. An arc is in the lattice if and only if the best
path through it is within the lattice beam of the best path of all. S. Ortmanns, H. Ney, X. Aubert, "A word graph
algorithm for large vocabulary continuous speech recognition", Computer Speech and Language 11(1), 1997; the beams as
in D. Povey et al., "Generating exact lattices in the WFST framework", ICASSP 2012, here without approximation: nothing
is pruned by the lattice beam before the end is known.

Both passes touch active states only, so that memory grows with them (24 bytes for each in each frame, beside one
number for each state of the graph) and not with the size of the graph times the frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import Lattice

RETRY = 2.0
"""How many times wider the second search is, where the first reaches no final state."""


class NoPath(ValueError):
    """No path of the graph through the frames was found; the message says why."""


@dataclass(frozen=True)
class LatticeOptions:
    """What is searched, and what of it is kept; in natural-log units.

    Attributes:
        beam: a state is followed if its best path is within this of the best path of its frame.
        lattice_beam: an arc is kept if its best path is within this of the best path of the utterance.
        max_active: states followed from a frame to the next, the best ones; all that are as good as the last of them.
    """

    beam: float = 13.0
    lattice_beam: float = 7.0
    max_active: int = 5000

    def __post_init__(self) -> None:
        if not 0.0 < self.beam < math.inf:
            raise ValueError(f"beam={self.beam} must be a positive log weight; 13 is usual")
        # Below, the best path would be lost to rounding; above, states that it would keep are lost to the beam.
        if not 1e-3 <= self.lattice_beam <= self.beam:
            raise ValueError(f"lattice_beam={self.lattice_beam} must be from 0.001 to beam={self.beam}; 7 is usual")
        if self.max_active < 2:
            raise ValueError(f"max_active={self.max_active} must be at least 2; 5000 is usual")


def checked(scores: Float[np.ndarray, "T C"], graph: LabelledAutomaton) -> Float32[np.ndarray, "T C"]:
    """``scores`` for a search; ``ValueError`` where there are no frames, too few columns, or numbers not finite."""
    if np.ndim(scores) != 2 or not len(scores):
        raise ValueError(f"scores must be a matrix of frames and pdfs, not of shape {np.shape(scores)}")
    if scores.shape[1] < graph.num_pdfs:
        raise ValueError(
            f"scores has {scores.shape[1]} columns, but the graph emits pdf {graph.num_pdfs - 1}: the scores and the "
            "graph come from different sets of pdfs"
        )
    finite = np.isfinite(scores).all(1)
    if not finite.all():
        raise ValueError(f"scores are not finite in frame {int(np.argmin(finite))}: the network has diverged")
    return np.ascontiguousarray(scores, np.float32)


class Generator:
    """Makes lattices of one graph. May be called from several threads at once: the search releases the lock.

    Args:
        graph: the paths there are.
        options: how many of them to keep.
    """

    def __init__(self, graph: LabelledAutomaton, options: LatticeOptions | None = None) -> None:
        self.graph, self.options = graph, options or LatticeOptions()
        automaton = graph.automaton
        order = np.argsort(automaton.target, kind="stable").astype(np.int32)
        edges = np.searchsorted(automaton.target[order], np.arange(automaton.num_states + 1))
        self._leaving = _packed(graph, automaton.target)
        self._entering = _Entering(order, _packed(graph, automaton.source)[order], edges.astype(np.int64))

    def __call__(self, scores: Float[np.ndarray, "T C"]) -> Lattice:
        """The lattice of an utterance.

        Args:
            scores: of frames and pdfs, natural logarithms, already scaled against the weights of the graph.

        Returns:
            Its states are pairs of a time and a state of the graph; the weights of its arcs are those of the graph,
            without ``scores``. The same scores give the same lattice, whatever else runs.

        Raises:
            NoPath: no final state is reached, also not with :data:`RETRY` times the beam and the active states.
            ValueError: scores without frames, with too few columns, or that are not finite.
        """
        scores = checked(scores, self.graph)
        for factor in (1.0, RETRY):
            trellis = self._search(scores, factor)
            if trellis is not None:
                return self._lattice(trellis)
        raise NoPath(
            f"no path of the graph through {len(scores)} frames to a final state within a beam of "
            f"{RETRY * self.options.beam:g} and {round(RETRY * self.options.max_active)} active states: the frames are "
            "too few for any sentence, or a wider search is needed"
        )

    def _search(self, scores: Float32[np.ndarray, "T C"], factor: float) -> _Trellis | None:
        automaton, options = self.graph.automaton, self.options
        slot = np.full(automaton.num_states, -1, np.int32)
        state, alpha, edges = _forward_pass(
            *(self._leaving, automaton.offsets, automaton.start, scores, slot),
            *(factor * options.beam, round(factor * options.max_active)),
        )
        ends = slice(edges[-2], edges[-1])
        best = np.max(alpha[ends] + automaton.final[state[ends]], initial=-np.inf)
        if best == -np.inf:
            return None
        kept, counts = _backward_pass(
            *(self._entering.arcs, self._entering.offsets, automaton.final, scores, slot),
            *(state, alpha, edges, best - options.lattice_beam),
        )
        return _Trellis(state, kept, counts)

    def _lattice(self, trellis: _Trellis) -> Lattice:
        order, source, target, frames, last = _numbered(trellis.kept, trellis.counts, len(trellis.state))
        arc = self._entering.order[trellis.kept[order, 0]]
        return self.graph.lattice(arc, source, target, frames, trellis.state[last])


class _Entering(NamedTuple):
    """The arcs of a graph by the state they enter: their numbers, themselves, and the runs of each state."""

    order: Int32[np.ndarray, " A"]
    arcs: np.ndarray
    offsets: Int64[np.ndarray, " S+1"]


class _Trellis(NamedTuple):
    """The active states, and from the last frame to the first the arcs kept between them.

    Rows of ``kept`` are the place of an arc among the entering ones, and its source and target among the active
    states; ``counts`` are the arcs of each frame.
    """

    state: Int32[np.ndarray, " N"]
    kept: Int32[np.ndarray, "A 3"]
    counts: Int64[np.ndarray, " T"]


_ARC = np.dtype([("state", np.int32), ("pdf", np.int32), ("weight", np.float32)], align=True)


def _packed(graph: LabelledAutomaton, state: Int32[np.ndarray, " A"]) -> np.ndarray:
    """What a search reads of an arc, side by side in memory."""
    arcs = np.empty(graph.num_arcs, _ARC)
    arcs["state"], arcs["pdf"], arcs["weight"] = state, graph.automaton.pdf, graph.automaton.weight
    return arcs


_BINS = 256


@numba.njit(nogil=True, cache=True)
def _grown(array, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    if size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger


@numba.njit(nogil=True, cache=True)
def _degree(offsets, states):  # type: ignore[no-untyped-def]  # pragma: no cover
    """How many arcs the states have."""
    total = 0
    for s in states:
        total += offsets[s + 1] - offsets[s]
    return total


@numba.njit(nogil=True, cache=True)
def _threshold(alpha, top, beam, most):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The lowest value to keep: one within the beam of top and among the best ``most`` or their equals."""
    cut = top - beam
    if len(alpha) <= most:
        return cut
    counts, count, scale = np.zeros(_BINS, np.int64), 0, _BINS / beam
    for x in alpha:
        if x >= cut:
            counts[min(int((top - x) * scale), _BINS - 1)] += 1
            count += 1
    if count <= most:
        return cut
    chosen, better = 0, 0
    while better + counts[chosen] < most:
        better += counts[chosen]
        chosen += 1
    inside, k = np.empty(counts[chosen]), 0
    for x in alpha:
        if x >= cut and min(int((top - x) * scale), _BINS - 1) == chosen:
            inside[k] = x
            k += 1
    return np.sort(inside)[k - (most - better)]


@numba.njit(nogil=True, cache=True)
def _expand(arcs, offsets, row, slot, state, alpha, first, last, beam):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Follows the arcs of the states from first to last. Returns the end of their successors and the best value.

    slot[s] becomes the place of a successor s. What lies below the best value less the beam may be left out.
    """
    leader = first
    for i in range(first, last):
        if alpha[i] > alpha[leader]:
            leader = i
    # The best state goes first: what is hopeless beside its successors is not even looked up.
    state[first], state[leader] = state[leader], state[first]
    alpha[first], alpha[leader] = alpha[leader], alpha[first]
    end, top, hopeless = last, -np.inf, np.finfo(np.float64).min
    for i in range(first, last):
        so_far = alpha[i]
        for a in range(offsets[state[i]], offsets[state[i] + 1]):
            arc = arcs[a]
            x = so_far + arc.weight + row[arc.pdf]
            if x < hopeless:
                continue
            if x > top:
                top = x
                hopeless = max(hopeless, top - beam)
            j = slot[arc.state]
            if j < 0:
                slot[arc.state] = end
                state[end], alpha[end] = arc.state, x
                end += 1
            elif x > alpha[j]:
                alpha[j] = x
    return end, top


@numba.njit(nogil=True, cache=True)
def _prune(slot, state, alpha, first, last, cut):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Keeps, in their order, the states from first to last that reach cut. Returns their new end; clears slot."""
    end = first
    for i in range(first, last):
        slot[state[i]] = -1
        if alpha[i] >= cut:
            state[end], alpha[end] = state[i], alpha[i]
            end += 1
    return end


@numba.njit(nogil=True, cache=True)
def _forward_pass(arcs, offsets, start, scores, slot, beam, most):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The active states of every frame with the scores of their best paths; those of time t are from edges[t] on.

    slot is -1 throughout, before and after. After the last frame nothing is pruned: an end may lie outside the beam.
    """
    num_frames = len(scores)
    state, alpha = np.empty(4096, np.int32), np.empty(4096)
    edges = np.ones(num_frames + 2, np.int64)
    edges[0], state[0], alpha[0] = 0, start, 0.0
    for t in range(num_frames):
        first, last = edges[t], edges[t + 1]
        size = last + min(_degree(offsets, state[first:last]), len(slot))
        state, alpha = _grown(state, size), _grown(alpha, size)
        prunes = t + 1 < num_frames
        end, top = _expand(arcs, offsets, scores[t], slot, state, alpha, first, last, beam if prunes else np.inf)
        cut = _threshold(alpha[last:end], top, beam, most) if prunes else -np.inf
        edges[t + 2] = _prune(slot, state, alpha, last, end, cut)
    return state[: edges[-1]], alpha[: edges[-1]], edges


@numba.njit(nogil=True, cache=True)
def _go_back(arcs, offsets, row, slot, state, alpha, beta, first, last, alive, before, limit, kept, found):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Keeps the arcs from the states first to last into those alive; returns the ends of kept and of before."""
    num_before = 0
    for j in alive:
        for a in range(offsets[state[j]], offsets[state[j] + 1]):
            arc = arcs[a]
            i = slot[arc.state]
            if i < first or i >= last:
                continue
            rest = arc.weight + row[arc.pdf] + beta[j]
            if alpha[i] + rest < limit:
                continue
            kept[found, 0], kept[found, 1], kept[found, 2] = a, i, j
            found += 1
            if beta[i] == -np.inf:
                before[num_before] = i
                num_before += 1
            if rest > beta[i]:
                beta[i] = rest
    return found, num_before


@numba.njit(nogil=True, cache=True)
def _backward_pass(arcs, offsets, final, scores, slot, state, alpha, edges, limit):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The arcs through which a path reaches limit, from the last frame to the first.

    Goes back from the states on such paths along the arcs into them. Returns rows of the number of an arc and its
    source and target as places among the active states, and the arcs of every frame.
    """
    num_frames = len(scores)
    counts, found = np.zeros(num_frames, np.int64), 0
    kept = np.empty((1 << 14, 3), np.int32)
    beta = np.full(len(state), -np.inf)
    ends = edges[num_frames]
    total = alpha[ends:].copy()
    for i in range(ends, len(state)):
        total[i - ends] += final[state[i]]
        beta[i] = final[state[i]]
    alive = ends + np.flatnonzero(total >= limit)
    for t in range(num_frames - 1, -1, -1):
        first, last = edges[t], edges[t + 1]
        # What later frames left in slot is larger than the places of this one.
        for i in range(first, last):
            slot[state[i]] = i
        size = found + _degree(offsets, state[alive])
        if size > len(kept):
            larger = np.empty((max(size, 2 * len(kept)), 3), np.int32)
            larger[:found] = kept[:found]
            kept = larger
        before = np.empty(last - first, np.int64)
        end, num_before = _go_back(
            arcs, offsets, scores[t], slot, state, alpha, beta, first, last, alive, before, limit, kept, found
        )
        counts[t], found, alive = end - found, end, before[:num_before]
    return kept[:found], counts


@numba.njit(nogil=True, cache=True)
def _numbered(kept, counts, num_active):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The rows of kept by frame and source, and sources and targets as states numbered frame by frame.

    Leaves out states that, by rounding, no kept arc enters. Also where the arcs of every frame are, and the places of
    the last states.
    """
    order, source = np.empty(len(kept), np.int64), np.empty(len(kept), np.int32)
    target, frames = np.empty(len(kept), np.int32), np.zeros(len(counts) + 1, np.int64)
    number = np.full(num_active, -1, np.int32)
    number[0] = 0
    begin, low, high, end = len(kept), 0, 1, 0
    entered = np.zeros(1, np.int64)
    for t in range(len(counts)):
        stop, begin = begin, begin - counts[t]
        run, num_entered = np.zeros(high - low + 1, np.int64), 0
        entered = np.empty(counts[t], np.int64)
        for k in range(begin, stop):
            s = number[kept[k, 1]]
            if s >= 0:
                run[s - low + 1] += 1
                if number[kept[k, 2]] < 0:
                    number[kept[k, 2]] = high + num_entered
                    entered[num_entered] = kept[k, 2]
                    num_entered += 1
        run = end + np.cumsum(run)
        for k in range(begin, stop):
            s = number[kept[k, 1]]
            if s >= 0:
                place = run[s - low]
                run[s - low] += 1
                order[place], source[place], target[place] = k, s, number[kept[k, 2]]
        end, low, high = run[-1], high, high + num_entered
        frames[t + 1], entered = end, entered[:num_entered]
    return order[:end], source[:end], target[:end], frames, entered
