"""Kaldi's lattices: arcs of transition-ids or of words, with costs and epsilons, as they are in its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32


@dataclass(frozen=True, eq=False)
class KaldiLattice:
    """A lattice with an arc for every transition-id, epsilon arcs, and costs, as in Kaldi's files.

    ============== ======= ======= =====================================================================
    field          type    shape   meaning
    ============== ======= ======= =====================================================================
    source         int32   [A]     state an arc leaves
    target         int32   [A]     state an arc enters
    transition     int32   [A]     transition-id; 0: the arc takes no frame
    word           int32   [A]     label of a word in the table of words; 0: none
    graph          float64 [A]     cost of the graph: minus a log probability
    acoustic       float64 [A]     cost of the acoustics: minus a log likelihood, not scaled by Kaldi's tools
    final          int32   [F]     states where a path may end
    final_graph    float64 [F]     costs of ending there
    final_acoustic float64 [F]
    num_states     int             states 0 to ``num_states - 1``
    start          int             where every path begins
    ============== ======= ======= =====================================================================

    The costs of a compact arc are those of its first transition-id; the sums along whole paths are what counts.
    Raises ``ValueError`` for arrays that do not describe such a lattice.
    """

    source: Int32[np.ndarray, " A"]
    target: Int32[np.ndarray, " A"]
    transition: Int32[np.ndarray, " A"]
    word: Int32[np.ndarray, " A"]
    graph: Float64[np.ndarray, " A"]
    acoustic: Float64[np.ndarray, " A"]
    final: Int32[np.ndarray, " F"]
    final_graph: Float64[np.ndarray, " F"]
    final_acoustic: Float64[np.ndarray, " F"]
    num_states: int
    start: int = 0

    def __post_init__(self) -> None:
        for first, *others in (("source", "target", "transition", "word", "graph", "acoustic"),
                               ("final", "final_graph", "final_acoustic")):  # fmt: skip
            for name in others:
                if getattr(self, name).shape != getattr(self, first).shape:
                    raise ValueError(f"{name} must have one entry for each of the {len(getattr(self, first))} {first}")
        for name in ("source", "target", "final"):
            states = getattr(self, name)
            if len(states) and not 0 <= states.min() <= states.max() < self.num_states:
                raise ValueError(
                    f"{name} holds states from {states.min()} to {states.max()}; there are {self.num_states}"
                )
        if len(np.unique(self.final)) != len(self.final):
            raise ValueError("final holds a state twice: give each its cost once")
        if not 0 <= self.start < self.num_states:
            raise ValueError(f"start={self.start} is none of the {self.num_states} states: the lattice is empty")
        for name in ("transition", "word"):
            if np.any(getattr(self, name) < 0):
                raise ValueError(f"{name} holds {getattr(self, name).min()}: labels are 0 or more")
        for name in ("graph", "acoustic", "final_graph", "final_acoustic"):
            if not np.all(np.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must hold finite costs: leave out what is impossible")


class StringLattice(NamedTuple):
    """The arcs and the finals of a lattice as in the file, each with a string of transition-ids: ``length`` of them."""

    source: np.ndarray
    target: np.ndarray
    word: np.ndarray
    costs: np.ndarray  # [A, 2]
    length: np.ndarray
    strings: np.ndarray  # the transition-ids of all arcs, one behind the other
    final: np.ndarray
    final_costs: np.ndarray
    final_length: np.ndarray
    final_strings: np.ndarray
    num_states: int
    start: int


def expand(given: StringLattice) -> KaldiLattice:
    """One arc for every transition-id; an arc without any stays, as an epsilon."""
    steps = np.maximum(given.length, 1)
    first = np.cumsum(steps) - steps
    # Every arc but the last of its string enters a state of its own.
    total = int(steps.sum())
    inner = np.ones(total, bool)
    inner[first + steps - 1] = False
    fresh = given.num_states - 1 + np.cumsum(inner, dtype=np.int64)
    target = np.where(inner, fresh, np.repeat(given.target, steps))
    source = np.repeat(given.source, steps)
    source[1:][inner[:-1]] = fresh[:-1][inner[:-1]]
    transition = np.zeros(total, np.int64)
    transition[np.repeat(given.length > 0, steps)] = given.strings
    word, costs = np.zeros(total, np.int64), np.zeros((total, 2))
    word[first], costs[first] = given.word, given.costs

    # The string of a final becomes a chain of arcs behind it.
    states, lengths = given.num_states + int(inner.sum()), given.final_length
    tail = states + np.arange(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    tail_source = tail - 1
    tail_source[starts[lengths > 0]] = given.final[lengths > 0]
    ends = given.final.astype(np.int64)
    ends[lengths > 0] = tail[(starts + lengths - 1)[lengths > 0]]
    zeros = np.zeros(len(tail))
    return KaldiLattice(
        source=np.concatenate([source, tail_source]).astype(np.int32),
        target=np.concatenate([target, tail]).astype(np.int32),
        transition=np.concatenate([transition, given.final_strings]).astype(np.int32),
        word=np.concatenate([word, zeros]).astype(np.int32),
        graph=np.concatenate([costs[:, 0], zeros]),
        acoustic=np.concatenate([costs[:, 1], zeros]),
        final=ends.astype(np.int32),
        final_graph=np.ascontiguousarray(given.final_costs[:, 0]),
        final_acoustic=np.ascontiguousarray(given.final_costs[:, 1]),
        num_states=states + len(tail),
        start=given.start,
    )


def factor(lattice: KaldiLattice) -> StringLattice:
    """The arcs in chains: a state entered and left by one arc, where no word begins, is drawn into an arc."""
    entering = np.bincount(lattice.target, minlength=lattice.num_states)
    leaving = np.bincount(lattice.source, minlength=lattice.num_states)
    joint = (entering == 1) & (leaving == 1)
    joint[lattice.source[lattice.word > 0]] = False
    joint[lattice.final] = False
    joint[lattice.start] = False
    follower = np.full(lattice.num_states, -1)
    follower[lattice.source] = np.arange(len(lattice.source))  # unique where it is used
    heads = np.flatnonzero(~joint[lattice.source])
    owner, arcs, last = np.arange(len(heads)), heads, heads.copy()
    owners, chains = [owner], [arcs]
    while (on := joint[lattice.target[arcs]]).any():
        owner, arcs = owner[on], follower[lattice.target[arcs[on]]]
        last[owner] = arcs
        owners.append(owner)
        chains.append(arcs)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    owner, arcs = owner[order], np.concatenate(chains)[order]
    emits = lattice.transition[arcs] > 0
    costs = [np.bincount(owner, column[arcs], len(heads)) for column in (lattice.graph, lattice.acoustic)]
    number = np.cumsum(~joint) - 1
    return StringLattice(
        source=number[lattice.source[heads]],
        target=number[lattice.target[last]],
        word=lattice.word[heads],
        costs=np.stack(costs, 1),
        length=np.bincount(owner[emits], minlength=len(heads)),
        strings=lattice.transition[arcs[emits]],
        final=number[lattice.final],
        final_costs=np.stack([lattice.final_graph, lattice.final_acoustic], 1),
        final_length=np.zeros(len(lattice.final), np.int64),
        final_strings=np.zeros(0, np.int64),
        num_states=int((~joint).sum()),
        start=int(number[lattice.start]),
    )


def plain(lattice: KaldiLattice) -> StringLattice:
    """Every arc with its one transition-id."""
    return StringLattice(
        source=lattice.source,
        target=lattice.target,
        word=lattice.word,
        costs=np.stack([lattice.graph, lattice.acoustic], 1),
        length=np.ones(len(lattice.source), np.int64),
        strings=lattice.transition,
        final=lattice.final,
        final_costs=np.stack([lattice.final_graph, lattice.final_acoustic], 1),
        final_length=np.zeros(len(lattice.final), np.int64),
        final_strings=np.zeros(0, np.int64),
        num_states=lattice.num_states,
        start=lattice.start,
    )
