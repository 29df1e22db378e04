"""The lattice: the likely sentences of one utterance with their alignments, as a frozen record of arcs.

A lattice is a state-level acceptor without cycles and without epsilons, in which every arc takes exactly one frame.
States are numbered frame by frame, so that a recursion over frames is a loop over runs of arcs. Segments (a phone or a
word with its frames) are chains of such arcs. The scores of the frames are not part of it: with new acoustics only
they change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from quadric.lattice.arrays import check_types


@dataclass(frozen=True, eq=False)
class Lattice:
    """The paths of one utterance of T frames, every one of them complete.

    ======== ======= ======= ===============================================================================
    field    type    shape   meaning
    ======== ======= ======= ===============================================================================
    source   int32   [A]     state an arc leaves, ascending
    target   int32   [A]     state an arc enters, one frame later
    pdf      int32   [A]     what the arc emits: a column of the scores
    weight   float32 [A]     log probability of the arc in the graph: language model, pronunciation, transitions
    word     int32   [A]     label of the word that begins here: its index in the list of words + 1; 0: none does
    phone    int32   [A]     phone the arc belongs to
    begins   bool    [A]     whether the arc is the first frame of its phone
    frames   int64   [T+1]   the arcs of frame t are those from ``frames[t]`` to ``frames[t + 1]``
    final    float64 [S_T]   log weight of ending, for each of the states after the last frame, which are the last
    ======== ======= ======= ===============================================================================

    State 0 is the start, alone at its time. Every state is on a path from it to the end. The word's label may come a
    phone before the word, or later than its first frame, as in the graphs; the order of the words is right.

    Raises ``ValueError`` when the arrays do not describe such a lattice.

    >>> lattice = Lattice.from_arcs([(0, 1, 5), (0, 2, 6), (1, 3, 5), (2, 3, 6)], final={3: 0.0})
    >>> lattice.num_frames, lattice.num_states, lattice.num_arcs
    (2, 4, 4)
    """

    source: Int32[np.ndarray, " A"]
    target: Int32[np.ndarray, " A"]
    pdf: Int32[np.ndarray, " A"]
    weight: Float32[np.ndarray, " A"]
    word: Int32[np.ndarray, " A"]
    phone: Int32[np.ndarray, " A"]
    begins: Bool[np.ndarray, " A"]
    frames: Int64[np.ndarray, " T+1"]
    final: Float64[np.ndarray, " S_T"]

    def __post_init__(self) -> None:
        types = {name: np.int32 for name in ("source", "target", "pdf", "word", "phone")}
        check_types(self, {**types, "weight": np.float32, "begins": np.bool_, "frames": np.int64, "final": np.float64})
        lengths = {name: len(getattr(self, name)) for name in (*types, "weight", "begins")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"every field of arcs must have one entry per arc; their lengths are {lengths}")
        self._check_frames()
        self._check_states()
        for name in ("weight", "final"):
            if not np.all(np.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must hold finite log weights: leave out what is impossible")
        for name in ("pdf", "word", "phone"):
            if getattr(self, name).min() < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name).min()}")

    def _check_frames(self) -> None:
        edges = self.frames
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != self.num_arcs or np.any(np.diff(edges) <= 0):
            raise ValueError(
                f"frames must ascend from 0 to the {self.num_arcs} arcs, with an arc at least for every frame"
            )

    def _check_states(self) -> None:
        if np.any(np.diff(self.source) < 0):
            raise ValueError("source must ascend: sort the arcs, or build with Lattice.from_arcs")
        edges = self.levels
        frame = np.repeat(np.arange(self.num_frames), np.diff(self.frames))
        for name, time in (("source", frame), ("target", frame + 1)):
            states = getattr(self, name)
            if np.any(states < edges[time]) or np.any(states >= edges[time + 1]):
                raise ValueError(f"{name} must hold states of its frame: number the states frame by frame")
        reached = np.bincount(self.target, minlength=self.num_states)[1:]
        left = np.bincount(self.source, minlength=self.num_states)[: edges[-2]]
        if self.source[0] != 0 or np.any(reached == 0) or np.any(left == 0):
            raise ValueError("every state must lie on a path from state 0 to the end: leave out the others")

    @classmethod
    def from_arcs(
        cls,
        arcs: Iterable[tuple[int, int, int]],
        *,
        final: Mapping[int, float],
        weight: Iterable[float] | None = None,
        word: Iterable[int] | None = None,
        phone: Iterable[int] | None = None,
        begins: Iterable[bool] | None = None,
    ) -> Lattice:
        """Builds one from arcs ``(source, target, pdf)`` in any order; what is not given is 0, or false.

        The states must be numbered frame by frame, without gaps, and every path be complete.
        """
        rows = np.array(list(arcs), np.int64).reshape(-1, 3)
        if not len(rows):
            raise ValueError("arcs is empty: a lattice has at least one path")
        order = np.argsort(rows[:, 0], kind="stable")
        source, target, pdf = (np.ascontiguousarray(column, np.int32) for column in rows[order].T)
        level = np.zeros(int(rows[:, :2].max()) + 1, np.int64)
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            level[t] = level[s] + 1
        last = np.flatnonzero(level == level.max())
        if sorted(final) != last.tolist():
            raise ValueError(f"final must give a weight to the last states {last.tolist()}, not to {sorted(final)}")

        def field(values: Iterable[float] | None, dtype: type) -> np.ndarray:
            given = np.zeros(len(rows)) if values is None else np.array(list(values))
            return given[order].astype(dtype)

        return cls(
            source=source,
            target=target,
            pdf=pdf,
            weight=field(weight, np.float32),
            word=field(word, np.int32),
            phone=field(phone, np.int32),
            begins=field(begins, np.bool_),
            frames=np.searchsorted(level[source], np.arange(level.max() + 1)).astype(np.int64),
            final=np.array([final[state] for state in last.tolist()]),
        )

    @property
    def num_frames(self) -> int:
        return len(self.frames) - 1

    def __len__(self) -> int:
        return self.num_frames

    @property
    def num_arcs(self) -> int:
        return len(self.source)

    @cached_property
    def num_states(self) -> int:
        return int(self.target.max()) + 1

    @cached_property
    def num_pdfs(self) -> int:
        """The fewest columns a matrix of scores may have: the largest pdf plus one."""
        return int(self.pdf.max()) + 1

    @property
    def density(self) -> float:
        """Arcs a frame."""
        return self.num_arcs / self.num_frames

    @cached_property
    def levels(self) -> Int32[np.ndarray, " T+2"]:
        """The states before frame t are those from ``levels[t]`` to ``levels[t + 1]``; the last are the final ones."""
        firsts = self.source[self.frames[:-1]]
        return np.concatenate([firsts, [self.num_states - len(self.final), self.num_states]]).astype(np.int32)

    @cached_property
    def frame(self) -> Int32[np.ndarray, " A"]:
        """The frame of every arc."""
        return np.repeat(np.arange(self.num_frames, dtype=np.int32), np.diff(self.frames))

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class StatePath:
    """One way through an utterance, such as the forced alignment of its transcript: for each frame what an arc says.

    ======== ======= ======= =========================================================
    field    type    shape   meaning
    ======== ======= ======= =========================================================
    pdf      int32   [T]     what the frame emits
    phone    int32   [T]     phone it belongs to
    begins   bool    [T]     whether it is the first frame of its phone
    weight   float           log probability of the path in the graph
    ======== ======= ======= =========================================================

    Raises ``ValueError`` for arrays of other types or lengths, and where the first frame does not begin a phone.
    """

    pdf: Int32[np.ndarray, " T"]
    phone: Int32[np.ndarray, " T"]
    begins: Bool[np.ndarray, " T"]
    weight: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, {"pdf": np.int32, "phone": np.int32, "begins": np.bool_})
        lengths = {name: len(getattr(self, name)) for name in ("pdf", "phone", "begins")}
        if len(set(lengths.values())) != 1 or not len(self.pdf):
            raise ValueError(f"pdf, phone and begins must have one entry per frame; their lengths are {lengths}")
        if not self.begins[0]:
            raise ValueError("begins[0] is false: the first frame begins a phone")

    def __len__(self) -> int:
        return len(self.pdf)

    @property
    def num_phones(self) -> int:
        return int(self.begins.sum())
