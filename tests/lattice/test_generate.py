from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.automaton import Automaton
from quadric.lattice.generate import Generator, LatticeOptions, NoPath
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.words import best_words
from reference.searches import beam_search, graph_paths, lattice_paths, random_graph, same, score, steps

WIDE = LatticeOptions(beam=1e4, lattice_beam=1e4, max_active=10**6)


def random_case(seed: int, frames: int, **sizes: int) -> tuple[LabelledAutomaton, np.ndarray]:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, **sizes)
    return graph, rng.normal(scale=2.0, size=(frames, 4)).astype(np.float32)


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 5), lattice_beam=st.sampled_from([0.5, 3.0, 50.0]))
def test_exactly_the_paths_within_the_lattice_beam(seed: int, frames: int, lattice_beam: float) -> None:
    """By a list of all paths: none that is near enough is missing, and every arc is on one that is."""
    graph, scores = random_case(seed, frames, arcs=12)
    every = {path: score(*path, scores) for path in graph_paths(graph, frames)}
    generator = Generator(graph, replace(WIDE, lattice_beam=lattice_beam))
    if not every:
        with pytest.raises(NoPath, match=f"through {frames} frames"):
            generator(scores)
        return
    lattice, best = generator(scores), max(every.values())
    found = list(lattice_paths(lattice))
    assert {path for path, x in every.items() if x >= best - lattice_beam + 1e-6} <= set(found) <= set(every)
    near = {(t, step) for path in found if every[path] >= best - lattice_beam - 1e-6 for t, step in enumerate(path[0])}
    assert set(steps(lattice)) == near
    words = tuple(step[1] for step in max(every, key=every.__getitem__)[0] if step[1])
    assert best_words(lattice, scores) == words


@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 12),
    beam=st.sampled_from([2.0, 6.0, 1e3]),
    max_active=st.sampled_from([2, 4, 9, 1000]),
)
def test_the_search_is_that_of_the_slow_twin(seed: int, frames: int, beam: float, max_active: int) -> None:
    """Also where beams and the number of active states cut: what is kept does not depend on the order of the work."""
    graph, scores = random_case(seed, frames, states=30, arcs=110)
    options = LatticeOptions(beam, min(beam, 4.0), max_active)
    expected = beam_search(graph, scores, beam, options.lattice_beam, max_active) or beam_search(
        graph, scores, 2.0 * beam, options.lattice_beam, 2 * max_active
    )
    if expected is None:
        with pytest.raises(NoPath):
            Generator(graph, options)(scores)
        return
    lattice = Generator(graph, options)(scores)
    assert steps(lattice) == expected[0]
    assert lattice.num_states == expected[1]


def test_more_active_states_than_bins_and_buffers() -> None:
    """Thousands of states a frame, most of them cut by their number; equals of the last one stay."""
    rng = np.random.default_rng(0)
    states, frames = 6000, 4
    rows = [(0, s, int(rng.integers(4)), float(rng.normal())) for s in range(1, states)]
    rows += [(s, int(rng.integers(1, states)), int(rng.integers(4)), round(float(rng.normal()), 1))
             for s in range(1, states) for _ in range(3)]  # fmt: skip
    automaton = Automaton.from_arcs(rows, final=dict.fromkeys(range(states), 0.0))
    nothing = np.zeros(automaton.num_arcs, np.int32)
    graph = LabelledAutomaton(automaton, nothing, nothing, nothing.astype(bool))
    scores = rng.normal(size=(frames, 4)).astype(np.float32)
    for most in (2, 300, 2500):
        lattice = Generator(graph, LatticeOptions(1e3, 2.0, most))(scores)
        expected = beam_search(graph, scores, 1e3, 2.0, most)
        assert expected is not None
        assert (steps(lattice), lattice.num_states) == expected


def test_equals_of_the_last_active_state_stay() -> None:
    rows = [(0, s, 0, -1.0 if s > 2 else 0.0) for s in range(1, 9)] + [(s, 9, 0, 0.0) for s in range(1, 9)]
    automaton = Automaton.from_arcs(rows, final={9: 0.0})
    nothing = np.zeros(automaton.num_arcs, np.int32)
    graph = LabelledAutomaton(automaton, nothing, nothing, nothing.astype(bool))
    for most, arcs in ((2, 4), (3, 16), (8, 16)):
        assert Generator(graph, LatticeOptions(5.0, 5.0, most))(np.zeros((2, 1))).num_arcs == arcs


MEMORY = """
import resource
import numpy as np
from quadric.lattice.automaton import Automaton
from quadric.lattice.generate import Generator
from quadric.lattice.labelled import LabelledAutomaton

states, frames = 50_000, 5_000
chain = np.arange(states, dtype=np.int32)
nothing = np.zeros(states - 1, np.int32)
automaton = Automaton(chain[:-1], chain[1:], nothing, np.zeros(states - 1), np.zeros(states))
generator = Generator(LabelledAutomaton(automaton, nothing, nothing, nothing.astype(bool)))
generator(np.zeros((10, 1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert generator(np.zeros((frames, 1))).num_arcs == frames
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_the_active_states() -> None:
    """One is active in a frame, of fifty thousand: a byte for each in each frame would be 240 MiB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) < 20_000  # KiB


def test_threads_do_not_change_lattices() -> None:
    graph, _ = random_case(3, 1, states=200, arcs=900)
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=(int(frames), 4)) for frames in rng.integers(20, 60, size=24)]
    alone = [Generator(graph, LatticeOptions(8.0, 4.0, 60))(row) for row in scores]
    generator = Generator(graph, LatticeOptions(8.0, 4.0, 60))
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(generator, scores * 2))
    assert all(same(a, b) for a, b in zip(alone * 2, together, strict=True))


def test_a_second_search_is_wider() -> None:
    """The way to the end is 15 worse than the way to nowhere: beyond a beam of 10, within its double."""
    automaton = Automaton.from_arcs([(0, 1, 0, 0.0), (1, 1, 0, 0.0), (0, 2, 0, -15.0), (2, 3, 0, 0.0)], final={3: 0.0})
    nothing = np.zeros(4, np.int32)
    graph = LabelledAutomaton(automaton, nothing, nothing, nothing.astype(bool))
    assert Generator(graph, LatticeOptions(10.0, 5.0))(np.zeros((2, 1))).num_arcs == 2
    with pytest.raises(NoPath, match="2 frames to a final state within a beam of 14"):
        Generator(graph, LatticeOptions(7.0, 5.0))(np.zeros((2, 1)))
    with pytest.raises(NoPath, match="1 frames"):
        Generator(graph, LatticeOptions(100.0, 5.0))(np.zeros((1, 1)))


def test_an_impossible_arc_is_no_path() -> None:
    automaton = Automaton.from_arcs([(0, 1, 0, -np.inf), (0, 1, 1, 0.0), (1, 2, 0, -np.inf)], final={1: 0.0, 2: 0.0})
    nothing = np.zeros(3, np.int32)
    generator = Generator(LabelledAutomaton(automaton, nothing, nothing, nothing.astype(bool)))
    assert generator(np.zeros((1, 2))).pdf.tolist() == [1]
    with pytest.raises(NoPath):
        generator(np.zeros((2, 2)))


def test_misuse() -> None:
    graph, scores = random_case(0, 3)
    generator = Generator(graph)
    for wrong, said in (
        (scores[0], "matrix"),
        (scores[:0], "matrix"),
        (scores[:, : graph.num_pdfs - 1], "different sets of pdfs"),
    ):
        with pytest.raises(ValueError, match=said):
            generator(wrong)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = scores.copy()
        spoilt[1, 2] = bad
        with pytest.raises(ValueError, match="not finite in frame 1"):
            generator(spoilt)
    for change, said in (
        ({"beam": 0.0}, "beam=0"),
        ({"beam": math.inf}, "beam=inf"),
        ({"lattice_beam": 14.0}, "lattice_beam=14"),
        ({"lattice_beam": 0.0}, "lattice_beam=0"),
        ({"max_active": 1}, "max_active=1"),
    ):
        with pytest.raises(ValueError, match=said):
            LatticeOptions(**change)
