"""Accuracies by their definitions, one path at a time: the twins of quadric.lattice.accuracy."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from quadric.lattice.lattice import Lattice, StatePath
from reference.levenshtein import edit_distance


def lattice_paths(lattice: Lattice) -> Iterator[tuple[int, ...]]:
    """All sequences of arcs from state 0 to the end."""

    def extend(state: int, arcs: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(arcs) == lattice.num_frames:
            yield arcs
            return
        for arc in np.flatnonzero(lattice.source == state).tolist():
            yield from extend(int(lattice.target[arc]), (*arcs, arc))

    yield from extend(0, ())


def weight_of(lattice: Lattice, arcs: tuple[int, ...]) -> float:
    """The log weight of a path, its end included."""
    last = int(lattice.target[arcs[-1]]) - int(lattice.levels[-2])
    return float(lattice.weight[list(arcs)].astype(np.float64).sum() + lattice.final[last])


class Segment(NamedTuple):
    phone: int
    start: int
    end: int


def segments(phone: list[int], begins: list[bool]) -> list[Segment]:
    """The phones with their frames, each called what its first frame is; the first frame begins one."""
    starts = [t for t in range(len(phone)) if begins[t] or t == 0]
    return [Segment(phone[s], s, e) for s, e in zip(starts, [*starts[1:], len(phone)], strict=True)]


def segments_of_path(lattice: Lattice, arcs: tuple[int, ...]) -> list[Segment]:
    return segments(lattice.phone[list(arcs)].tolist(), lattice.begins[list(arcs)].tolist())


def segments_of_reference(reference: StatePath) -> list[Segment]:
    return segments(reference.phone.tolist(), reference.begins.tolist())


def frames_right(
    found: list[int], wanted: list[int], silent: list[bool], silent_reference: list[bool], one_class: bool
) -> int:
    right = 0
    for f, w, s, r in zip(found, wanted, silent, silent_reference, strict=True):
        if one_class:
            right += f == w or (s and r)
        else:
            right += f == w and not s
    return right


def approximate(found: list[Segment], wanted: list[Segment], silence: Collection[int]) -> Fraction:
    total = Fraction(0)
    for q in found:
        if q.phone in silence:
            continue
        worths = [Fraction(-1)]
        for z in wanted:
            if z.phone not in silence:
                overlap = Fraction(max(0, min(q.end, z.end) - max(q.start, z.start)), z.end - z.start)
                worths.append(-1 + (2 if q.phone == z.phone else 1) * overlap)
        total += max(worths)
    return total


def exact(found: list[Segment], wanted: list[Segment], silence: Collection[int]) -> int:
    said = [str(s.phone) for s in wanted if s.phone not in silence]
    heard = [str(s.phone) for s in found if s.phone not in silence]
    return len(said) - edit_distance(said, heard)
