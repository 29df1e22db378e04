from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("kaldifst", reason="needs the speech extra")

import kaldifst

from quadric.lattice.automaton import Automaton
from quadric.lattice.semiring import forward_backward
from quadric.speech.graph import (
    AlignmentGraphs,
    decoding_graph,
    read_graph,
    to_automaton,
    to_labelled,
    with_word_penalty,
    write_graph,
)
from quadric.speech.language_model import Entry, NGram
from quadric.speech.lexicon import Lexicon, read_lexicon
from quadric.speech.topology import Tying, monophone, phone_segments
from reference.graph_paths import said_by_arrays, said_by_fst
from reference.spoken import Ways, expected, transduce, ways_to_say
from reference.toy_language import LEXICON, TYINGS, triphone

pytestmark = pytest.mark.speech

SILENCE, LOOP = 0.3, 0.6
TEXT = [("A", "B"), ("AB",), ("BE", "A"), ("A", "B", "A"), ("ABBA",), ("A",), ("A", "B")]


@pytest.fixture(params=["mono", "tri"])
def tying(request: pytest.FixtureRequest) -> Tying:
    return TYINGS[request.param]


def queries(ways: Ways, rng: np.random.Generator, *, longest: int) -> Iterator[list[int]]:
    """Frame sequences of what can be said, of that with one state wrong, missing or doubled, and of noise."""
    sequences = [states for states in ways if len(states) <= longest]
    num_pdfs = 1 + max(max(states) for states in sequences if states)
    for index in rng.choice(len(sequences), size=40, replace=False):
        states = list(sequences[index])
        yield [pdf for pdf in states for _ in range(rng.integers(1, 3))]
        if states:
            at = int(rng.integers(len(states)))
            yield [*states[:at], int(rng.integers(num_pdfs)), *states[at + 1 :]]
            yield states[:at] + states[at + 1 :]
            yield [*states[: at + 1], *states[max(0, at - 2) :]]
    for _ in range(20):
        yield rng.integers(num_pdfs, size=rng.integers(1, 7)).tolist()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_decoding_graph_accepts_exactly_what_the_lexicon_says(tmp_path: Path, tying: Tying, order: int) -> None:
    """Also the whole cost of every path: words in the language model, silences and durations."""
    model = NGram.estimate(TEXT, LEXICON.words, order)
    model.write_arpa(tmp_path / "lm.arpa")
    graph = decoding_graph(LEXICON, tmp_path / "lm.arpa", tying, silence_probability=SILENCE, self_loop=LOOP)
    sentences = [words for count in range(4) for words in product(LEXICON.words, repeat=count)]
    ways = ways_to_say(sentences, LEXICON, tying, lambda words: -model.sentence_log_prob(words), SILENCE)
    rejected = 0
    for pdfs in queries(ways, np.random.default_rng(1), longest=18):
        # The list of sentences is complete up to three phones that are not silence.
        said = [pdf for i, pdf in enumerate(pdfs) if tying.phone_of_pdf[pdf] and (i == 0 or pdf != pdfs[i - 1])]
        if len(said) > 9:
            continue
        found, right = transduce(graph, pdfs, LEXICON.words), expected(pdfs, ways, LOOP)
        assert found == pytest.approx(right, abs=1e-4)
        rejected += not right
    assert rejected > 20


def cheapest(model: NGram, history: tuple[str, ...], words: tuple[str, ...]) -> float:
    """The cost of ``words`` after ``history`` where any history may be backed off from."""
    if not words:
        return 0.0
    ways = [math.inf]
    if (*history, words[0]) in model.entries:
        ways.append(cheapest(model, (*history, words[0]), words[1:]) - model.entries[(*history, words[0])].log_prob)
    if history:
        ways.append(cheapest(model, history[1:], words) - model.back_off(history))
    return min(ways)


@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_model_keeps_its_costs(tmp_path: Path, seed: int) -> None:
    """n-grams left out at random, also those that longer ones end in, and a word that the lexicon lacks."""
    rng = np.random.default_rng(seed)
    text = [tuple(rng.choice((*LEXICON.words, "X"), size=4).tolist()) for _ in range(30)]
    whole = NGram.estimate(text, (*LEXICON.words, "X"), 3)
    kept = {
        ngram: Entry(entry.log_prob, float(rng.normal()) if len(ngram) < 3 else 0.0)
        for ngram, entry in sorted(whole.entries.items())
        if len(ngram) == 1 or rng.random() < 0.6
    }
    model = NGram({ngram: entry for ngram, entry in kept.items() if len(ngram) < 3 or ngram[:2] in kept})
    assert any(len(ngram) == 3 and ngram[1:] not in kept for ngram in model.entries)
    model.write_arpa(tmp_path / "lm.arpa")
    tying = TYINGS["mono"]
    graph = decoding_graph(LEXICON, tmp_path / "lm.arpa", tying, silence_probability=SILENCE, self_loop=LOOP)
    for words in product(LEXICON.words, repeat=3):
        cost = cheapest(model, ("<s>",), (*words, "</s>"))
        ways = ways_to_say([words], LEXICON, tying, lambda words, cost=cost: cost, SILENCE)
        pdfs = min(ways, key=len)
        found = transduce(graph, pdfs, LEXICON.words)
        assert found[words] == pytest.approx(expected(pdfs, ways, LOOP)[words], abs=1e-4)


def test_costs_by_hand(tmp_path: Path) -> None:
    """The cost of A in SIL a with 4 and 5 frames, and of BE B without silence in 6."""
    tying = TYINGS["mono"]
    model = NGram.estimate(TEXT, LEXICON.words, 2)
    model.write_arpa(tmp_path / "lm.arpa")
    graph = decoding_graph(LEXICON, tmp_path / "lm.arpa", tying, silence_probability=0.2, self_loop=0.7)
    found = transduce(graph, [0, 1, 1, 2, 3, 3, 4, 4, 5], LEXICON.words)
    log_p = model.log_prob("A", ("<s>",)) + model.log_prob("</s>", ("A",))
    by_hand = -log_p - math.log(0.2) - math.log(0.8) - 3 * math.log(0.7) - 6 * math.log(0.3)
    assert found == pytest.approx({("A",): by_hand}, abs=1e-5)
    found = transduce(graph, [6, 7, 8, 6, 7, 8], LEXICON.words)
    log_p = model.log_prob("BE", ("<s>",)) + model.log_prob("B", ("BE",)) + model.log_prob("</s>", ("B",))
    by_hand = -log_p - 3 * math.log(0.8) - 6 * math.log(0.3)
    assert found["BE", "B"] == pytest.approx(by_hand, abs=1e-5)
    assert set(found) == set(product(("B", "BE"), repeat=2))


@pytest.mark.parametrize("words", [(), ("A",), ("AB", "BE"), ("A", "B", "AB")])
def test_an_alignment_graph_accepts_exactly_its_words(tying: Tying, words: tuple[str, ...]) -> None:
    graph = AlignmentGraphs(LEXICON, tying, silence_probability=SILENCE, self_loop=LOOP).graph(words)
    ways = ways_to_say([words], LEXICON, tying, lambda words: 0.0, SILENCE)
    others = ways_to_say(list(product(LEXICON.words, repeat=2)), LEXICON, tying, lambda words: 0.0, SILENCE)
    for pdfs in [*ways, *queries(others, np.random.default_rng(2), longest=30)]:
        assert transduce(graph, pdfs, LEXICON.words) == pytest.approx(expected(pdfs, ways, LOOP), abs=1e-4)


@pytest.mark.parametrize("words", [(), ("AB",), ("A", "AB")])
def test_an_automaton_holds_every_state_sequence_once(tying: Tying, words: tuple[str, ...]) -> None:
    """log Z of flat scores, by enumeration of the ways to say the words and of their durations."""
    graphs = AlignmentGraphs(LEXICON, tying, silence_probability=SILENCE, self_loop=LOOP)
    automaton = graphs.automaton(words)
    ways = ways_to_say([words], LEXICON, tying, lambda words: 0.0, SILENCE)
    scores = np.random.default_rng(3).normal(size=(14, tying.num_pdfs))
    by_hand = -np.inf
    for states, said in ways.items():
        # Columns are states, one path runs through them: the classic trellis, with 1 - LOOP to leave the last.
        alpha = np.full(len(states) + 1, -np.inf)
        alpha[0] = 0.0
        for frame in scores:
            enter = alpha[:-1] + np.where(np.arange(len(states)) == 0, 0.0, math.log(1 - LOOP))
            stay = np.logaddexp(alpha[1:] + math.log(LOOP), enter) + frame[list(states)]
            alpha = np.concatenate([[-np.inf], stay])
        if states:
            by_hand = np.logaddexp(by_hand, alpha[-1] + math.log(1 - LOOP) - said[words])
    assert forward_backward(automaton, scores).log_z == pytest.approx(by_hand, abs=1e-5)
    assert automaton.min_frames == min(map(len, ways))


def transducer(arcs: list[tuple[int, int, int, float]], final: dict[int, float]) -> kaldifst.StdVectorFst:
    """From arcs (source, target, input label, cost) and final costs."""
    fst = kaldifst.StdVectorFst()
    for _ in range(1 + max([*final, *(max(arc[:2]) for arc in arcs)])):
        fst.add_state()
    fst.start = 0
    for source, target, label, cost in arcs:
        fst.add_arc(source, kaldifst.StdArc(label, 0, cost, target))
    for state, cost in final.items():
        fst.set_final(state, cost)
    return fst


def arcs_of(automaton: Automaton) -> list[tuple[int, int, int]]:
    return list(zip(automaton.source.tolist(), automaton.target.tolist(), automaton.pdf.tolist(), strict=True))


def test_epsilons_are_summed_not_minimised() -> None:
    """Two epsilon paths from 0 to 2, an epsilon to the end, a state that leads nowhere."""
    fst = transducer(
        [(0, 1, 0, 1.0), (1, 2, 0, 0.5), (0, 2, 0, 2.0), (2, 3, 7, 0.25), (3, 4, 0, 0.125), (2, 5, 8, 0.0)],
        {3: 3.0, 4: 1.0},
    )
    automaton = to_automaton(fst)
    assert arcs_of(automaton) == [(0, 1, 6)]
    assert automaton.weight[0] == pytest.approx(math.log(math.exp(-1.5) + math.exp(-2.0)) - 0.25)
    assert automaton.final[1] == pytest.approx(math.log(math.exp(-3.0) + math.exp(-1.125)))
    assert automaton.final[0] == -np.inf


def test_parallel_arcs_become_one_and_cycles_stay() -> None:
    automaton = to_automaton(transducer([(0, 0, 1, 1.0), (0, 0, 1, 2.0), (0, 1, 2, 0.0), (1, 0, 0, 0.5)], {1: 0.0}))
    assert arcs_of(automaton)[:2] == [(0, 0, 0), (0, 1, 1)]
    assert automaton.weight[0] == pytest.approx(math.log(math.exp(-1.0) + math.exp(-2.0)))
    assert forward_backward(automaton, np.zeros((3, 2))).log_z > -np.inf


def test_epsilon_cycles_and_empty_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="cycle of epsilon arcs"):
        to_automaton(transducer([(0, 1, 0, 1.0), (1, 0, 0, 1.0), (1, 2, 1, 0.0)], {2: 0.0}))
    with pytest.raises(ValueError, match="accepts nothing"):
        to_automaton(transducer([(0, 1, 1, 0.0), (2, 2, 1, 0.0)], {2: 0.0}))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_labelled_graph_says_what_the_graph_says(tmp_path: Path, tying: Tying, order: int) -> None:
    """The same words for the same frames, with the same weights; homophones at the end of a sentence too."""
    NGram.estimate(TEXT, LEXICON.words, order).write_arpa(tmp_path / "lm.arpa")
    fst = decoding_graph(LEXICON, tmp_path / "lm.arpa", tying, silence_probability=SILENCE, self_loop=LOOP)
    graph = to_labelled(fst, tying)
    sentences = [words for count in range(4) for words in product(LEXICON.words, repeat=count)]
    ways = ways_to_say(sentences, LEXICON, tying, lambda words: 0.0, SILENCE)
    several = 0
    for pdfs in queries(ways, np.random.default_rng(4), longest=15):
        if pdfs:
            found = said_by_arrays(graph, pdfs)
            assert found == pytest.approx(said_by_fst(fst, pdfs), abs=1e-9)
            several += len(found) > 1
    assert several > 20


def test_phones_begin_where_their_segments_do(tmp_path: Path, tying: Tying) -> None:
    NGram.estimate(TEXT, LEXICON.words, 2).write_arpa(tmp_path / "lm.arpa")
    graph = to_labelled(decoding_graph(LEXICON, tmp_path / "lm.arpa", tying), tying)
    arcs, rng, repeated = graph.automaton, np.random.default_rng(5), 0
    for _ in range(50):
        state, path = arcs.start, list[int]()
        while len(path) < 60 and arcs.offsets[state] < arcs.offsets[state + 1]:
            path.append(int(rng.integers(arcs.offsets[state], arcs.offsets[state + 1])))
            state = arcs.target[path[-1]]
        segments = phone_segments(arcs.pdf[path], tying)
        assert np.flatnonzero(graph.begins[path]).tolist() == [segment.start for segment in segments]
        assert graph.phone[path].tolist() == [s.phone for s in segments for _ in range(s.end - s.start)]
        repeated += any(a.phone == b.phone for a, b in pairwise(segments))
    assert repeated > 10


def test_a_graph_of_another_tying_is_refused(tmp_path: Path) -> None:
    NGram.estimate(TEXT, LEXICON.words, 2).write_arpa(tmp_path / "lm.arpa")
    fst = decoding_graph(LEXICON, tmp_path / "lm.arpa", TYINGS["tri"])
    with pytest.raises(ValueError, match=r"the tying has 9 pdfs"):
        to_labelled(fst, TYINGS["mono"])
    for label in (2, 4):  # the second state of silence, and the first one of a, behind the first of silence
        with pytest.raises(ValueError, match="not made of the tying's phones"):
            to_labelled(
                transducer([(0, 1, 1, 0.0), (1, 2, label, 0.0), (2, 3, 2, 0.0), (2, 3, 1, 0.0)], {3: 0.0}),
                TYINGS["mono"],
            )
    with pytest.raises(ValueError, match="not made of the tying's phones"):
        to_labelled(transducer([(0, 1, 2, 0.0)], {1: 0.0}), TYINGS["mono"])


@pytest.mark.parametrize("penalty", [-0.75, 0.0, 2.0])
def test_every_word_costs_the_penalty(tmp_path: Path, tying: Tying, penalty: float) -> None:
    NGram.estimate(TEXT, LEXICON.words, 2).write_arpa(tmp_path / "lm.arpa")
    graph = decoding_graph(LEXICON, tmp_path / "lm.arpa", tying)
    charged = with_word_penalty(graph, penalty)
    ways = ways_to_say(list(product(LEXICON.words, repeat=2)), LEXICON, tying, lambda words: 0.0, SILENCE)
    checked = 0
    for pdfs in list(ways)[::7]:
        before = transduce(graph, pdfs, LEXICON.words)
        after = {words: cost + penalty * len(words) for words, cost in before.items()}
        assert transduce(charged, pdfs, LEXICON.words) == pytest.approx(after, abs=1e-4)
        checked += len(before)
    assert checked > 10
    with pytest.raises(ValueError, match="finite"):
        with_word_penalty(graph, math.inf)


def test_words_that_only_one_side_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lm.arpa"
    NGram.estimate([("A", "X"), ("X",)], ("A", "X"), 2).write_arpa(path)
    with caplog.at_level(logging.WARNING, logger="quadric.speech.graph"):
        graph = decoding_graph(LEXICON, path, TYINGS["mono"])
    assert "1 words are left out of the graph, the lexicon lacks them: X" in caplog.text
    assert "lacks 5 of the lexicon's words" in caplog.text
    assert set(transduce(graph, [3, 4, 5], LEXICON.words)) == {("A",)}
    assert transduce(graph, [6, 7, 8], LEXICON.words) == {}
    NGram.estimate([("X",)], ("X",), 2).write_arpa(path)
    with pytest.raises(ValueError, match="no word in common"):
        decoding_graph(LEXICON, path, TYINGS["mono"])


def test_misuse(tmp_path: Path) -> None:
    tying = TYINGS["mono"]
    graphs = AlignmentGraphs(LEXICON, tying)
    with pytest.raises(ValueError, match=r"2 words .*Y \(2\), X \(1\)"):
        graphs.graph(("Y", "A", "X", "Y"))
    with pytest.raises(ValueError, match="silence_probability=0"):
        AlignmentGraphs(LEXICON, tying, silence_probability=0.0)
    with pytest.raises(ValueError, match=r"self_loop=1\.0"):
        AlignmentGraphs(LEXICON, tying, self_loop=1.0)
    with pytest.raises(ValueError, match="lacks the phones b"):
        AlignmentGraphs(LEXICON, monophone(("a",)))
    with pytest.raises(FileNotFoundError, match="no such language model"):
        decoding_graph(LEXICON, tmp_path / "absent.arpa", tying)


def test_graphs_on_disk(tmp_path: Path) -> None:
    graph = AlignmentGraphs(LEXICON, TYINGS["mono"]).graph(("A", "B"))
    write_graph(graph, tmp_path / "graph.fst")
    assert read_graph(tmp_path / "graph.fst").to_str() == graph.to_str()
    assert [path.name for path in tmp_path.iterdir()] == ["graph.fst"]
    with pytest.raises(FileNotFoundError, match="no such graph"):
        read_graph(tmp_path / "absent.fst")
    (tmp_path / "text").write_text("not a graph")
    with pytest.raises(ValueError, match="not a graph"):
        read_graph(tmp_path / "text")


def test_a_phone_that_no_word_has_does_no_harm() -> None:
    """A tying may know more phones than the lexicon of the day."""
    tying = triphone(("z", *LEXICON.phones))
    ways = ways_to_say([("AB",)], LEXICON, tying, lambda words: 0.0, 0.5)
    graph = AlignmentGraphs(LEXICON, tying).graph(("AB",))
    for pdfs in ways:
        assert transduce(graph, pdfs, LEXICON.words) == pytest.approx(expected(pdfs, ways, 0.5), abs=1e-4)


@pytest.mark.data
def test_graphs_of_a_real_lexicon(shared_data: Path, tmp_path: Path) -> None:
    corpus = shared_data / "speechocean762"
    lexicon: Lexicon = read_lexicon(corpus / "lexicon.txt")
    text = [tuple(line.split()[1:]) for line in (corpus / "data" / "train" / "text").open()]
    NGram.estimate(text, lexicon.words, 2).write_arpa(tmp_path / "lm.arpa")
    tying = monophone(lexicon.phones)
    graph = decoding_graph(lexicon, tmp_path / "lm.arpa", tying)
    assert 40_000 < graph.num_states < 70_000
    began = time.process_time()
    labelled = to_labelled(graph, tying)
    assert time.process_time() - began < 4.0
    assert labelled.num_arcs < 1.5 * sum(graph.num_arcs(state) for state in range(graph.num_states))
    graphs = AlignmentGraphs(lexicon, tying)
    began = time.process_time()
    shortest = [graphs.automaton(words).min_frames for words in text[:200]]
    assert time.process_time() - began < 200 * 0.02
    least = [sum(3 * min(map(len, lexicon.pronunciations(word))) for word in words) for words in text[:200]]
    assert shortest == least
