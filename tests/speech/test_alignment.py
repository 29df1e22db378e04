from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import kaldiio
import numpy as np
import pytest

from quadric.speech.alignment import (
    Aligner,
    ForcedAlignment,
    TooShort,
    align,
    fit_lengths,
    load_alignments,
    min_frames,
    save_alignments,
)
from quadric.speech.cepstra import cepstra
from quadric.speech.corpus import read_data_dir
from quadric.speech.ctm import (
    Token,
    phone_tokens,
    read_ctm,
    spread,
    targets_from_phones,
    targets_from_words,
    word_segments,
    word_start_errors,
    word_tokens,
    write_ctm,
)
from quadric.speech.features import Fbank, extract
from quadric.speech.gaussian import GaussianBootstrap, bootstrap, uniform_start
from quadric.speech.graph import AlignmentGraphs
from quadric.speech.lexicon import Lexicon
from quadric.speech.synthesis import DIGIT_LEXICON, DigitCorpus, synthesise
from quadric.speech.topology import STATES, Segment, Tying, monophone, phone_segments
from reference.paths import path_score, paths

pytestmark = pytest.mark.speech

LEXICON = Lexicon((("A", ("X",)), ("A", ("X", "Y")), ("B", ("Y", "X")), ("C", ("X", "Y", "X"))))
TYING = monophone(LEXICON.phones)  # SIL 0-2, X 3-5, Y 6-8
SIL, X, Y = 0, 1, 2


def frames_of(*phones: int, each: int = 1) -> np.ndarray:
    """The states of some phones in order, ``each`` frames a state."""
    return np.repeat(np.array([STATES * phone + s for phone in phones for s in range(STATES)], np.int32), each)


def favouring(pdfs: np.ndarray, num_pdfs: int = TYING.num_pdfs, margin: float = 20.0) -> np.ndarray:
    scores = np.full((len(pdfs), num_pdfs), -margin, np.float32)
    scores[np.arange(len(pdfs)), pdfs] = 0.0
    return scores


# ------------------------------------------------------------------------------------------- forced alignment


def test_the_path_is_the_best_of_all() -> None:
    """Against every path of the same graph, listed."""
    rng = np.random.default_rng(0)
    for words in (("A",), ("B",), ("A", "A")):
        scores = rng.normal(scale=3.0, size=(8, TYING.num_pdfs)).astype(np.float32)
        automaton = AlignmentGraphs(LEXICON, TYING).automaton(words)
        best = max(path_score(automaton, arcs, scores) for arcs in paths(automaton, len(scores)))
        result = align({"u": words}, [("u", scores)], LEXICON, TYING)
        assert result.score == pytest.approx(best, abs=1e-3)
        segments = [TYING.phones[s.phone] for s in phone_segments(result.pdfs["u"], TYING)]
        assert "".join(p for p in segments if p != "SIL") in {"A": ["X", "XY"], "B": ["YX"]}.get(
            words[0] * len(words), ["XX", "XXY", "XYX", "XYXY"]
        )


def test_pronunciation_and_silence_follow_the_likelihoods() -> None:
    wanted = {"short": frames_of(X, SIL, X, Y, each=2), "long": frames_of(SIL, X, Y, X, each=3)}
    words = {"short": ("A", "A"), "long": ("A", "A")}
    result = align(words, [(id, favouring(pdfs)) for id, pdfs in wanted.items()], LEXICON, TYING)
    assert all(np.array_equal(result.pdfs[id], wanted[id]) for id in wanted)
    assert all(row.dtype == np.int32 for row in result.pdfs.values())


def test_processes_give_the_same_in_the_same_order() -> None:
    rng = np.random.default_rng(1)
    words = {f"u{k:02d}": ("A", "B", "C")[: 1 + k % 3] for k in range(12)}
    scores = {id: rng.normal(size=(30, TYING.num_pdfs)).astype(np.float32) for id in words}
    with Aligner(words, LEXICON, TYING, jobs=2) as aligner:
        results = [aligner(scores.items()), aligner(scores.items())]
    alone = align(words, scores.items(), LEXICON, TYING)
    for result in results:
        assert list(result.pdfs) == list(alone.pdfs)
        assert all(np.array_equal(result.pdfs[id], alone.pdfs[id]) for id in words)
        assert result.score == pytest.approx(alone.score)


def test_utterances_too_short_are_all_reported_or_dropped() -> None:
    words = {"fits": ("B",), "short": ("B", "A"), "shorter": ("C",)}
    assert [min_frames(w, LEXICON) for w in words.values()] == [6, 9, 9]
    scores = [(id, np.zeros((n, TYING.num_pdfs), np.float32)) for id, n in (("fits", 6), ("short", 8), ("shorter", 3))]
    with pytest.raises(ValueError, match=r"2 \(short: 8 frames, at least 9, shorter: 3 frames, at least 9\).*drop"):
        align(words, scores, LEXICON, TYING)
    result = align(words, scores, LEXICON, TYING, options=ForcedAlignment(on_too_short="drop"))
    assert list(result.pdfs) == ["fits"]
    assert result.too_short == (TooShort("short", 8, 9), TooShort("shorter", 3, 9))


def test_min_frames_is_that_of_the_graph() -> None:
    for words in (("A",), ("B", "A"), ("C", "C", "A")):
        assert min_frames(words, LEXICON) == AlignmentGraphs(LEXICON, TYING).automaton(words).min_frames


def test_a_narrow_beam_is_widened_and_failures_are_counted() -> None:
    """Frames that all favour the first state, hardly more than the words need: hurrying on is the expensive way."""
    words = {"u": ("C",) * 12}
    scores = favouring(np.full(min_frames(words["u"], LEXICON) + 20, STATES * X), margin=5.0)
    narrow = align(words, [("u", scores)], LEXICON, TYING, options=ForcedAlignment(beams=(1.0, 2.0)))
    assert not narrow.pdfs
    assert narrow.failed == {"u": "no path to the end of the words within a beam of 2"}
    wide = align(words, [("u", scores)], LEXICON, TYING, options=ForcedAlignment(beams=(1.0, 5000.0)))
    assert list(wide.pdfs) == ["u"] and not wide.failed


def test_scores_that_are_not_finite_fail_their_utterance_alone() -> None:
    good, bad = np.zeros((9, TYING.num_pdfs)), np.full((9, TYING.num_pdfs), np.nan)
    result = align({"good": ("A",), "bad": ("A",)}, [("bad", bad), ("good", good)], LEXICON, TYING)
    assert list(result.pdfs) == ["good"]
    assert result.failed == {"bad": "the log likelihoods are not finite"}


def test_misuse_is_explained() -> None:
    scores = np.zeros((9, TYING.num_pdfs), np.float32)
    with pytest.raises(ValueError, match="shape \\(9, 8\\), the tying has 9 pdfs"):
        align({"u": ("A",)}, [("u", scores[:, :8])], LEXICON, TYING)
    with pytest.raises(ValueError, match="utterance v, which has no transcript"):
        align({"u": ("A",)}, [("v", scores)], LEXICON, TYING)
    with pytest.raises(ValueError, match="Q"):
        align({"u": ("A", "Q")}, [("u", scores)], LEXICON, TYING)
    with pytest.raises(ValueError, match="beams"):
        ForcedAlignment(beams=())


# ------------------------------------------------------------------------------------------- files


def test_archives_round_trip_and_kaldis_are_read(tmp_path: Path) -> None:
    pdfs = {"b": frames_of(X, Y), "a": frames_of(SIL)}
    save_alignments(tmp_path / "ali.ark", pdfs)
    again = load_alignments(tmp_path / "ali.ark")
    assert list(again) == ["a", "b"]
    assert all(np.array_equal(again[id], pdfs[id]) and again[id].dtype == np.int32 for id in pdfs)
    assert [path.name for path in tmp_path.iterdir()] == ["ali.ark"]
    (tmp_path / "text.ark").write_text("a 0 1 2\nb 3 3 4\n")
    assert load_alignments(tmp_path / "text.ark")["b"].tolist() == [3, 3, 4]


def test_archives_of_something_else_are_refused(tmp_path: Path) -> None:
    kaldiio.save_ark(str(tmp_path / "features.ark"), {"a": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match=r"features\.ark: the alignment of a, .*no integer vector"):
        load_alignments(tmp_path / "features.ark")
    with pytest.raises(FileNotFoundError, match=r"nothing\.ark"):
        load_alignments(tmp_path / "nothing.ark")


def test_lengths_are_fitted_within_the_tolerance() -> None:
    pdfs = {"a": np.array([0, 1, 2], np.int32), "b": np.array([3, 4], np.int32)}
    fitted = fit_lengths(pdfs, {"a": 2, "b": 3}, num_pdfs=9, tolerance=1)
    assert [row.tolist() for row in fitted.values()] == [[0, 1], [3, 4, 4]]
    with pytest.raises(ValueError, match=r"2 \(a: 3 frames, features 2, b: 2 frames, features 3\)"):
        fit_lengths(pdfs, {"a": 2, "b": 3}, num_pdfs=9)
    with pytest.raises(ValueError, match="without features: 1 \\(b\\)"):
        fit_lengths(pdfs, {"a": 3}, num_pdfs=9)
    with pytest.raises(ValueError, match="outside 0 to 3 in 1 \\(b\\)"):
        fit_lengths(pdfs, {"a": 3, "b": 2}, num_pdfs=4)


# ------------------------------------------------------------------------------------------- words, phones, times


def test_word_segments_find_the_pronunciations_used() -> None:
    pdfs = frames_of(SIL, X, Y, SIL, X, Y, X, SIL, each=2)
    first, second = word_segments(("A", "C"), pdfs, LEXICON, TYING)
    assert first == ("A", ("X", "Y"), 6, 18)
    assert second == ("C", ("X", "Y", "X"), 24, 42)


def test_word_segments_revise_an_early_choice() -> None:
    """X Y Y X is A B only if A takes both X and Y, although X alone comes first in the lexicon."""
    found = word_segments(("A", "B"), frames_of(X, Y, Y, X), LEXICON, TYING)
    assert [segment.phones for segment in found] == [("X", "Y"), ("Y", "X")]
    ambiguous = word_segments(("A", "A", "A", "B"), frames_of(X, X, Y, X, Y, Y, X), LEXICON, TYING)
    assert [segment.phones for segment in ambiguous] == [("X",), ("X", "Y"), ("X", "Y"), ("Y", "X")]


@pytest.mark.parametrize("phones", [(X, SIL, Y, SIL, X), (X,), (Y, Y), (X, Y, Y, X, X)])
def test_phones_that_are_not_the_words_are_refused(phones: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no pronunciation of A B"):
        word_segments(("A", "B"), frames_of(*phones), LEXICON, TYING)


def test_word_segments_of_silence_alone() -> None:
    assert word_segments((), frames_of(SIL), LEXICON, TYING) == []


def test_ctm_round_trip(tmp_path: Path) -> None:
    tokens = {"u": (Token("A", 0.1, 0.25), Token("B", 0.25, 0.5)), "t": (Token("C", 0.0, 0.3),)}
    write_ctm(tmp_path / "words.ctm", tokens)
    assert (tmp_path / "words.ctm").read_text().startswith("t 1 0.0000 0.3000 C\n")
    again = read_ctm(tmp_path / "words.ctm")
    assert {id: [token.label for token in some] for id, some in again.items()} == {"t": ["C"], "u": ["A", "B"]}
    assert again["u"][1][1:] == pytest.approx((0.25, 0.5))
    (tmp_path / "bad.ctm").write_text("u 1 0.0 0.1 A\nu 1 x 0.1 A\n")
    with pytest.raises(ValueError, match=r"bad.ctm:2"):
        read_ctm(tmp_path / "bad.ctm")


def test_spread_shares_frames_evenly_and_in_context() -> None:
    assert spread([Segment(X, 0, 7), Segment(Y, 7, 9), Segment(SIL, 9, 12)], TYING).tolist() == [
        *(3, 3, 3, 4, 4, 5, 5), *(6, 7), *(0, 1, 2)
    ]  # fmt: skip
    table = np.arange(27 * STATES, dtype=np.int32).reshape(3, 3, 3, STATES)
    triphone = Tying(TYING.phones, 3, table)
    targets = spread([Segment(X, 0, 3), Segment(Y, 3, 6)], triphone)
    assert targets.tolist() == [*table[X, SIL, Y], *table[Y, X, SIL]]


def test_targets_from_times_give_those_times_back() -> None:
    pdfs = spread([Segment(SIL, 0, 5), Segment(X, 5, 11), Segment(Y, 11, 20), Segment(SIL, 20, 26)], TYING)
    phones = phone_tokens(pdfs, TYING)
    assert np.array_equal(targets_from_phones(phones, 26, TYING), pdfs)
    spoken = [token for token in phones if token.label != "SIL"]
    assert np.array_equal(targets_from_phones(spoken, 26, TYING), pdfs), "gaps become silence"
    marked = [Token("X0", *spoken[0][1:]), Token("Y_E", *spoken[1][1:])]
    assert np.array_equal(targets_from_phones(marked, 26, TYING), pdfs)
    even = targets_from_words([Token("B", 0.05, 0.17)], 20, LEXICON, TYING)
    assert phone_segments(even, TYING) == [Segment(0, 0, 5), Segment(Y, 5, 11), Segment(X, 11, 17), Segment(0, 17, 20)]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([Token("Q", 0.0, 0.1)], "the phone Q, which the tying lacks"),
        ([Token("X", 0.0, 0.2), Token("Y", 0.1, 0.3)], "overlap: Y begins at 0.1"),
        ([Token("X", 0.0, 0.6)], "end at frame 60, the utterance has 50"),
    ],
)
def test_times_that_do_not_fit_are_refused(tokens: list[Token], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        targets_from_phones(tokens, 50, TYING)


def test_word_start_errors_are_in_milliseconds() -> None:
    a = {"u": [Token("A", 0.10, 0.2), Token("B", 0.25, 0.4)]}
    b = {"u": [Token("A", 0.13, 0.2), Token("B", 0.20, 0.4)]}
    assert word_start_errors(a, b).tolist() == pytest.approx([30.0, 50.0])
    with pytest.raises(ValueError, match="the words of u differ"):
        word_start_errors(a, {"u": b["u"][:1]})
    with pytest.raises(ValueError, match=r"without reference times: 1 \(u\)"):
        word_start_errors(a, {})


# ------------------------------------------------------------------------------------------- from nothing


def test_uniform_start_sets_quiet_ends_aside() -> None:
    features = np.full((100, 4), -5.0, np.float32)
    features[30:70] = 5.0
    pdfs = uniform_start(features, ("B",), LEXICON, TYING)
    assert pdfs is not None
    segments = phone_segments(pdfs, TYING)
    assert [TYING.phones[s.phone] for s in segments] == ["SIL", "Y", "X", "SIL"]
    assert 20 <= segments[1].start <= 30 and 70 <= segments[2].end <= 80
    assert uniform_start(features[:5], ("B",), LEXICON, TYING) is None


@pytest.mark.demo
@pytest.mark.slow
def test_bootstrap_finds_the_words_of_synthetic_speech(tmp_path: Path) -> None:
    """Word starts within 45 ms on average (measured: 25 ms), where the uniform start errs by 94 ms."""
    pytest.importorskip("espeakng_loader", reason="needs the demo extra")
    voices = (("m1", "m3", "m7", "f1", "f4", "Annie"), (), ())
    folder = synthesise(DigitCorpus(utterances=(60, 0, 0), voices=voices, snr=(10.0, 10.0)), tmp_path)
    corpus, lexicon = read_data_dir(folder / "train"), Lexicon(DIGIT_LEXICON)
    features, tying = extract(corpus, Fbank(), tmp_path / "features"), monophone(lexicon.phones)
    words = {utterance.id: utterance.words for utterance in corpus}
    reference = read_ctm(folder / "train" / "words.ctm")

    def error(pdfs: dict[str, np.ndarray]) -> float:
        segments = {id: word_segments(words[id], row, lexicon, tying) for id, row in pdfs.items()}
        return float(word_start_errors({id: word_tokens(s) for id, s in segments.items()}, reference).mean())

    uniform = {id: uniform_start(features[id], words[id], lexicon, tying) for id in words}
    assert all(row is not None for row in uniform.values())
    options = GaussianBootstrap(components=(1,) * 10 + (2,) * 2)
    result = bootstrap(features, words, lexicon, tying, options=options)
    assert not result.failed and not result.too_short and len(result.pdfs) == 60
    assert all(len(row) == len(features[id]) for id, row in result.pdfs.items())
    assert error(result.pdfs) < 45.0 < 85.0 < error(uniform)  # type: ignore[arg-type]


def test_bootstrap_drops_short_utterances_once_and_learns_from_the_rest() -> None:
    """Phones of distinct, noisy frames and uneven durations: the true boundaries come back."""
    rng = np.random.default_rng(0)
    lexicon = Lexicon((("P", ("X",)), ("Q", ("Y",))))
    tying = monophone(lexicon.phones)
    centres = rng.normal(scale=4.0, size=(tying.num_pdfs, 20))
    centres[:STATES] -= 10.0  # silence is quiet
    said = {f"u{k}": rng.integers(1, 3, size=rng.integers(1, 5)) for k in range(30)}
    truth = {
        id: np.concatenate([frames_of(int(p), each=int(rng.integers(2, 9))) for p in (SIL, *phones, SIL)])
        for id, phones in said.items()
    }
    features = {id: (centres[row] + rng.normal(size=(len(row), 20))).astype(np.float32) for id, row in truth.items()}
    words = {id: tuple("PQ"[p - 1] for p in phones) for id, phones in said.items()}
    features["short"], words["short"] = features["u0"][:4], ("P", "Q")

    def calls(items: Iterator[object], *, total: int | None, what: str) -> Iterator[object]:
        seen.append((what, total))
        return items

    seen: list[tuple[str, int | None]] = []
    options = GaussianBootstrap(components=(1,) * 7 + (2,), cepstra=13)
    drop = ForcedAlignment(on_too_short="drop")
    result = bootstrap(features, words, lexicon, tying, options=options, alignment=drop, progress=calls)  # type: ignore[arg-type]
    assert result.too_short == (TooShort("short", 4, 6),)
    assert [what for what, _ in seen] == [f"alignment {k} of 8" for k in range(1, 9)]

    def agreement(pdfs: dict[str, np.ndarray]) -> float:
        return float(np.mean(np.concatenate([pdfs[id] // STATES == truth[id] // STATES for id in truth])))

    uniform = {id: uniform_start(features[id], words[id], lexicon, tying) for id in truth}
    assert agreement(result.pdfs) > 0.9 > agreement(uniform) + 0.1  # type: ignore[arg-type]

    ready = {id: cepstra(rows, 13, order=2, window=2).astype(np.float32) for id, rows in features.items()}
    options = replace(options, cepstra=None)
    again = bootstrap(ready, words, lexicon, tying, options=options, alignment=drop)
    assert again.too_short == result.too_short
    assert all(np.array_equal(again.pdfs[id], row) for id, row in result.pdfs.items())


def test_bootstrap_options_are_checked() -> None:
    for components in ((), (4,), (1, 4), (2, 1)):
        with pytest.raises(ValueError, match="components"):
            GaussianBootstrap(components=components)
    with pytest.raises(ValueError, match="cepstra=0"):
        GaussianBootstrap(cepstra=0)


@pytest.mark.parametrize("kept", [7, 9, 13, 30])
def test_a_truncated_archive_is_named(tmp_path: Path, kept: int) -> None:
    save_alignments(tmp_path / "ali.ark", {"utt": np.arange(40, dtype=np.int32)})
    whole = (tmp_path / "ali.ark").read_bytes()
    (tmp_path / "torn.ark").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"torn\.ark: the alignment of utt, from byte 3: the file ends within it"):
        load_alignments(tmp_path / "torn.ark")
