"""Refinements of a lattice: the same paths with the same weights, in states that remember more.

A state of a lattice does not say when its phone began, nor which phones came before. What an arc is worth may depend
on that; then the states are split until it does not. Each refinement is the product of the lattice and a deterministic
automaton that follows its paths, so that paths and their weights correspond one to one.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Float32, Int32, Int64

from quadric.lattice.lattice import Lattice


def with_phone_starts(lattice: Lattice) -> Lattice:
    """The same paths in states that know when the phone they are within began, and whether it ends with them.

    Afterwards all arcs out of a state begin a phone or none does, and in the second case all ways into the state agree
    on the frame and the label of their last beginning. The first frame begins a phone, whatever its arcs say. What a
    state remembers lasts as long as its phone: between phones the copies of a state fall together again.

    >>> arcs = [(0, 1, 0), (0, 2, 1), (1, 3, 2), (2, 3, 2), (3, 4, 2)]
    >>> two = Lattice.from_arcs(arcs, final={4: 0.0}, begins=[True, True, True, False, False])
    >>> two.num_states, with_phone_starts(two).num_states  # state 3: of the phone from 0 on, or of that from 1 on
    (5, 6)
    """
    first, starts = _offsets(lattice), _starts_phone(lattice)
    ends, goes_on = np.zeros(lattice.num_states, np.bool_), np.zeros(lattice.num_states, np.bool_)
    ends[lattice.source[starts]] = True
    ends[lattice.levels[-2] :] = True
    goes_on[lattice.source[~starts]] = True
    labels = np.int64(lattice.phone.max()) + 1
    return _product(
        lattice, *_by_start(first, lattice.target, lattice.phone, starts, ends, goes_on, labels, lattice.num_frames)
    )


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


def _starts_phone(lattice: Lattice) -> np.ndarray:
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
def _by_start(first, target, phone, starts, ends, goes_on, labels, num_frames):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Source, target and original of the arcs of `with_phone_starts`, and the originals of its states.

    The history of a state is ``start * labels + phone``; -1 where the next frame begins a phone, or none follows.
    """
    size = 2 * len(target) + 2
    source, to, origin = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int32)
    state, history, chain = np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size, np.int32)
    heads = np.full(1024, -1, np.int32)
    state[0], history[0] = 0, -1
    low, high, count, arcs = 0, 1, 1, 0
    for t in range(num_frames):
        room = 2 * _out_arcs(first, state, low, high)
        source, to, origin = _grown(source, arcs + room), _grown(to, arcs + room), _grown(origin, arcs + room)
        state, history = _grown(state, count + room), _grown(history, count + room)
        chain = _grown(chain, count + room)
        for x in range(low, high):
            for a in range(first[state[x]], first[state[x] + 1]):
                if starts[a] != (history[x] == -1):
                    continue
                now = t * labels + phone[a] if starts[a] else history[x]
                for h, wanted in ((np.int64(-1), ends[target[a]]), (now, goes_on[target[a]])):
                    if wanted:
                        y = _find(state, history, chain, heads, count, target[a], h)
                        count = max(count, y + 1)
                        source[arcs], to[arcs], origin[arcs] = x, y, a
                        arcs += 1
        low, high = high, count
        heads = _more_heads(state, history, chain, heads, count)
    return source[:arcs].copy(), to[:arcs].copy(), origin[:arcs].copy(), state[:count].copy()


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
