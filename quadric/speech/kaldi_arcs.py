"""The arcs of a Kaldi lattice on their way to a :class:`Lattice`: what is complete, when, and without epsilons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numba
import numpy as np

Labels = tuple[int, ...]
"""The words that begin on an arc or at an end, in their order; mostly none or one."""


class Arcs(NamedTuple):
    """Arcs and ends, several of them possible for a state, with log weights.

    A label below 0 is a sequence of at least two words: ``sequences[-label - 1]``.
    """

    source: np.ndarray
    target: np.ndarray
    transition: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    final: np.ndarray
    final_label: np.ndarray
    final_weight: np.ndarray
    num_states: int
    start: int
    sequences: tuple[Labels, ...] = ()

    def of(self, rows: Iterable[np.ndarray], finals: Iterable[np.ndarray]) -> Arcs:
        """The same states with other columns of arcs and of ends."""
        columns: dict[str, Any] = dict(zip(self._fields[:8], (*rows, *finals), strict=True))
        return self._replace(**columns)


class _Sequences:
    """Labels for sequences of words."""

    def __init__(self, known: tuple[Labels, ...] = ()) -> None:
        self.known = list(known)
        self._labels = {words: -number for number, words in enumerate(known, 1)}

    def words(self, label: int) -> Labels:
        return self.known[-label - 1] if label < 0 else (label,) if label else ()

    def join(self, first: int, second: int) -> int:
        """The label of the words of two labels."""
        if not (first and second):
            return first or second
        words = self.words(first) + self.words(second)
        if words not in self._labels:
            self.known.append(words)
            self._labels[words] = -len(self.known)
        return self._labels[words]


def connect(arcs: Arcs) -> Arcs:
    """The arcs and ends on paths from the start to an end. Raises ``ValueError`` where there are none."""
    count = arcs.num_states
    forward = _reached(*_by_state(arcs.source, arcs.target, count), np.array([arcs.start]))
    backward = _reached(*_by_state(arcs.target, arcs.source, count), np.unique(arcs.final).astype(np.int64))
    both = forward & backward
    if not both[arcs.start]:
        raise ValueError("no path leads from the start to a final state: leave the lattice out")
    kept, ends = both[arcs.source] & both[arcs.target], both[arcs.final]
    return arcs.of([column[kept] for column in arcs[:5]], [column[ends] for column in arcs[5:8]])


def _by_state(source: np.ndarray, target: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The targets in the order of the sources, and where those of each state begin."""
    order = np.argsort(source, kind="stable")
    return target[order].astype(np.int64), np.searchsorted(source[order], np.arange(count + 1))


@numba.njit(nogil=True, cache=True)
def _reached(targets, offsets, starts):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Which states can be reached from ``starts``."""
    found = np.zeros(len(offsets) - 1, np.bool_)
    stack = np.empty(len(found), np.int64)
    height = len(starts)
    stack[:height] = starts
    found[starts] = True
    while height:
        height -= 1
        state = stack[height]
        for arc in range(offsets[state], offsets[state + 1]):
            if not found[targets[arc]]:
                found[targets[arc]] = True
                stack[height] = targets[arc]
                height += 1
    return found


def times(arcs: Arcs) -> tuple[np.ndarray, np.ndarray]:
    """The states of connected arcs in an order in which no arc leads back, and the frames before each of all states.

    Raises ``ValueError`` for a cycle, for paths of different lengths and for paths without a frame.
    """
    order = np.argsort(arcs.source, kind="stable")
    offsets = np.searchsorted(arcs.source[order], np.arange(arcs.num_states + 1))
    entering = np.bincount(arcs.target, minlength=arcs.num_states)
    states, time, other = _times(
        arcs.target[order].astype(np.int64), offsets, arcs.transition[order] > 0, entering, arcs.start
    )
    if other[0] >= 0:
        raise ValueError(f"state {other[0]} has paths of {other[1]} and of {other[2]} frames from the start")
    if len(states) < len(np.union1d(arcs.source, arcs.target)):
        state = int(np.setdiff1d(arcs.target, states)[0])
        raise ValueError(f"it has a cycle, through or before state {state}: a lattice has none")
    lengths = np.unique(time[arcs.final])
    if len(lengths) > 1 or lengths[0] == 0:
        raise ValueError(
            f"its paths have {' and '.join(map(str, lengths.tolist()))} frames: one length above 0 expected"
        )
    return states, time


@numba.njit(nogil=True, cache=True)
def _times(targets, offsets, emits, entering, start):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Kahn's order from the start, the frames before each state, and the first state of two times with both."""
    order = np.empty(len(entering), np.int64)
    time = np.full(len(entering), -1, np.int64)
    left = entering.copy()
    other = np.full(3, -1, np.int64)
    time[start], order[0], count, done = 0, start, 1, 0
    if entering[start]:
        count = 0
    while done < count:
        state = order[done]
        done += 1
        for arc in range(offsets[state], offsets[state + 1]):
            target, then = targets[arc], time[state] + emits[arc]
            if time[target] >= 0 and time[target] != then and other[0] < 0:
                other[0], other[1], other[2] = target, time[target], then
            time[target] = then
            left[target] -= 1
            if left[target] == 0:
                order[count] = target
                count += 1
    return order[:count], time, other


def without_epsilons(arcs: Arcs, order: np.ndarray) -> Arcs:
    """Only arcs that take a frame; epsilon arcs are removed in the log semiring.

    The words of an epsilon arc pass on to what follows it. Paths to one arc with the same words become one, with the
    log of the sum of their weights.
    """
    silent = arcs.transition == 0
    if not silent.any():
        return arcs
    by_source = np.argsort(arcs.source, kind="stable")
    offsets = np.searchsorted(arcs.source[by_source], np.arange(arcs.num_states + 1))
    has_epsilon = np.zeros(arcs.num_states, bool)
    has_epsilon[arcs.source[silent]] = True
    columns = [column[by_source].tolist() for column in arcs[1:5]]
    sequences = _Sequences(arcs.sequences)
    ends: dict[int, dict[int, float]] = {}
    for state, label, weight in zip(*(column.tolist() for column in arcs[5:8]), strict=True):
        _add(ends.setdefault(state, {}), label, weight)
    leaving: dict[int, dict[tuple[int, int, int], float]] = {}

    def own(state: int) -> list[tuple[int, int, int, float]]:
        first, last = offsets[state], offsets[state + 1]
        return list(zip(*(column[first:last] for column in columns), strict=True))

    def rows(state: int) -> list[tuple[int, int, int, float]]:
        return [(*key, weight) for key, weight in leaving[state].items()] if state in leaving else own(state)

    for state in order[::-1][has_epsilon[order[::-1]]].tolist():
        found: dict[tuple[int, int, int], float] = {}
        ending = ends.get(state, {})
        for target, transition, label, weight in own(state):
            if transition:
                _add(found, (target, transition, label), weight)
                continue
            for to, other, word, further in rows(target):
                _add(found, (to, other, sequences.join(label, word)), weight + further)
            for word, further in ends.get(target, {}).items():
                _add(ending, sequences.join(label, word), weight + further)
        leaving[state] = found
        if ending:
            ends[state] = ending

    plain = ~has_epsilon[arcs.source]
    made = [(state, *key, weight) for state, found in leaving.items() for key, weight in found.items()]
    final = [(state, label, weight) for state, ending in ends.items() for label, weight in ending.items()]
    merged = [
        np.concatenate([column[plain], np.array(new, column.dtype)])
        for column, new in zip(arcs[:5], zip(*made, strict=True) if made else [[]] * 5, strict=True)
    ]
    finals = [np.array(new, column.dtype) for column, new in zip(arcs[5:8], zip(*final, strict=True), strict=True)]
    return arcs.of(merged, finals)._replace(sequences=tuple(sequences.known))


def _add(table: dict, key: object, weight: float) -> None:
    table[key] = float(np.logaddexp(table[key], weight)) if key in table else weight


def one_word_a_frame(arcs: Arcs, time: np.ndarray) -> tuple[Arcs, np.ndarray]:
    """The same paths with at most one word on an arc and none at an end, and the times of the new states.

    Words that find no place on their arc wait for the next arcs; those that are left at the end take the last arcs.
    Raises ``ValueError`` where a path has more words than frames.
    """
    if not np.any(arcs.label < 0) and not np.any(arcs.final_label):
        return arcs, time
    sequences = _Sequences(arcs.sequences)
    leaving: dict[int, list[tuple[int, int, Labels, float]]] = {}
    for source, target, transition, label, weight in zip(*(column.tolist() for column in arcs[:5]), strict=True):
        leaving.setdefault(source, []).append((target, transition, sequences.words(label), weight))
    ending: dict[int, list[tuple[Labels, float]]] = {}
    for state, label, weight in zip(*(column.tolist() for column in arcs[5:8]), strict=True):
        ending.setdefault(state, []).append((sequences.words(label), weight))

    # A state with the words that wait there.
    numbers: dict[tuple[int, Labels], int] = {(arcs.start, ()): 0}
    queue: list[tuple[int, Labels]] = [(arcs.start, ())]
    made: list[tuple[int, int, int, int, float]] = []
    final: list[tuple[int, int, float]] = []
    late: list[tuple[int, Labels, float]] = []
    for state, waiting in queue:
        number = numbers[state, waiting]
        for target, transition, begins, weight in leaving.get(state, []):
            words = waiting + begins
            key = (target, words[1:])
            if key not in numbers:
                numbers[key] = len(numbers)
                queue.append(key)
            made.append((number, numbers[key], transition, words[0] if words else 0, weight))
        for begins, weight in ending.get(state, []):
            if waiting + begins:
                late.append((number, waiting + begins, weight))
            else:
                final.append((number, 0, weight))
    new_time = [int(time[state]) for state, _ in numbers]
    _place_late(made, final, late, new_time)
    columns = [np.array(column, kept.dtype) for column, kept in zip(zip(*made, strict=True), arcs[:5], strict=True)]
    finals = [np.array(column, kept.dtype) for column, kept in zip(zip(*final, strict=True), arcs[5:8], strict=True)]
    return arcs.of(columns, finals)._replace(num_states=len(new_time), start=0, sequences=()), np.array(new_time)


def _place_late(
    made: list[tuple[int, int, int, int, float]],
    final: list[tuple[int, int, float]],
    late: list[tuple[int, Labels, float]],
    time: list[int],
) -> None:
    """Gives the words that are left at the ends to the arcs before them, on states of their own."""
    entering: dict[int, list[tuple[int, int, int, float]]] = {}
    for source, target, transition, word, weight in made:
        entering.setdefault(target, []).append((source, transition, word, weight))
    copies: dict[tuple[int, Labels], int] = {}
    queue: list[tuple[int, Labels]] = []

    def copy(state: int, words: Labels) -> int:
        if (state, words) not in copies:
            if time[state] == 0:
                raise ValueError("a path has more words than frames")
            copies[state, words] = len(time)
            time.append(time[state])
            queue.append((state, words))
        return copies[state, words]

    for state, words, weight in late:
        final.append((copy(state, words), 0, weight))
    for state, words in queue:
        for source, transition, word, weight in entering.get(state, []):
            *rest, last = (word, *words) if word else words
            before = copy(source, tuple(rest)) if rest else source
            made.append((before, copies[state, words], transition, last, weight))
