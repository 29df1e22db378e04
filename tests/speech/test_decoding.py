from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("kaldi_decoder", reason="needs the speech extra")

import kaldi_decoder
import kaldifst

from quadric.speech.decoding import (
    MAX_EXTENSIONS,
    DecodeOptions,
    Decoder,
    Hypothesis,
    Trial,
    search,
)
from quadric.speech.graph import decoding_graph, read_graph, write_graph
from quadric.speech.language_model import NGram
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import Tying, monophone
from reference.spoken import noiseless, noisy, spoken, transduce
from reference.toy_language import LEXICON, TYINGS, triphone

pytestmark = pytest.mark.speech

NUMBERS = Lexicon(
    tuple(
        (word, tuple(phones.split()))
        for word, phones in {
            "ONE": "w ah n",
            "TWO": "t uw",
            "THREE": "th r iy",
            "FOUR": "f ao r",
            "TEN": "t eh n",
            "TENTH": "t eh n th",
        }.items()
    )
)


class Task:
    """A graph on disk, sentences and a way to say each."""

    def __init__(self, folder: Path, tying: Tying, lexicon: Lexicon, count: int = 12) -> None:
        self.tying, self.words, self.graph = tying, lexicon.words, folder / "graph.fst"
        rng = np.random.default_rng(7)
        self.text = {f"u{i:02}": tuple(rng.choice(lexicon.words, size=1 + i % 5).tolist()) for i in range(count)}
        NGram.estimate(self.text.values(), lexicon.words, 2).write_arpa(folder / "lm.arpa")
        write_graph(decoding_graph(lexicon, folder / "lm.arpa", tying), self.graph)
        self.pdfs = {name: spoken(words, lexicon, tying, rng) for name, words in self.text.items()}
        self.noiseless = {name: noiseless(pdfs, tying.num_pdfs) for name, pdfs in self.pdfs.items()}
        self.noisy = {name: noisy(pdfs, tying.num_pdfs, rng) for name, pdfs in self.pdfs.items()}

    def decoder(self, *, jobs: int = 1, max_active: int = 4000) -> Decoder:
        options = DecodeOptions(beam=40.0, max_active=max_active)
        return Decoder(self.graph, self.words, self.tying.num_pdfs, options=options, jobs=jobs)

    def errors(self, hypotheses: dict[str, Hypothesis]) -> int:
        """Utterances that are wrong."""
        return sum(hypothesis.words != self.text[name] for name, hypothesis in hypotheses.items())


@pytest.fixture(params=["mono", "tri"], scope="module")
def numbers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    tying = monophone(NUMBERS.phones) if request.param == "mono" else triphone(NUMBERS.phones)
    return Task(tmp_path_factory.mktemp(request.param), tying, NUMBERS)


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(tmp_path_factory.mktemp("numbers"), monophone(NUMBERS.phones), NUMBERS)


def test_a_noiseless_toy_is_recognised_perfectly(numbers: Task) -> None:
    with numbers.decoder() as decoder:
        hypotheses = decoder.decode(numbers.noiseless, 1.0)
    assert {name: hypothesis.words for name, hypothesis in hypotheses.items()} == numbers.text
    assert all(hypothesis.reached_final for hypothesis in hypotheses.values())
    assert {name: hypothesis.frames for name, hypothesis in hypotheses.items()} == {
        name: len(pdfs) for name, pdfs in numbers.pdfs.items()
    }


@pytest.mark.parametrize("context", ["mono", "tri"])
def test_words_and_cost_are_those_of_the_best_path(tmp_path: Path, context: str) -> None:
    """Homophones, prefixes and variants: the language model decides, the cost says how."""
    toy = Task(tmp_path, TYINGS[context], LEXICON)
    graph = read_graph(toy.graph)
    with toy.decoder() as decoder:
        hypotheses = decoder.decode(toy.noiseless, 1.0)
    for name, hypothesis in hypotheses.items():
        every = transduce(graph, toy.pdfs[name], LEXICON.words)
        assert hypothesis.words == min(every, key=every.__getitem__)
        assert hypothesis.cost == pytest.approx(min(every.values()), abs=1e-3)


def test_the_acoustic_scale_scales_the_scores(mono: Task) -> None:
    with mono.decoder() as decoder:
        scaled = decoder.decode({name: 4.0 * scores for name, scores in mono.noisy.items()}, 0.125)
        assert scaled == decoder.decode(mono.noisy, 0.5)
        assert scaled != decoder.decode(mono.noisy, 0.25)


@pytest.mark.slow
def test_results_do_not_depend_on_the_processes(mono: Task) -> None:
    with mono.decoder(jobs=1) as one, mono.decoder(jobs=2) as two:
        for penalty in (0.0, 1.5):
            expected = one.decode(mono.noisy, 0.5, word_penalty=penalty)
            backwards = [(name, mono.noisy[name]) for name in reversed(mono.noisy)]
            found = two.decode(iter(backwards), 0.5, word_penalty=penalty)
            assert found == expected
            assert list(found) == [name for name, _ in backwards]
        with pytest.raises(ValueError, match="u03 are not finite"):
            two.decode({**mono.noisy, "u03": np.full((9, mono.tying.num_pdfs), np.nan)}, 0.5)
        assert two.decode(mono.noisy, 0.5) == one.decode(mono.noisy, 0.5)


def test_progress_sees_every_utterance(mono: Task) -> None:
    seen: list[tuple[int | None, str]] = []

    def progress(items: Iterator, *, total: int | None, what: str) -> Iterator:
        for item in items:
            seen.append((total, what))
            yield item

    with mono.decoder() as decoder:
        decoder.decode(mono.noiseless, 1.0, progress=progress)
    assert seen == [(12, "decoding")] * 12


def test_a_penalty_takes_words_away(mono: Task) -> None:
    with mono.decoder() as decoder:
        counts = [
            sum(len(found.words) for found in decoder.decode(mono.noisy, 0.3, word_penalty=penalty).values())
            for penalty in (-6.0, 0.0, 6.0, 60.0)
        ]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1]
        free = decoder.decode(mono.noiseless, 1.0)["u04"]
        charged = decoder.decode(mono.noiseless, 1.0, word_penalty=0.5)["u04"]
    assert charged.words == free.words
    assert charged.cost == pytest.approx(free.cost + 0.5 * len(free.words), abs=1e-3)


def test_too_few_frames_end_nowhere(mono: Task, caplog: pytest.LogCaptureFixture) -> None:
    scores = {name: np.zeros((frames, mono.tying.num_pdfs), np.float32) for name, frames in (("x", 0), ("y", 2))}
    last_start = int(np.flatnonzero(mono.tying.state_of_pdf[mono.pdfs["u04"]] == 0)[-1])
    cut = {"z": mono.noiseless["u04"][: last_start + 1]}
    with mono.decoder(max_active=2) as decoder, caplog.at_level(logging.WARNING, logger="quadric.speech.decoding"):
        hypotheses = decoder.decode({**scores, **cut}, 1.0)
    assert hypotheses["x"] == Hypothesis("x", (), math.inf, False, 0)
    assert hypotheses["y"] == Hypothesis("y", (), math.inf, False, 2)
    assert not hypotheses["z"].reached_final
    assert hypotheses["z"].words == mono.text["u04"][: len(hypotheses["z"].words)] != ()
    assert "3 of 3 utterances ended in no final state" in caplog.text
    assert "x, y, z" in caplog.text


def test_a_search_that_ends_in_no_final_state_is_widened(mono: Task) -> None:
    """What the search of the given width finds is the result, and only where it fails what one of twice that finds."""
    graph = read_graph(mono.graph)

    def alone(scores: np.ndarray, factor: int, max_active: int) -> tuple[bool, float]:
        most = factor * max_active
        options = kaldi_decoder.FasterDecoderOptions(beam=factor * 40.0, max_active=most, min_active=min(20, most - 1))
        decoder = kaldi_decoder.FasterDecoder(graph, options)
        decoder.decode(kaldi_decoder.DecodableCtc(scores))
        _, path = decoder.get_best_path()
        weight = kaldifst.get_linear_symbol_sequence(path)[3]
        return decoder.reached_final(), weight.value1 + weight.value2

    rng = np.random.default_rng(2)
    several = {name: noisy(pdfs, mono.tying.num_pdfs, rng) for name, pdfs in mono.pdfs.items()}
    rescued = better = 0
    for max_active in range(2, 20, 3):
        with mono.decoder(max_active=max_active) as decoder:
            found = decoder.decode(several, 1.0)
        for name, scores in several.items():
            narrow, wide = alone(scores, 1, max_active), alone(scores, 2, max_active)
            expected = narrow if narrow[0] else wide
            assert found[name].reached_final == expected[0]
            assert found[name].cost == pytest.approx(expected[1])
            rescued += wide[0] and not narrow[0]
            better += narrow[0] and wide[1] < narrow[1] - 0.1
    assert rescued > 0  # some searches fail and are repeated,
    assert better > 0  # and others would have found more with twice the width


def test_scores_of_another_model_are_refused(mono: Task) -> None:
    wide = np.zeros((9, mono.tying.num_pdfs + 1), np.float32)
    spoilt = wide[:, 1:].copy()
    spoilt[4, 2] = -np.inf
    with mono.decoder() as decoder:
        for scores in (wide, wide[:, 2:], wide[:, 0]):
            with pytest.raises(ValueError, match=r"utterance bad have shape .* a column for each pdf"):
                decoder.decode({"bad": scores}, 1.0)
        with pytest.raises(ValueError, match="utterance bad are not finite in frame 4"):
            decoder.decode({"bad": spoilt}, 1.0)
        with pytest.raises(ValueError, match="utterance twin twice"):
            decoder.decode([("twin", wide[:, 1:]), ("twin", wide[:, 1:])], 1.0)
        for scale in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="acoustic_scale="):
                decoder.decode({}, scale)
    with pytest.raises(ValueError, match="closed"):
        decoder.decode(mono.noiseless, 1.0)


def test_misuse(mono: Task, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such graph"):
        Decoder(tmp_path / "absent.fst", mono.words, 3)
    for words, pdfs in ((mono.words, mono.tying.num_pdfs - 1), (mono.words[:-1], mono.tying.num_pdfs)):
        with pytest.raises(ValueError, match="36 pdfs and 6 words"):
            Decoder(mono.graph, words, pdfs)
    with pytest.raises(ValueError, match="jobs=0"):
        mono.decoder(jobs=0)
    with pytest.raises(ValueError, match="beam=0"):
        DecodeOptions(beam=0.0)
    with pytest.raises(ValueError, match="max_active=1"):
        DecodeOptions(max_active=1)


def test_processes_load_no_torch() -> None:
    code = "import sys, quadric.speech.decoding; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_search_finds_weights_that_recognise(mono: Task) -> None:
    """From a weight of the language model that is far too high."""
    with mono.decoder() as decoder:

        def errors_at(lm_weight: float, word_penalty: float) -> int:
            return mono.errors(decoder.decode(mono.noisy, 1.0 / lm_weight, word_penalty=word_penalty))

        start = errors_at(30.0, 0.0)
        result = search(errors_at, lm_weights=(20.0, 30.0), word_penalties=(0.0, 1.0))
        best = decoder.decode(mono.noisy, 1.0 / result.best.lm_weight, word_penalty=result.best.word_penalty)
    assert result.best.errors == mono.errors(best) < start
    assert result.best.lm_weight < 20.0


@given(
    weight=st.floats(1.0, 60.0),
    penalty=st.floats(-6.0, 6.0),
    tilt=st.floats(-0.5, 0.5),
)
def test_the_search_reaches_a_bowl_beyond_the_grid(weight: float, penalty: float, tilt: float) -> None:
    def errors(lm_weight: float, word_penalty: float) -> int:
        x, y = math.log(lm_weight / weight) / math.log(1.5), word_penalty - penalty
        return round(1000 * (x * x + y * y + tilt * x * y))

    result = search(errors, lm_weights=(8.0, 12.0), word_penalties=(-1.0, 0.0, 1.0))
    assert result.best.errors == min(trial.errors for trial in result.trials)
    assert len({(trial.lm_weight, trial.word_penalty) for trial in result.trials}) == len(result.trials)
    assert abs(math.log(result.best.lm_weight / weight)) < math.log(1.5)
    assert abs(result.best.word_penalty - penalty) < 1.0


def test_a_coordinate_with_one_value_stays() -> None:
    result = search(lambda w, p: round(100 * abs(w - 7) + abs(p)), lm_weights=(10.0,), word_penalties=(0.0,))
    assert result.trials == (Trial(10.0, 0.0, 300),)


def test_a_search_without_a_best_value_ends() -> None:
    result = search(lambda w, p: round(1e6 / w), lm_weights=(10.0, 20.0), word_penalties=(0.0,))
    assert len(result.trials) <= 2 + 3 * MAX_EXTENSIONS
    flat = search(lambda w, p: 5, lm_weights=(8.0, 10.0, 12.0), word_penalties=(-1.0, 0.0, 1.0))
    assert (flat.best.lm_weight, flat.best.word_penalty) == (10.0, 0.0)
    assert len(flat.trials) == 5


@pytest.mark.parametrize(
    "grid",
    [
        {"lm_weights": (), "word_penalties": (0.0,)},
        {"lm_weights": (0.0, 1.0), "word_penalties": (0.0,)},
        {"lm_weights": (1.0,), "word_penalties": (math.inf,)},
        {"lm_weights": (1.0,), "word_penalties": ()},
    ],
)
def test_a_wrong_grid_is_refused(grid: dict) -> None:
    with pytest.raises(ValueError, match="at least one"):
        search(lambda w, p: 0, **grid)
