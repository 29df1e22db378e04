"""The weighted automaton: a frozen record of arcs over pdfs, one arc per frame.

An automaton of one utterance holds every state sequence its words allow, an automaton of a decoding graph
every state sequence of the language. It has no epsilon arcs, so a path of ``n`` arcs explains exactly ``n``
frames, and it may be cyclic: the recursions in :mod:`quadric.lattice.semiring` are time-synchronous.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int32, Int64

from quadric.lattice.arrays import check_types


@dataclass(frozen=True, eq=False)
class Automaton:
    """An epsilon-free weighted acceptor over pdfs.

    ======== ======= ======= ==========================================================
    field    type    shape   meaning
    ======== ======= ======= ==========================================================
    source   int32   [A]     state an arc leaves, ascending
    target   int32   [A]     state an arc enters
    pdf      int32   [A]     what the arc emits: a column of the scores
    weight   float64 [A]     log probability of the arc (not a cost)
    final    float64 [S]     log weight of ending in a state, ``-inf`` where not final
    start    int             the one initial state
    ======== ======= ======= ==========================================================

    Raises ``ValueError`` when the arrays do not describe such an automaton.

    >>> loop = Automaton.from_arcs([(0, 0, 3, -0.7), (0, 1, 5, -0.7)], final={1: 0.0})
    >>> loop.num_states, loop.num_arcs, loop.min_frames
    (2, 2, 1)
    """

    source: Int32[np.ndarray, " A"]
    target: Int32[np.ndarray, " A"]
    pdf: Int32[np.ndarray, " A"]
    weight: Float64[np.ndarray, " A"]
    final: Float64[np.ndarray, " S"]
    start: int = 0

    def __post_init__(self) -> None:
        self._check_arrays()
        self._check_values()

    def _check_arrays(self) -> None:
        types = {
            "source": np.int32,
            "target": np.int32,
            "pdf": np.int32,
            "weight": np.float64,
            "final": np.float64,
        }
        check_types(self, types)
        lengths = {name: len(getattr(self, name)) for name in ("source", "target", "pdf", "weight")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"source, target, pdf and weight must have one entry per arc; their lengths are {lengths}")

    def _check_values(self) -> None:
        if not 0 <= self.start < self.num_states:
            raise ValueError(f"start={self.start} is not one of the {self.num_states} states")
        if self.num_arcs:
            for name in ("source", "target"):
                states = getattr(self, name)
                if states.min() < 0 or states.max() >= self.num_states:
                    raise ValueError(
                        f"{name} must hold states 0 to {self.num_states - 1}; final has one entry per state"
                    )
            if np.any(np.diff(self.source) < 0):
                raise ValueError("source must ascend: sort the arcs, or build with Automaton.from_arcs")
            if self.pdf.min() < 0:
                raise ValueError(f"pdf must not be negative, found {self.pdf.min()}: remove epsilon arcs first")
        for name in ("weight", "final"):
            values = getattr(self, name)
            if np.any(np.isnan(values)) or np.any(np.isposinf(values)):
                raise ValueError(f"{name} must hold log weights: neither NaN nor +inf")
        if not np.any(self.final > -np.inf):
            raise ValueError("final must be above -inf for at least one state: no path can end")

    @classmethod
    def from_arcs(
        cls, arcs: Iterable[tuple[int, int, int, float]], *, final: Mapping[int, float], start: int = 0
    ) -> Automaton:
        """Builds one from arcs ``(source, target, pdf, log weight)`` in any order and the final log weights."""
        ordered = sorted(arcs, key=lambda arc: arc[0])
        source, target, pdf, weight = zip(*ordered, strict=True) if ordered else ((), (), (), ())
        log_final = np.full(max((start, *source, *target, *final)) + 1, -np.inf)
        for state, value in final.items():
            log_final[state] = value
        return cls(
            source=np.array(source, np.int32),
            target=np.array(target, np.int32),
            pdf=np.array(pdf, np.int32),
            weight=np.array(weight, np.float64),
            final=log_final,
            start=start,
        )

    @property
    def num_states(self) -> int:
        return len(self.final)

    @property
    def num_arcs(self) -> int:
        return len(self.source)

    @property
    def num_pdfs(self) -> int:
        """The fewest columns a matrix of scores may have: the largest pdf plus one."""
        return int(self.pdf.max()) + 1 if self.num_arcs else 0

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " S+1"]:
        """Arcs that leave state ``s`` are ``offsets[s]`` to ``offsets[s + 1]``."""
        return np.searchsorted(self.source, np.arange(self.num_states + 1)).astype(np.int64)

    @cached_property
    def min_frames(self) -> int:
        """The fewest frames a path from the start to a final state takes (a breadth-first search)."""
        arcs, targets = self.offsets.tolist(), np.where(self.weight > -np.inf, self.target, -1).tolist()
        ends = (self.final > -np.inf).tolist()
        seen, queue = {self.start, -1}, deque([(self.start, 0)])
        while queue:
            state, frames = queue.popleft()
            if ends[state]:
                return frames
            for target in targets[arcs[state] : arcs[state + 1]]:
                if target not in seen:
                    seen.add(target)
                    queue.append((target, frames + 1))
        raise ValueError(f"no final state can be reached from start={self.start}: the automaton accepts nothing")

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
