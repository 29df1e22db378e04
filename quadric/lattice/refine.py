"""Refinements of a lattice: the same paths with the same weights, in states that remember more.

A state of a lattice says neither how its phone fits the reference so far nor which phones came before. What an arc is
worth may depend on that; then the states are split until it does not. Each refinement is the product of the lattice
and a deterministic automaton that follows its paths, so that paths and their weights correspond one to one.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from quadric.lattice.lattice import Lattice


def with_overlap(
    lattice: Lattice,
    bounds: Int64[np.ndarray, " R+1"],
    wanted: Int32[np.ndarray, " R"],
    silent: Bool[np.ndarray, " P"],
) -> tuple[Lattice, Float32[np.ndarray, " A2"]]:
    """The same paths in states that know how well the phone they are within fits the reference so far.

    A phone q is worth the most that a phone z of the reference gives it: -1 + 2 e where they are the same, -1 + e
    otherwise, with e the share of z's frames that q overlaps; silence is worth 0. What a state remembers of its phone
    is that worth so far, and the overlap with the z it is within, not when it began: much of that makes no difference.
    Between phones the copies of a state fall together again. A phone is called what its first frame is, and the first
    frame of the lattice begins one, whatever its arcs say.

    Args:
        lattice: the paths.
        bounds: phone z of the reference takes the frames from ``bounds[z]`` to ``bounds[z + 1]``.
        wanted: and is this phone, or -1: it gives nothing.
        silent: of every phone, whether it is silence.

    Returns:
        The lattice, and its arcs' values: a phone's worth is on the arc of its last frame.
    """
    starts = first_frames(lattice)
    ends, goes_on = np.zeros(lattice.num_states, np.bool_), np.zeros(lattice.num_states, np.bool_)
    ends[lattice.source[starts]] = True
    ends[lattice.levels[-2] :] = True
    goes_on[lattice.source[~starts]] = True
    worth, rank, shift = _worths(bounds, wanted)
    current = np.repeat(np.arange(len(wanted)), np.diff(bounds))
    source, target, origin, state, value = _by_overlap(
        *(_offsets(lattice), lattice.target, lattice.phone, starts, ends, goes_on),
        *(bounds, wanted, silent, current, worth, rank, shift),
    )
    return _product(lattice, source, target, origin, state), value


def _worths(
    bounds: Int64[np.ndarray, " R+1"], wanted: Int32[np.ndarray, " R"]
) -> tuple[Float64[np.ndarray, " N"], Int64[np.ndarray, "M 2"], Int64[np.ndarray, " R"]]:
    """All that a phone of the reference may give, in order, from -1 on.

    Returns:
        The worths; the rank among them of what z gives for o frames, to another phone and to the same:
        ``rank[shift[z] + o]``; and ``shift``.
    """
    frames = np.diff(bounds)
    shift = bounds[:-1] + np.arange(len(wanted))
    z = np.repeat(np.arange(len(wanted)), frames + 1)
    overlap = np.arange(len(z)) - shift[z]
    given = np.where(wanted[z] < 0, 0, overlap)
    # Equal shares are equal numbers: a quotient of integers is rounded once.
    worth, rank = np.unique(-1.0 + np.stack([given, 2 * given], 1) / frames[z][:, None], return_inverse=True)
    return worth, rank.reshape(-1, 2).astype(np.int64), shift


def with_edit_distance(
    lattice: Lattice, symbol: Int32[np.ndarray, " A"], reference: Int32[np.ndarray, " R"], max_states: int
) -> tuple[Lattice, Float32[np.ndarray, " A2"]]:
    """The same paths in states that know the edit distances of what was said to every beginning of the reference.

    Args:
        lattice: the paths.
        symbol: what every arc says; -1: nothing.
        reference: the symbols, 0 and above, that distances are taken to.
        max_states: the states that the result may have.

    Returns:
        The lattice, and for every arc by how much it lowers the distance to the whole reference: along a path the sum
        is the length of the reference minus the edit distance of the path's symbols.

    Raises:
        ValueError: more than ``max_states`` states.
    """
    known = np.unique(reference)
    place = np.searchsorted(known, symbol)
    heard = np.isin(symbol, known)
    narrow = np.where(symbol < 0, -1, np.where(heard, place, len(known))).astype(np.int32)  # all others are alike
    said = np.searchsorted(known, reference).astype(np.int32)
    source, target, origin, state, value = _by_edit_distance(
        _offsets(lattice), lattice.target, narrow, said, len(known) + 1, lattice.num_frames, max_states
    )
    if len(state) > max_states:
        raise ValueError(
            f"max_states={max_states}: the lattice of {lattice.num_states} states needs more, to tell the edit "
            "distances of its paths apart; raise it, prune the lattice, or take the approximate accuracy"
        )
    return _product(lattice, source, target, origin, state), value


def first_frames(lattice: Lattice) -> Bool[np.ndarray, " A"]:
    """Whether an arc is the first frame of a phone; those of the first frame of all are."""
    starts = lattice.begins.copy()
    starts[: lattice.frames[1]] = True
    return starts


def _offsets(lattice: Lattice) -> Int64[np.ndarray, " S+1"]:
    """Arcs that leave state ``s`` are ``offsets[s]`` to ``offsets[s + 1]``."""
    return np.searchsorted(lattice.source, np.arange(lattice.num_states + 1)).astype(np.int64)


def _product(
    lattice: Lattice,
    source: Int32[np.ndarray, " A2"],
    target: Int32[np.ndarray, " A2"],
    origin: Int32[np.ndarray, " A2"],
    state: Int32[np.ndarray, " S2"],
) -> Lattice:
    """The lattice of copies of arcs (``origin``: of which) between copies of states (``state``: of which)."""
    edges = np.searchsorted(lattice.frame[origin], np.arange(lattice.num_frames + 1))
    last = int(lattice.levels[-2])
    return Lattice(
        source=source,
        target=target,
        pdf=lattice.pdf[origin],
        weight=lattice.weight[origin],
        word=lattice.word[origin],
        phone=lattice.phone[origin],
        begins=lattice.begins[origin],
        frames=edges.astype(np.int64),
        final=lattice.final[state[state >= last] - last],
    )


@numba.njit(nogil=True, cache=True)
def _grown(values, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The values in an array with room for ``size``."""
    if size <= len(values):
        return values
    larger = np.empty(max(size, 2 * len(values)), values.dtype)
    larger[: len(values)] = values
    return larger


@numba.njit(nogil=True, cache=True)
def _bucket(state, history, buckets):  # type: ignore[no-untyped-def]  # pragma: no cover
    mixed = (np.uint64(state) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(history) * np.uint64(0xC2B2AE3D27D4EB4F))
    return np.int64((mixed >> np.uint64(29)) & np.uint64(buckets - 1))


@numba.njit(nogil=True, cache=True)
def _find(state, history, chain, heads, count, s, h):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The copy of state ``s`` with history ``h``: ``count``, where it is entered, if there was none."""
    b = _bucket(s, h, len(heads))
    x = heads[b]
    while x >= 0:
        if state[x] == s and history[x] == h:
            return x
        x = chain[x]
    state[count], history[count], chain[count] = s, h, heads[b]
    heads[b] = count
    return count


@numba.njit(nogil=True, cache=True)
def _more_heads(state, history, chain, heads, count):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The heads of a table with buckets for ``count`` entries at least."""
    if count <= len(heads):
        return heads
    size = len(heads)
    while size < 2 * count:
        size *= 2
    heads = np.full(size, -1, np.int32)
    for x in range(count):
        b = _bucket(state[x], history[x], size)
        chain[x] = heads[b]
        heads[b] = x
    return heads


@numba.njit(nogil=True, cache=True)
def _out_arcs(first, state, low, high):  # type: ignore[no-untyped-def]  # pragma: no cover
    total = 0
    for x in range(low, high):
        total += first[state[x] + 1] - first[state[x]]
    return total


@numba.njit(nogil=True, cache=True)
def _by_overlap(first, target, phone, starts, ends, goes_on, bounds, wanted, silent, current, worth, rank, shift):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Source, target and original of the arcs of `with_overlap`, the originals of its states, and the values.

    The history of a state is -1 where the next frame begins a phone, or none follows; else it is made of the phone,
    the rank of its worth so far, and its overlap with the current phone of the reference.
    """
    size, num_frames, labels = 2 * len(target) + 2, len(current), len(silent)
    source, to, origin = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    value = np.empty(size, np.float32)
    state, history, chain = np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size, np.int32)
    heads = np.full(1024, -1, np.int32)
    state[0], history[0] = 0, -1
    low, high, count, arcs = 0, 1, 1, 0
    for t in range(num_frames):
        room = 2 * _out_arcs(first, state, low, high)
        source, to, origin = _grown(source, arcs + room), _grown(to, arcs + room), _grown(origin, arcs + room)
        state, history = _grown(state, count + room), _grown(history, count + room)
        chain, value = _grown(chain, count + room), _grown(value, arcs + room)
        z = current[t]
        for x in range(low, high):
            for a in range(first[state[x]], first[state[x] + 1]):
                if starts[a] != (history[x] == -1):
                    continue
                q, best, overlap = np.int64(phone[a]), np.int64(0), np.int64(0)
                if not starts[a]:
                    overlap = history[x] % (num_frames + 1)
                    q = history[x] // (num_frames + 1) % labels
                    best = history[x] // (num_frames + 1) // labels
                if not silent[q]:
                    overlap += 1
                    best = max(best, rank[shift[z] + overlap, 1 if wanted[z] == q else 0])
                    if wanted[z] < 0 or t + 1 == bounds[z + 1]:
                        overlap = 0
                within = (best * labels + q) * (num_frames + 1) + overlap
                for h, possible in ((np.int64(-1), ends[target[a]]), (within, goes_on[target[a]])):
                    if possible:
                        y = _find(state, history, chain, heads, count, target[a], h)
                        count = max(count, y + 1)
                        source[arcs], to[arcs], origin[arcs] = x, y, a
                        value[arcs] = worth[best] if h == -1 and not silent[q] else 0.0
                        arcs += 1
        low, high = high, count
        heads = _more_heads(state, history, chain, heads, count)
    return source[:arcs].copy(), to[:arcs].copy(), origin[:arcs].copy(), state[:count].copy(), value[:arcs].copy()


@numba.njit(nogil=True, cache=True)
def _next_row(row, reference, symbol, after):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Distances to the beginnings of the reference, one symbol on; kept relative to that of the empty beginning.

    R. A. Wagner and M. J. Fischer, "The string-to-string correction problem", JACM 21(1), 1974.
    """
    after[0] = 0
    for j in range(len(reference)):
        changed = row[j] + (0 if reference[j] == symbol else 1) - 1  # the empty beginning is one farther away
        after[j + 1] = min(changed, row[j + 1], after[j] + 1)


@numba.njit(nogil=True, cache=True)
def _find_row(rows, chain, heads, count, row):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The number of a row: ``count``, where it is entered, if it is new."""
    key = np.uint64(14695981039346656037)
    for value in row:
        key = (key ^ np.uint64(value + 32768)) * np.uint64(1099511628211)
    b = np.int64((key >> np.uint64(20)) & np.uint64(len(heads) - 1))
    x = heads[b]
    while x >= 0:
        if np.array_equal(rows[x], row):
            return x
        x = chain[x]
    rows[count], chain[count] = row, heads[b]
    heads[b] = count
    return count


@numba.njit(nogil=True, cache=True)
def _wider(rows):  # type: ignore[no-untyped-def]  # pragma: no cover
    larger = np.empty((2 * len(rows), rows.shape[1]), rows.dtype)
    larger[: len(rows)] = rows
    return larger


@numba.njit(nogil=True, cache=True)
def _by_edit_distance(first, target, symbol, reference, symbols, num_frames, max_states):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Source, target and original of the arcs of `with_edit_distance`, the originals of its states, and the values.

    The history of a state is the number of its row of distances. Stops beyond ``max_states``.
    """
    size, length = 2 * len(target) + 2, len(reference)
    source, to, origin = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    value = np.empty(size, np.float32)
    state, history, chain = np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size, np.int32)
    heads = np.full(1024, -1, np.int32)
    rows, step = np.empty((64, length + 1), np.int16), np.full((64, symbols), -1, np.int32)
    row_chain, row_heads = np.empty(64, np.int32), np.full(1 << 16, -1, np.int32)
    after = np.arange(length + 1).astype(np.int16)
    num_rows = 1 + _find_row(rows, row_chain, row_heads, 0, after)
    state[0], history[0] = 0, 0
    low, high, count, arcs = 0, 1, 1, 0
    for _ in range(num_frames):
        room = _out_arcs(first, state, low, high)
        source, to, origin = _grown(source, arcs + room), _grown(to, arcs + room), _grown(origin, arcs + room)
        state, history = _grown(state, count + room), _grown(history, count + room)
        chain, value = _grown(chain, count + room), _grown(value, arcs + room)
        for x in range(low, high):
            for a in range(first[state[x]], first[state[x] + 1]):
                h, gain = history[x], 0
                if symbol[a] >= 0:
                    if step[h, symbol[a]] < 0:
                        if num_rows == len(rows):
                            known = len(step)
                            rows, step = _wider(rows), _wider(step)
                            step[known:] = -1
                            row_chain = _grown(row_chain, len(rows))
                        _next_row(rows[h], reference, symbol[a], after)
                        step[h, symbol[a]] = _find_row(rows, row_chain, row_heads, num_rows, after)
                        num_rows = max(num_rows, step[h, symbol[a]] + 1)
                    h = np.int64(step[h, symbol[a]])
                    gain = rows[history[x], length] - rows[h, length] - 1
                y = _find(state, history, chain, heads, count, target[a], h)
                count = max(count, y + 1)
                source[arcs], to[arcs], origin[arcs], value[arcs] = x, y, a, gain
                arcs += 1
        low, high = high, count
        if count > max_states:
            break
        heads = _more_heads(state, history, chain, heads, count)
    return source[:arcs].copy(), to[:arcs].copy(), origin[:arcs].copy(), state[:count].copy(), value[:arcs].copy()
