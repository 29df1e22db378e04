"""Every path of a lattice, one by one, and lattices to list them of: the twin of quadric.speech.kaldi_frames."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from quadric.lattice.lattice import Lattice
from quadric.speech.kaldi_lattice import KaldiLattice
from quadric.speech.transitions import NO_PDF, HmmState, Topology, TransitionModel

Says = tuple[tuple[int, ...], ...]


def kaldi_paths(lattice: KaldiLattice) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float, float]]:
    """Transition-ids, words, graph cost and acoustic cost of every complete path."""
    ends = {state: index for index, state in enumerate(lattice.final.tolist())}
    columns = (lattice.source, lattice.target, lattice.transition, lattice.word, lattice.graph, lattice.acoustic)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    leaving = {state: [row for row in rows if row[0] == state] for state in range(lattice.num_states)}

    def extend(
        state: int, ids: tuple[int, ...], words: tuple[int, ...], graph: float, acoustic: float
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float, float]]:
        if state in ends:
            yield ids, words, graph + lattice.final_graph[ends[state]], acoustic + lattice.final_acoustic[ends[state]]
        for _, target, transition, word, more, sound in leaving[state]:
            yield from extend(
                target,
                (*ids, transition) if transition else ids,
                (*words, word) if word else words,
                graph + more,
                acoustic + sound,
            )

    yield from extend(lattice.start, (), (), 0.0, 0.0)


def split_to_phones(ids: tuple[int, ...], model: TransitionModel, reorder: bool) -> list[bool]:
    """Where phones begin: a phone ends with the transition to its end, and the self loops behind it."""
    begins, place = [False] * len(ids), 0
    while place < len(ids):
        begins[place] = True
        while place < len(ids) and not model.ends[ids[place]]:
            place += 1
        place += 1
        while reorder and place < len(ids) and model.self_loop[ids[place]]:
            place += 1
    return begins


def add(table: dict, key: object, weight: float) -> None:
    table[key] = float(np.logaddexp(table.get(key, -math.inf), weight))


def expected(lattice: KaldiLattice, model: TransitionModel, reorder: bool) -> dict[Says, float]:
    """The log weight of everything that a lattice says: pdfs, phones, their first frames, words."""
    table: dict[Says, float] = {}
    for ids, words, graph, _ in kaldi_paths(lattice):
        where = list(ids)
        begins = tuple(split_to_phones(ids, model, reorder))
        add(table, (tuple(model.pdf[where].tolist()), tuple((model.phone[where] - 1).tolist()), begins, words), -graph)
    return table


def found(lattice: Lattice) -> dict[Says, float]:
    """The same of a :class:`Lattice`."""
    table: dict[Says, float] = {}

    def extend(state: int, arcs: tuple[int, ...]) -> None:
        if len(arcs) == lattice.num_frames:
            where = list(arcs)
            says = tuple(tuple(column[where].tolist()) for column in (lattice.pdf, lattice.phone, lattice.begins))
            words = tuple(word for word in lattice.word[where].tolist() if word)
            weight = float(lattice.weight[where].astype(np.float64).sum())
            add(table, (*says, words), weight + lattice.final[state - lattice.num_states])
            return
        for arc in np.flatnonzero(lattice.source == state).tolist():
            extend(int(lattice.target[arc]), (*arcs, arc))

    extend(0, ())
    return table


def short_model() -> TransitionModel:
    """Phone 1 of one state, phone 2 of one or two, phone 3 of two that share their pdf; a chain model's phone 4."""
    one, chain = HmmState(0, 0, ((0, 0.5), (1, 0.5))), HmmState(0, 1, ((0, 0.5), (1, 0.5)))
    skip, rest = HmmState(0, 0, ((0, 0.3), (1, 0.3), (2, 0.4))), HmmState(1, 1, ((1, 0.5), (2, 0.5)))
    end = HmmState(NO_PDF, NO_PDF, ())
    topologies = (
        Topology((1,), (one, end)),
        Topology((2,), (skip, rest, end)),
        Topology((3,), (skip._replace(transitions=((0, 0.5), (1, 0.5))), rest, end)),
        Topology((4,), (chain, end)),
    )
    states = [[1, 0, 0, 0], [2, 0, 1, 1], [2, 1, 2, 2], [3, 0, 3, 3], [3, 1, 3, 3], [4, 0, 4, 5]]
    return TransitionModel(topologies, np.array(states, np.int32), np.zeros(14, np.float32))


Arc = tuple[object, object, int]


def topology_arcs(model: TransitionModel, frames: int, reorder: bool) -> list[Arc]:
    """All that the model allows in so many frames, from ``(0, "between")`` to ``(frames, "between")``; 0: epsilon."""
    arcs: list[Arc] = []
    ids = range(1, model.num_ids + 1)
    entries = [id for id in ids if model.hmm_state[id] == 0 and not model.self_loop[id]]
    onward = [id for id in ids if not model.self_loop[id]]
    loops = {int(model.state[id]): id for id in ids if model.self_loop[id]}
    starts = sorted({int(model.state[id]) for id in ids if model.hmm_state[id] == 0})

    def after(id: int) -> list[int]:
        """The transition-states that may follow a transition within its phone."""
        return sorted(
            {
                int(model.state[other])
                for other in ids
                if model.phone[other] == model.phone[id] and model.hmm_state[other] == model.target[id]
            }
        )

    for t in range(frames):
        if reorder:
            arcs += [((t, "between"), (t + 1, id), id) for id in entries]
            for id in onward:
                arcs += [((t, id), (t + 1, other), other) for other in onward if model.state[other] in after(id)]
                if int(model.state[id]) in loops:
                    arcs.append(((t, id), (t + 1, id), loops[int(model.state[id])]))
        else:
            arcs += [((t, "between"), (t, state), 0) for state in starts]
            arcs += [((t, state), (t + 1, state), id) for state, id in loops.items()]
            for id in onward:
                goals = ["between"] if model.ends[id] else after(id)
                arcs += [((t, int(model.state[id])), (t + 1, goal), id) for goal in goals]
    if reorder:
        arcs += [((t + 1, id), (t + 1, "between"), 0) for t in range(frames) for id in onward if model.ends[id]]
    return arcs


def allowed(ids: tuple[int, ...], model: TransitionModel, reorder: bool) -> bool:
    """Whether the model allows transition-ids, as whole phones."""
    arcs = topology_arcs(model, len(ids), reorder)

    def along(states: set[object], id: int) -> set[object]:
        return {target for source, target, label in arcs if label == id and source in states}

    states: set[object] = {(0, "between")}
    for id in ids:
        states = along(states | along(states, 0), id)
    return (len(ids), "between") in states | along(states, 0)


def random_kaldi_lattice(
    model: TransitionModel, rng: np.random.Generator, *, frames: int, reorder: bool, words: float = 0.2
) -> KaldiLattice | None:
    """Paths that the model allows, in a net of states as a decoder builds it; None where none is complete.

    Self loops stand behind (``reorder``) or in front of the transition that leaves their state. ``words`` is the
    probability of a word on an arc; some arcs are left out, others doubled, and states are numbered at random.
    """
    arcs = topology_arcs(model, frames, reorder)
    return _net(arcs, (0, "between"), (frames, "between"), rng, words)


def _net(
    arcs: list[tuple[object, object, int]], start: object, end: object, rng: np.random.Generator, words: float
) -> KaldiLattice | None:
    def reach(edges: list[tuple[object, object]], place: object) -> set[object]:
        seen, queue = {place}, [place]
        for state in queue:
            for source, target in edges:
                if source == state and target not in seen:
                    seen.add(target)
                    queue.append(target)
        return seen

    def complete(kept: list[tuple[object, object, int]]) -> list[tuple[object, object, int]]:
        on = reach([arc[:2] for arc in kept], start) & reach([(arc[1], arc[0]) for arc in kept], end)
        return [arc for arc in kept if arc[0] in on and arc[1] in on]

    arcs = complete(arcs)
    while arcs and len(complete(arcs)) > 26:
        arcs.pop(rng.integers(len(arcs)))
    kept = complete(arcs)
    kept += [arc for arc in kept if rng.random() < 0.1]
    if not kept:
        return None
    states = sorted({state for arc in kept for state in arc[:2]}, key=repr)
    number = dict(zip(states, rng.permutation(len(states)).tolist(), strict=True))
    order = rng.permutation(len(kept))

    def column(values: list[int]) -> np.ndarray:
        return np.array(values, np.int32)[order]

    def costs(count: int) -> np.ndarray:
        return rng.normal(size=count).astype(np.float32).astype(np.float64)

    return KaldiLattice(
        source=column([number[source] for source, _, _ in kept]),
        target=column([number[target] for _, target, _ in kept]),
        transition=column([id for _, _, id in kept]),
        word=np.where(rng.random(len(kept)) < words, rng.integers(1, 4, len(kept)), 0).astype(np.int32),
        graph=costs(len(kept)),
        acoustic=costs(len(kept)),
        final=np.array([number[end]], np.int32),
        final_graph=costs(1),
        final_acoustic=costs(1),
        num_states=len(states),
        start=number[start],
    )
