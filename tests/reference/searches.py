"""Lattices the slow way: dictionaries for the search, a list of all paths for everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from hypothesis import reject

from quadric.lattice.automaton import Automaton
from quadric.lattice.generate import Generator, LatticeOptions, NoPath
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import Lattice

Step = tuple[int, int, int, bool, float]
"""What an arc says: pdf, word, phone, whether the phone begins, weight."""


def random_graph(rng: np.random.Generator, states: int = 6, arcs: int = 14, pdfs: int = 4) -> LabelledAutomaton:
    """Cycles, parallel arcs, states that lead nowhere, several ends; no two weights are the same."""
    rows = [
        (int(rng.integers(states)), int(rng.integers(states)), int(rng.integers(pdfs)), float(rng.normal()))
        for _ in range(arcs)
    ]
    ends = rng.choice(states, size=2, replace=False)
    automaton = Automaton.from_arcs(rows, final={0: -3.0, **{int(s): float(rng.normal()) for s in ends}})
    words = rng.integers(4, size=arcs) * (rng.random(arcs) < 0.5)
    return LabelledAutomaton(
        automaton, words.astype(np.int32), rng.integers(3, size=arcs).astype(np.int32), rng.random(arcs) < 0.5
    )


def step(graph: LabelledAutomaton | Lattice, a: int) -> Step:
    arcs = graph.automaton if isinstance(graph, LabelledAutomaton) else graph
    weight = float(np.float32(arcs.weight[a]))
    return int(arcs.pdf[a]), int(graph.word[a]), int(graph.phone[a]), bool(graph.begins[a]), weight


def graph_paths(graph: LabelledAutomaton, frames: int) -> Iterator[tuple[tuple[Step, ...], float]]:
    """All complete paths of so many frames with their final weights."""
    arcs = graph.automaton

    def extend(state: int, steps: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], float]]:
        if len(steps) == frames:
            if arcs.final[state] > -np.inf:
                yield steps, float(arcs.final[state])
            return
        for a in range(arcs.offsets[state], arcs.offsets[state + 1]):
            yield from extend(int(arcs.target[a]), (*steps, step(graph, a)))

    yield from extend(arcs.start, ())


def lattice_paths(lattice: Lattice) -> Iterator[tuple[tuple[Step, ...], float]]:
    leaving: dict[int, list[int]] = {}
    for a, source in enumerate(lattice.source.tolist()):
        leaving.setdefault(source, []).append(a)
    first = lattice.num_states - len(lattice.final)

    def extend(state: int, steps: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], float]]:
        if state >= first:
            yield steps, float(lattice.final[state - first])
            return
        for a in leaving[state]:
            yield from extend(int(lattice.target[a]), (*steps, step(lattice, a)))

    yield from extend(0, ())


def score(steps: tuple[Step, ...], final: float, scores: np.ndarray) -> float:
    return sum(step[4] + float(scores[t, step[0]]) for t, step in enumerate(steps)) + final


def beam_search(
    graph: LabelledAutomaton, scores: np.ndarray, beam: float, lattice_beam: float, max_active: int
) -> tuple[Counter[tuple[int, Step]], int] | None:
    """The steps of the lattice by frame, and how many states it has, or none where no final state is reached."""
    arcs = graph.automaton
    weight = arcs.weight.astype(np.float32).astype(np.float64)
    times: list[dict[int, float]] = [{arcs.start: 0.0}]
    for t, row in enumerate(scores.astype(np.float64)):
        following: dict[int, float] = {}
        for a in range(graph.num_arcs):
            if arcs.source[a] in times[t]:
                x = times[t][arcs.source[a]] + weight[a] + row[arcs.pdf[a]]
                following[int(arcs.target[a])] = max(following.get(int(arcs.target[a]), -np.inf), x)
        if t + 1 < len(scores):
            best = sorted(following.values(), reverse=True)
            low = max([best[0] - beam, *best[max_active - 1 : max_active]]) if best else 0.0
            following = {state: x for state, x in following.items() if x >= low}
        times.append(following)
    beta = {state: float(arcs.final[state]) for state in times[-1]}
    total = max([-np.inf, *(x + beta[state] for state, x in times[-1].items())])
    if total == -np.inf:
        return None
    kept: Counter[tuple[int, Step]] = Counter()
    on_path = {(0, arcs.start)}
    for t in reversed(range(len(scores))):
        before = dict.fromkeys(times[t], -np.inf)
        for a in range(graph.num_arcs):
            source, target = int(arcs.source[a]), int(arcs.target[a])
            if source in times[t] and target in times[t + 1]:
                rest = weight[a] + float(scores[t, arcs.pdf[a]]) + beta[target]
                before[source] = max(before[source], rest)
                if times[t][source] + rest >= total - lattice_beam:
                    kept[t, step(graph, a)] += 1
                    on_path |= {(t, source), (t + 1, target)}
        beta = before
    return kept, len(on_path)


def steps(lattice: Lattice) -> Counter:
    """What its arcs say, by frame."""
    return Counter((int(lattice.frame[a]), step(lattice, a)) for a in range(lattice.num_arcs))


def same(one: Lattice, other: Lattice) -> bool:
    """To the bit."""
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Lattice))


def searched_lattice(rng: np.random.Generator, frames: int, options: LatticeOptions) -> Lattice:
    """Of a random graph; a hypothesis without a path is another one's."""
    try:
        return Generator(random_graph(rng, arcs=16), options)(rng.normal(size=(frames, 4)))
    except NoPath:
        reject()
