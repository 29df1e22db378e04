from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quadric.lattice.lattice import Lattice
from quadric.speech.kaldi_archive import read_archive
from quadric.speech.kaldi_frames import acoustic_difference, check_frames, from_lattice, read_lattices, to_lattice
from quadric.speech.kaldi_lattice import KaldiLattice
from quadric.speech.kaldi_words import WordLabels, write_words
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import monophone
from quadric.speech.transitions import TransitionModel
from reference.kaldi_paths import (
    add,
    expected,
    found,
    kaldi_paths,
    random_kaldi_lattice,
    short_model,
    split_to_phones,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "kaldi"
OWN = TransitionModel.of(monophone(("AH",)))
"""Phones 1 and 2; transition-ids 1 to 6 and 7 to 12, of which the odd are self loops."""


SHORT = short_model()
MODELS = {"own": OWN, "short": SHORT}


@st.composite
def kaldi_lattices(draw: st.DrawFn, model: TransitionModel, reorder: bool) -> KaldiLattice:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    frames = draw(st.integers(3, 6) if model is OWN else st.integers(1, 4))
    lattice = random_kaldi_lattice(
        model, rng, frames=frames, reorder=reorder, words=draw(st.sampled_from([0.0, 0.2, 0.5]))
    )
    assume(lattice is not None)
    assert lattice is not None
    return lattice


def arcs(rows: list[tuple], final: dict[int, float], start: int = 0) -> KaldiLattice:
    """A lattice of rows source, target, transition-id, word, graph cost."""
    columns = [np.array(column, np.int32) for column in zip(*(row[:4] for row in rows), strict=True)]
    costs = np.array([row[4] for row in rows], np.float64)
    ends, weights = np.array(list(final), np.int32), np.array(list(final.values()), np.float64)
    states = max(columns[0].max(), columns[1].max(), ends.max(initial=0)) + 1
    return KaldiLattice(*columns, costs, np.zeros(len(costs)), ends, weights, np.zeros(len(ends)), int(states), start)


def same(table: dict, other: dict) -> None:
    assert table.keys() == other.keys()
    for key, weight in table.items():
        assert weight == pytest.approx(other[key], abs=2e-5)


# ------------------------------------------------------------------------------------------------- from Kaldi's form


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=40)
@given(data=st.data())
def test_everything_that_a_lattice_says_keeps_its_weight(name: str, reorder: bool, data: st.DataObject) -> None:
    lattice = data.draw(kaldi_lattices(MODELS[name], reorder))
    if any(len(words) > len(ids) for ids, words, _, _ in kaldi_paths(lattice)):
        with pytest.raises(ValueError, match="more words than frames"):
            to_lattice(lattice, MODELS[name], reorder=reorder)
        return
    same(found(to_lattice(lattice, MODELS[name], reorder=reorder)), expected(lattice, MODELS[name], reorder))


@pytest.mark.parametrize(("name", "reorder"), [("behind", True), ("front", False)])
def test_a_lattice_of_a_decoder_keeps_what_it_says(name: str, reorder: bool) -> None:
    model, scores = TransitionModel.load(GOLDEN / "mono.mdl"), np.loadtxt(GOLDEN / "scores.txt")
    ((id, given),) = read_archive(GOLDEN / f"{name}.lat")
    lattice = to_lattice(given, model, reorder=reorder)
    assert (id, lattice.num_frames, lattice.num_pdfs) == ("utt", 12, 11)
    same(found(lattice), expected(given, model, reorder))
    assert acoustic_difference(given, model, scores) < 1e-5
    check_frames(lattice, 12)
    with pytest.raises(ValueError, match=f"pass reorder={reorder}"):
        to_lattice(given, model, reorder=not reorder)


def test_words_stand_on_the_first_frame_of_their_arc_or_wait() -> None:
    #  word 5 on an arc with a frame; 6 and 7 on epsilons in front of one with word 8; 9 behind the last frame
    rows = [(0, 1, 2, 5, 1.0), (1, 2, 4, 0, 0.0), (2, 3, 6, 0, 0.5), (3, 4, 0, 6, 0.25), (4, 5, 0, 7, 0.0),
            (5, 6, 8, 8, 0.0), (6, 7, 10, 0, 0.0), (7, 8, 12, 0, 0.0), (8, 9, 0, 0, 0.0)]  # fmt: skip
    lattice = to_lattice(arcs(rows, {9: 0.5}), OWN)
    assert lattice.word.tolist() == [5, 0, 0, 6, 7, 8]
    assert lattice.begins.tolist() == [True, False, False, True, False, False]
    assert lattice.phone.tolist() == [0, 0, 0, 1, 1, 1]
    assert lattice.pdf.tolist() == [0, 1, 2, 3, 4, 5]
    assert lattice.weight.tolist() == [-1.0, 0.0, -0.5, -0.25, 0.0, 0.0]
    rows[-1] = (8, 9, 0, 9, 0.0)
    late = to_lattice(arcs(rows, {9: 0.5}), OWN)
    assert late.word.tolist() == [5, 0, 6, 7, 8, 9]
    assert late.final.tolist() == [-0.5]


def test_epsilons_are_removed_in_the_log_semiring() -> None:
    rows = [(0, 1, 2, 0, 0.0), (1, 2, 4, 0, 0.0), (2, 3, 0, 7, 1.0), (2, 4, 0, 7, 2.0), (3, 4, 0, 0, 0.5),
            (4, 5, 6, 0, 0.0), (3, 5, 6, 0, 9.0)]  # fmt: skip
    lattice = to_lattice(arcs(rows, {5: 0.0}), OWN)
    assert lattice.word.tolist() == [0, 0, 7]
    assert lattice.weight[2] == pytest.approx(math.log(math.exp(-1.5) + math.exp(-2.0) + math.exp(-10.0)))


def test_a_phone_begins_where_the_one_before_has_ended_in_either_order() -> None:
    behind, front = [2, 1, 4, 6, 5, 8, 10, 12], [1, 2, 4, 5, 6, 8, 10, 12]
    for ids, reorder in ((behind, True), (front, False)):
        chain = arcs([(t, t + 1, id, 0, 0.0) for t, id in enumerate(ids)], {len(ids): 0.0})
        lattice = to_lattice(chain, OWN, reorder=reorder)
        assert lattice.pdf.tolist() == [0, 0, 1, 2, 2, 3, 4, 5]
        assert lattice.begins.tolist() == [t in (0, 5) for t in range(8)]
        assert lattice.begins.tolist() == split_to_phones(tuple(ids), OWN, reorder)


def test_a_phone_that_follows_itself_begins_again() -> None:
    for ids, reorder in (([2, 4, 6, 5, 2, 4, 6], True), ([2, 4, 5, 6, 1, 2, 4, 6], False)):
        chain = arcs([(t, t + 1, id, 0, 0.0) for t, id in enumerate(ids)], {len(ids): 0.0})
        assert np.flatnonzero(to_lattice(chain, OWN, reorder=reorder).begins).tolist() == [0, 4]


def test_a_state_that_begins_a_phone_and_goes_on_with_it_becomes_two() -> None:
    # With loops in front, state 3 is entered by the end of phone 1, state 4 also by the self loop.
    rows = [(0, 1, 2, 0, 0.0), (1, 2, 4, 0, 0.0), (2, 3, 6, 0, 1.0), (2, 9, 5, 0, 0.0), (9, 4, 6, 0, 0.0),
            (3, 4, 7, 0, 0.0), (4, 5, 8, 0, 0.0), (5, 6, 10, 0, 0.0), (6, 7, 12, 0, 0.0)]  # fmt: skip
    lattice = to_lattice(arcs(rows, {7: 0.0}), OWN, reorder=False)
    assert sorted(lattice.begins[lattice.frame == 4].tolist()) == [False, True]
    same(found(lattice), expected(arcs(rows, {7: 0.0}), OWN, False))


@pytest.mark.parametrize(
    ("rows", "final", "said"),
    [
        ([(0, 1, 13, 0, 0.0)], {1: 0.0}, "transition-id 13 is unknown: the transition model has 12"),
        ([(0, 1, 2, 0, 0.0), (1, 0, 4, 0, 0.0)], {1: 0.0}, "cycle"),
        ([(0, 1, 2, 0, 0.0), (1, 1, 0, 0, 0.0)], {1: 0.0}, "cycle"),
        ([(0, 1, 2, 0, 0.0), (2, 1, 0, 0, 0.0)], {2: 0.0}, "no path leads"),
        ([(0, 1, 2, 0, 0.0)], {}, "no path leads"),
        ([(0, 1, 0, 0, 0.0)], {1: 0.0}, "paths have 0 frames"),
        ([(0, 1, 2, 0, 0.0), (1, 2, 4, 0, 0.0), (0, 2, 2, 0, 0.0)], {2: 0.0}, "state 2 has paths of . and of . frames"),
        ([(0, 1, 2, 0, 0.0), (1, 2, 4, 0, 0.0)], {1: 0.0, 2: 0.0}, "paths have 1 and 2 frames"),
        ([(0, 1, 2, 4, 0.0), (1, 2, 0, 4, 0.0)], {2: 0.0}, "more words than frames"),
        ([(0, 1, 1, 0, 0.0), (1, 2, 2, 0, 0.0)], {2: 0.0}, "transition-id 1 in frame 0 .*pass reorder=False"),
        ([(0, 1, 2, 0, 0.0), (1, 2, 10, 0, 0.0)], {2: 0.0}, "transition-id 10 in frame 1 .*another system"),
        ([(0, 1, 4, 0, 0.0), (1, 2, 6, 0, 0.0)], {2: 0.0}, "transition-id 4 in frame 0 begins a phone, but not in its"),
    ],
)
def test_what_is_no_lattice_of_the_model_is_refused(rows: list[tuple], final: dict[int, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        to_lattice(arcs(rows, final), OWN)


def test_lengths_of_lattice_and_features_are_compared() -> None:
    lattice = Lattice.from_arcs([(0, 1, 0), (1, 2, 0)], final={2: 0.0})
    with pytest.raises(ValueError, match="the lattice of a has 2 frames, the features have 6"):
        check_frames(lattice, 6, id="a")


def test_acoustic_costs_are_compared_along_whole_paths() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(3, 6))
    given = arcs([(0, 1, 2, 0, 0.0), (1, 2, 4, 0, 0.0), (2, 3, 6, 0, 0.0)], {3: 0.0})
    acoustic = -0.5 * scores[[0, 1, 2], [0, 1, 2]]
    moved = acoustic + np.array([3.0, -1.0, -2.0])  # as determinisation does
    first = np.array([0.25, 0.0, 0.0])
    for costs, off in ((acoustic, 0.0), (moved, 0.0), (acoustic + first, 0.25), (acoustic - first, 0.25)):
        changed = KaldiLattice(**{**given.__dict__, "acoustic": costs})
        assert acoustic_difference(changed, OWN, scores, scale=0.5) == pytest.approx(off, abs=1e-12)
    with pytest.raises(ValueError, match="scores have 2 frames, the lattice has 3"):
        acoustic_difference(given, OWN, scores[:2])
    with pytest.raises(ValueError, match="num_pdfs=5"):
        acoustic_difference(given, OWN, scores[:, :5])


# ------------------------------------------------------------------------------------------------- into Kaldi's form


@settings(max_examples=40)
@given(data=st.data(), scale=st.sampled_from([1.0, 0.5]))
def test_a_lattice_comes_back_from_kaldis_form(data: st.DataObject, scale: float) -> None:
    reorder = data.draw(st.booleans())
    source = data.draw(kaldi_lattices(OWN, reorder))
    assume(all(len(words) <= len(ids) for ids, words, _, _ in kaldi_paths(source)))
    lattice = to_lattice(source, OWN, reorder=reorder)
    scores = np.random.default_rng(0).normal(size=(len(lattice), 6))
    written = from_lattice(lattice, OWN, scores=scores, scale=scale)
    same(found(to_lattice(written, OWN)), found(lattice))
    for ids, _, _, acoustic in kaldi_paths(written):
        assert acoustic == pytest.approx(-scale * sum(scores[t, OWN.pdf[id]] for t, id in enumerate(ids)))
        assert all(OWN.self_loop[id] <= (t > 0 and OWN.state[ids[t - 1]] == OWN.state[id]) for t, id in enumerate(ids))
    paths: dict = {}
    for ids, words, graph, _ in kaldi_paths(written):
        add(paths, (ids, words), -graph)
    assert len(paths) == len(found(lattice))


def test_a_phone_of_one_state_that_follows_itself_does_not_loop() -> None:
    given = arcs([(t, t + 1, id, 0, 0.0) for t, id in enumerate((2, 1, 2, 2))], {4: 0.0})
    lattice = to_lattice(given, SHORT)
    assert lattice.begins.tolist() == [True, False, True, True]
    assert from_lattice(lattice, SHORT).transition.tolist() == [2, 1, 2, 2]
    both = Lattice.from_arcs([(0, 1, 0), (1, 2, 0), (1, 2, 0)], final={2: 0.0}, begins=[True, True, False])
    assert sorted(ids for ids, _, _, _ in kaldi_paths(from_lattice(both, SHORT))) == [(2, 1), (2, 2)]


def test_only_states_that_need_it_are_split() -> None:
    # State 1 is entered by both phones: where both begin behind it, nothing depends on which it was.
    pdfs = [(0, 1, 0), (0, 1, 3), (1, 2, 0), (1, 2, 3)]
    lattice = Lattice.from_arcs(pdfs, final={2: 0.0}, phone=[0, 1, 0, 1], begins=[True] * 4)
    assert from_lattice(lattice, OWN).num_states == 3
    lattice = Lattice.from_arcs(pdfs[:3], final={2: 0.0}, phone=[0, 1, 0], begins=[True, True, False])
    written = from_lattice(lattice, OWN)
    assert written.num_states == 4
    assert sorted(ids for ids, _, _, _ in kaldi_paths(written)) == [(2, 1), (8, 2)]


def test_what_a_transition_model_cannot_say_is_refused() -> None:
    lattice = Lattice.from_arcs([(0, 1, 1), (1, 2, 2)], final={2: 0.0}, phone=[1, 1], begins=[True, False])
    with pytest.raises(ValueError, match="phone 2 with pdf 1 has 0 transition-states"):
        from_lattice(lattice, OWN)
    with pytest.raises(ValueError, match=r"phone 2 with pdf 1 does not allow what frame 0 does.*skips"):
        from_lattice(lattice, SHORT)
    shared = Lattice.from_arcs([(0, 1, 3), (1, 2, 3)], final={2: 0.0}, phone=[2, 2], begins=[True, False])
    with pytest.raises(ValueError, match="phone 3 with pdf 3 has 2 transition-states"):
        from_lattice(shared, SHORT)
    with pytest.raises(ValueError, match=r"scores of shape \(1, 6\) do not fit a lattice of 2 frames"):
        from_lattice(shared, OWN, scores=np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"scores of shape \(2, 3\)"):
        from_lattice(shared, OWN, scores=np.zeros((2, 3)))


# ------------------------------------------------------------------------------------------------------------- words

LEXICON = Lexicon((("A", ("AH",)), ("B", ("AH", "AH")), ("UNK", ("AH",))))


def table(tmp_path: Path, text: str) -> Path:
    (tmp_path / "words.txt").write_text(text)
    return tmp_path / "words.txt"


WORDS = "<eps> 0\n!SIL 1\nB 2\n<unk> 3\nC 4\nA 6\n#0 7\n<s> 8\n"


def test_labels_of_words_become_those_of_the_lexicon(tmp_path: Path) -> None:
    words = WordLabels.read(table(tmp_path, WORDS), LEXICON, {"!SIL": None, "<unk>": "UNK"})
    assert words(np.array([0, 1, 2, 3, 6, 7, 8], np.int32)).tolist() == [0, 0, 2, 3, 1, 0, 0]
    assert words.missing == ("C",)
    with pytest.raises(ValueError, match=r"words that the lexicon lacks: 1 \(C\)"):
        words(np.array([2, 4, 4], np.int32))
    with pytest.raises(ValueError, match=r"words that the lexicon lacks: 1 \(5\)"):
        words(np.array([5], np.int32))
    assert WordLabels.read(table(tmp_path, "A 1\n"), LEXICON)(np.array([0, 1], np.int32)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="label 9 is not in the table"):
        words(np.array([9], np.int32))
    rows = [(0, 1, 2, 6, 0.0), (1, 2, 4, 1, 0.0), (2, 3, 6, 2, 0.0)]
    assert to_lattice(arcs(rows, {3: 0.0}), OWN, words=words).word.tolist() == [1, 0, 2]


def test_a_table_of_words_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instead: 2 \(X, Y\)"):
        WordLabels.read(table(tmp_path, WORDS), LEXICON, {"X": None, "C": "Y"})
    with pytest.raises(ValueError, match="label 1 of both A and B"):
        WordLabels.read(table(tmp_path, "A 1\nB 1\n"), LEXICON)
    with pytest.raises(ValueError, match="line 2: a label expected"):
        WordLabels.read(table(tmp_path, "A 1\nB b\n"), LEXICON)


def test_our_words_are_written_as_a_table(tmp_path: Path) -> None:
    write_words(tmp_path / "words.txt", LEXICON)
    assert (tmp_path / "words.txt").read_text() == "<eps> 0\nA 1\nB 2\nUNK 3\n"
    words = WordLabels.read(tmp_path / "words.txt", LEXICON)
    assert words(np.arange(4, dtype=np.int32)).tolist() == [0, 1, 2, 3]


def test_errors_of_an_archive_name_file_and_utterance(tmp_path: Path) -> None:
    (tmp_path / "lat").write_text("utt1 \n0 1 0 0,0,2_4_6\n1\n\nutt2 \n0 1 0 0,0,99\n1\n\n")
    read = read_lattices(tmp_path / "lat", OWN)
    assert next(read)[0] == "utt1"
    with pytest.raises(ValueError, match="lat: the lattice of utt2: the transition-id 99 is unknown"):
        next(read)
