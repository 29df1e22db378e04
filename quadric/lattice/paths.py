"""Single paths: how probable a graph finds one, whether a lattice has it, and a lattice that does."""

from __future__ import annotations

import math

import numba
import numpy as np
from jaxtyping import Int32

from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import Lattice, StatePath


def path_weight(graph: LabelledAutomaton, pdfs: Int32[np.ndarray, " T"]) -> float:
    """The log of the sum over the paths of ``graph`` that emit exactly ``pdfs``, of any words; ``-inf``: none does.

    Raises ``ValueError`` unless ``pdfs`` is a row of integers, one at least.
    """
    pdfs = np.asarray(pdfs)
    if pdfs.ndim != 1 or not len(pdfs) or not np.issubdtype(pdfs.dtype, np.integer):
        raise ValueError(f"pdfs must be one row of integers, one a frame, not {pdfs.dtype} of shape {pdfs.shape}")
    arcs = graph.automaton
    slot = np.full(graph.num_states, -1, np.int64)
    return float(
        _path_weight(
            *(arcs.offsets, arcs.target, arcs.pdf, arcs.weight, arcs.final, arcs.start),
            *(pdfs.astype(np.int64), slot),
        )
    )


def contains(lattice: Lattice, path: StatePath) -> bool:
    """Whether some path of ``lattice`` emits the pdfs of ``path`` in its phones, which begin where its phones do.

    Raises ``ValueError`` if they differ in their number of frames.
    """
    return weight_in(lattice, path) > -math.inf


def weight_in(lattice: Lattice, path: StatePath) -> float:
    """The log weight that ``lattice`` gives to what ``path`` says: pdfs, phones, and where these begin.

    The log of the sum over the lattice's paths that say just this, of any words; ``-inf``: none does. The weight of
    ``path`` itself does not matter.

    Raises ``ValueError`` if they differ in their number of frames.
    """
    _check_frames(lattice, path)
    frame = lattice.frame
    fits = (
        (lattice.pdf == path.pdf[frame]) & (lattice.phone == path.phone[frame]) & (lattice.begins == path.begins[frame])
    )
    return float(
        _sum_of_fitting(lattice.source, lattice.target, lattice.weight, fits, lattice.num_states, lattice.final)
    )


def best_weight_of_phones(lattice: Lattice, path: StatePath) -> float:
    """The highest log weight of the paths of ``lattice`` through the phones of ``path``; ``-inf``: none has them.

    The phones are to be the same, one by one, but not their frames and pdfs. A graph that says words in these phones
    weighs all ways to say them alike but for the transitions within the phones: this is what the graph would give to
    ``path``, up to those, where a lattice keeps a few alignments of its sentences, or one.

    Raises ``ValueError`` if they differ in their number of frames.
    """
    _check_frames(lattice, path)
    phones = path.phone[path.begins]
    return float(
        _best_of_phones(
            *(lattice.source, lattice.target, lattice.weight, lattice.phone, lattice.begins),
            *(lattice.frames, lattice.levels, lattice.final, phones),
        )
    )


def _check_frames(lattice: Lattice, path: StatePath) -> None:
    if len(path) != lattice.num_frames:
        raise ValueError(f"path has {len(path)} frames, the lattice {lattice.num_frames}: they are of two utterances")


def with_path(lattice: Lattice, path: StatePath) -> Lattice:
    """The lattice with ``path`` beside its own, if it does not have it already.

    The path leaves the start and comes to an end of its own, with all its weight on its first arc; its words are not
    known. Where a lattice is to hold the correct path, as the sum in the denominator of a discriminative criterion.

    Raises ``ValueError`` if the numbers of frames differ, or if the weight of the path is not finite.
    """
    if contains(lattice, path):
        return lattice
    if not math.isfinite(path.weight):
        raise ValueError(f"path.weight={path.weight} must be finite: leave out what the graph has no path for")
    # The state of the path after frame t is the last of its time, t + 1: those behind it move up by as many.
    time = np.repeat(np.arange(lattice.num_frames + 1), np.diff(lattice.levels)).astype(np.int32)
    number = np.arange(lattice.num_states, dtype=np.int32) + np.maximum(time - 1, 0)
    own = lattice.levels[2:] + np.arange(lattice.num_frames, dtype=np.int32)

    def inserted(values: np.ndarray, new: np.ndarray) -> np.ndarray:
        """``values`` with a new one behind those of each frame."""
        return np.insert(values, lattice.frames[1:], new.astype(values.dtype))

    nothing = np.zeros(lattice.num_frames)
    weight = nothing.copy()
    weight[0] = path.weight
    return Lattice(
        source=inserted(number[lattice.source], np.concatenate([[0], own[:-1]])),
        target=inserted(number[lattice.target], own),
        pdf=inserted(lattice.pdf, path.pdf),
        weight=inserted(lattice.weight, weight),
        word=inserted(lattice.word, nothing),
        phone=inserted(lattice.phone, path.phone),
        begins=inserted(lattice.begins, path.begins),
        frames=lattice.frames + np.arange(lattice.num_frames + 1),
        final=np.append(lattice.final, 0.0),
    )


@numba.njit(nogil=True, cache=True)
def _path_weight(offsets, target, pdf, weight, final, start, pdfs, slot):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The forward recursion over the states that paths emitting pdfs are in; slot says where among them one is."""
    states, sums, count = np.array([start], np.int64), np.zeros(1), 1
    for t in range(len(pdfs)):
        following, values, found = np.empty(2 * count + 8, np.int64), np.empty(2 * count + 8), 0
        for k in range(count):
            for a in range(offsets[states[k]], offsets[states[k] + 1]):
                if pdf[a] != pdfs[t] or weight[a] == -np.inf:
                    continue
                x, s = sums[k] + weight[a], target[a]
                if slot[s] < 0:
                    if found == len(following):
                        following = np.concatenate((following, np.empty_like(following)))
                        values = np.concatenate((values, np.empty_like(values)))
                    slot[s] = found
                    following[found], values[found] = s, x
                    found += 1
                else:
                    y = values[slot[s]]
                    values[slot[s]] = max(x, y) + np.log1p(np.exp(-abs(x - y)))
        for k in range(found):
            slot[following[k]] = -1
        states, sums, count = following, values, found
    total = -np.inf
    for k in range(count):
        x = sums[k] + final[states[k]]
        if x > -np.inf:
            total = max(x, total) + np.log1p(np.exp(-abs(x - total)))
    return total


@numba.njit(nogil=True, cache=True)
def _sum_of_fitting(source, target, weight, fits, num_states, final):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The log of the sum over the paths of arcs that fit."""
    sums = np.full(num_states, -np.inf)
    sums[0] = 0.0
    for a in range(len(source)):
        if fits[a] and sums[source[a]] > -np.inf:
            sums[target[a]] = np.logaddexp(sums[target[a]], sums[source[a]] + weight[a])
    total = -np.inf
    for k in range(len(final)):
        total = np.logaddexp(total, sums[num_states - len(final) + k] + final[k])
    return total


@numba.njit(nogil=True, cache=True)
def _best_of_phones(  # type: ignore[no-untyped-def]  # pragma: no cover
    source, target, weight, phone, begins, frames, levels, final, phones
):
    """The highest weight of the paths through ``phones``; best[s, n] is that of those at s within phone n, from 1."""
    best = np.full((1, len(phones) + 1), -np.inf)
    best[0, 0] = 0.0
    for t in range(len(frames) - 1):
        following = np.full((levels[t + 2] - levels[t + 1], len(phones) + 1), -np.inf)
        for a in range(frames[t], frames[t + 1]):
            before, after = source[a] - levels[t], target[a] - levels[t + 1]
            for n in range(1, min(t + 1, len(phones)) + 1):
                if phones[n - 1] == phone[a]:
                    came = best[before, n - 1] if begins[a] else best[before, n]
                    following[after, n] = max(following[after, n], came + weight[a])
        best = following
    return np.max(best[:, len(phones)] + final)
