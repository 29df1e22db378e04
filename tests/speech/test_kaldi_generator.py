"""The search of kaldi-decoder in the place of quadric's own: the same lattices as far as beams go."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kaldi_decoder", reason="needs the speech extra")

from quadric.lattice.automaton import Automaton
from quadric.lattice.expectation import path_sums
from quadric.lattice.generate import Generator, LatticeOptions, NoPath
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.words import best_words
from quadric.speech.kaldi_generator import KaldiGenerator
from quadric.speech.lattices import Lattices, make_lattices
from reference.searches import lattice_paths, random_graph, same, steps
from reference.toy_language import TYINGS, toy_graphs
from reference.wheel import as_transducer, sums, wheel_decoder, wheel_lattice

pytestmark = pytest.mark.speech

TEXT = [("A", "B"), ("AB",), ("BE", "A"), ("A", "B", "A"), ("ABBA",), ("ABBA", "A"), ("ABBAH", "BE")]
WIDE = LatticeOptions(beam=1e3, lattice_beam=1e3, max_active=10**6)
USUAL = LatticeOptions(14.0, 6.0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> LabelledAutomaton:
    return toy_graphs(tmp_path_factory.mktemp("toy"), "tri", 2, TEXT)[1]


def random_scores(context: str, *lengths: int) -> dict[str, np.ndarray]:
    rng, pdfs = np.random.default_rng(0), TYINGS[context].num_pdfs
    return {f"u{i}": rng.normal(scale=1.5, size=(frames, pdfs)).astype(np.float32) for i, frames in enumerate(lengths)}


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 6), lattice_beam=st.sampled_from([0.5, 3.0, 50.0]))
def test_on_any_graph_the_paths_within_the_lattice_beam(seed: int, frames: int, lattice_beam: float) -> None:
    """Those of the own search, with their weights, up to float32 rounding where the lattice beam cuts."""
    rng = np.random.default_rng(seed)
    graph, scores = random_graph(rng, arcs=12), rng.normal(scale=2.0, size=(frames, 4))
    options = replace(WIDE, lattice_beam=lattice_beam)
    try:
        less = Generator(graph, replace(options, lattice_beam=lattice_beam - 1e-3))(scores)
    except NoPath:
        with pytest.raises(NoPath, match=f"through {frames} frames to a final state within a beam of 2000"):
            KaldiGenerator(graph, options)(scores)
        return
    more = Generator(graph, replace(options, lattice_beam=lattice_beam + 1e-3))(scores)
    found = KaldiGenerator(graph, options)(scores)
    assert steps(less) <= steps(found) <= steps(more)
    assert set(lattice_paths(less)) <= set(lattice_paths(found)) <= set(lattice_paths(more))
    assert less.num_states <= found.num_states <= more.num_states
    assert best_words(found, scores) == best_words(less, scores)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("context", ["mono", "tri"])
def test_all_paths_of_a_language(tmp_path: Path, context: str, order: int) -> None:
    """Beams that cut nothing: what one lattice holds the other holds, and no path is counted twice."""
    _, graph = toy_graphs(tmp_path, context, order, TEXT)
    for scores in random_scores(context, 3, 7, 15).values():
        own, found = Generator(graph, WIDE)(scores), KaldiGenerator(graph, WIDE)(scores)
        assert steps(own) == steps(found) and own.num_states == found.num_states
        assert path_sums(own, scores).log_z == pytest.approx(path_sums(found, scores).log_z, abs=1e-6)


@pytest.mark.parametrize("context", ["mono", "tri"])
def test_narrow_beams_differ_at_the_edges(tmp_path: Path, context: str) -> None:
    _, graph = toy_graphs(tmp_path, context, 2, TEXT)
    options = LatticeOptions(8.0, 6.0)
    for scores in random_scores(context, 40, 90).values():
        ours, found = Generator(graph, options)(scores), KaldiGenerator(graph, options)(scores)
        assert best_words(ours, scores) == best_words(found, scores)
        assert path_sums(ours, scores).log_z == pytest.approx(path_sums(found, scores).log_z, abs=0.5)
        assert found.num_arcs == pytest.approx(ours.num_arcs, rel=0.1) and steps(ours) != steps(found)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("context", ["mono", "tri"])
def test_beams_leave_nearly_the_same(tmp_path: Path, context: str, order: int) -> None:
    """Also beside the same decoder on the graph with its epsilons, whose paths a unigram does not have side by side."""
    fst, graph = toy_graphs(tmp_path, context, order, TEXT)
    own, other = Generator(graph, USUAL), KaldiGenerator(graph, USUAL)
    wheel = wheel_decoder(fst, USUAL.beam, USUAL.lattice_beam)
    arcs = np.zeros(2)
    for scores in random_scores(context, 5, 40, 90).values():
        ours, found = own(scores), other(scores)
        assert best_words(ours, scores) == best_words(found, scores)
        assert path_sums(ours, scores).log_z == pytest.approx(path_sums(found, scores).log_z, abs=1e-3)
        there = wheel_lattice(wheel, scores)
        assert there is not None
        best, total = sums(there)
        own_best, own_total = sums(as_transducer(found, scores))
        assert own_best == pytest.approx(best, abs=1e-3) if order == 1 else best - 1e-3 <= own_best <= best + 1.0
        assert own_total == pytest.approx(total, abs=0.1 if order == 1 else 0.3)
        arcs += ours.num_arcs, found.num_arcs
    assert arcs[0] == pytest.approx(arcs[1], rel=1e-3)


def without_labels(automaton: Automaton) -> LabelledAutomaton:
    nothing = np.zeros(automaton.num_arcs, np.int32)
    return LabelledAutomaton(automaton, nothing, nothing, nothing.astype(bool))


def test_a_second_search_is_wider() -> None:
    """The way to the end is 15 worse than the way to nowhere: beyond a beam of 10, within its double."""
    automaton = Automaton.from_arcs([(0, 1, 0, 0.0), (1, 1, 0, 0.0), (0, 2, 0, -15.0), (2, 3, 0, 0.0)], final={3: 0.0})
    graph = without_labels(automaton)
    assert KaldiGenerator(graph, LatticeOptions(10.0, 5.0))(np.zeros((2, 1))).num_arcs == 2
    with pytest.raises(NoPath, match="2 frames to a final state within a beam of 14"):
        KaldiGenerator(graph, LatticeOptions(7.0, 5.0))(np.zeros((2, 1)))
    with pytest.raises(NoPath, match="1 frames"):
        KaldiGenerator(graph, LatticeOptions(100.0, 5.0))(np.zeros((1, 1)))


def test_an_impossible_arc_is_no_path() -> None:
    automaton = Automaton.from_arcs([(0, 1, 0, -np.inf), (0, 1, 1, 0.0), (1, 2, 0, -np.inf)], final={1: 0.0, 2: 0.0})
    generator = KaldiGenerator(without_labels(automaton))
    assert generator(np.zeros((1, 2))).pdf.tolist() == [1]
    with pytest.raises(NoPath):
        generator(np.zeros((2, 2)))


def test_weights_are_those_of_the_graph() -> None:
    """Not float32 sums and differences of costs: of the arcs, and of the ends in the order of their states."""
    automaton = Automaton.from_arcs([(0, 2, 0, -0.1), (0, 1, 0, -1e-9), (0, 3, 0, 0.3)], final={1: 0.1, 2: 0.7, 3: 2.0})
    lattice = KaldiGenerator(without_labels(automaton), WIDE)(np.full((1, 1), -3e4))
    ends = dict(zip(lattice.weight.tolist(), lattice.final[lattice.target - 1].tolist(), strict=True))
    assert ends == {np.float32(-0.1): 0.7, np.float32(-1e-9): 0.1, np.float32(0.3): 2.0}


def test_misuse(graph: LabelledAutomaton, caplog: pytest.LogCaptureFixture) -> None:
    generator = KaldiGenerator(graph)
    assert generator.options == LatticeOptions() and not caplog.text
    scores = np.zeros((4, graph.num_pdfs))
    wrong = np.where(np.arange(4)[:, None] == 2, np.nan, scores)
    for given_scores, said in (
        (scores[0], "matrix"),
        (scores[:0], "matrix"),
        (scores[:, :-1], "columns, but the graph emits pdf"),
        (wrong, "not finite in frame 2"),
    ):
        with pytest.raises(ValueError, match=said):
            generator(given_scores)
    with caplog.at_level(logging.WARNING):
        KaldiGenerator(graph, LatticeOptions(max_active=10**7))
        assert not caplog.text
        KaldiGenerator(graph, LatticeOptions(max_active=77))
    assert "max_active=77 is not used: backend=kaldi has no such limit" in caplog.text


def test_threads_do_not_change_lattices(graph: LabelledAutomaton) -> None:
    generator, scores = KaldiGenerator(graph, USUAL), list(random_scores("tri", *range(10, 30, 2)).values())
    alone = [generator(row) for row in scores]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(generator, scores * 2))
    assert all(same(a, b) for a, b in zip(alone * 2, together, strict=True))


def test_a_store_tells_who_made_it(tmp_path: Path, graph: LabelledAutomaton) -> None:
    scores = random_scores("tri", 20, 2, 30)
    made = make_lattices(scores, graph, USUAL, tmp_path / "kaldi", backend="kaldi", jobs=2)
    generator = KaldiGenerator(graph, USUAL)
    assert [*made] == ["u0", "u2"] and all(same(made[id], generator(scores[id])) for id in made)
    assert "through 2 frames to a final state within a beam of 28:" in Lattices(tmp_path / "kaldi").skipped["u1"]
    with pytest.raises(ValueError, match="made with backend=kaldi, now quadric: name another folder"):
        make_lattices(scores, graph, USUAL, tmp_path / "kaldi")
    make_lattices(scores, graph, USUAL, tmp_path / "quadric")
    with pytest.raises(ValueError, match="made with backend=quadric, now kaldi: name another folder"):
        make_lattices(scores, graph, USUAL, tmp_path / "quadric", backend="kaldi")
    with pytest.raises(ValueError, match="backend=wheel: must be 'quadric' or 'kaldi'"):
        make_lattices(scores, graph, USUAL, tmp_path / "other", backend="wheel")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_a_backend_that_is_not_installed(
    tmp_path: Path, graph: LabelledAutomaton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kaldi_decoder", None)
    monkeypatch.delitem(sys.modules, "quadric.speech.kaldi_generator")
    scores = random_scores("tri", 20)
    with pytest.raises(ImportError, match=r"backend=kaldi: kaldi_decoder is not installed: pip install 'quadric\[spee"):
        make_lattices(scores, graph, USUAL, tmp_path / "s", backend="kaldi")
    assert not (tmp_path / "s").exists()
    assert len(make_lattices(scores, graph, USUAL, tmp_path / "s")) == 1
