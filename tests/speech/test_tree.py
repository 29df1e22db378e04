from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadric.speech.cepstra import cepstra
from quadric.speech.topology import STATES, Tying, monophone, phone_segments
from quadric.speech.tree import (
    ContextStatistics,
    TreeOptions,
    grow,
    questions,
    retie,
    untie,
)
from reference import tree as twin

Corpus = tuple[dict[str, np.ndarray], dict[str, np.ndarray], Tying]


def random_corpus(seed: int, *, phones: int = 4, utterances: int = 6, segments: int = 10, bins: int = 3) -> Corpus:
    """Utterances of random phones whose features lean on the phone and on both neighbours, a little."""
    rng = np.random.default_rng(seed)
    mono = monophone([f"p{i}" for i in range(1, phones)])
    means = rng.normal(size=(3, phones, bins))
    alignments, features = {}, {}
    for u in range(utterances):
        sequence = rng.integers(phones, size=segments)
        around = np.concatenate([[0], sequence, [0]])
        pdfs, rows = [], []
        for i, phone in enumerate(sequence):
            held = np.repeat(np.arange(STATES), rng.integers(1, 4, size=STATES))
            pdfs.append(STATES * phone + held)
            centre = 2 * means[0, phone] + means[1, around[i]] + means[2, around[i + 2]]
            rows.append(centre + rng.normal(size=(len(held), bins)))
        alignments[f"u{u}"] = np.concatenate(pdfs).astype(np.int32)
        features[f"u{u}"] = np.concatenate(rows)
    return alignments, features, mono


def context_corpus(side: int, *, phones: int = 5, length: int = 4000) -> Corpus:
    """One long utterance: a frame knows nothing but whether its left (0) or right (1) neighbour is phone 1."""
    rng = np.random.default_rng(7)
    mono = monophone([f"p{i}" for i in range(1, phones)])
    sequence = rng.integers(1, phones, size=length)
    around = np.concatenate([[0], sequence, [0]])
    neighbour = around[:-2] if side == 0 else around[2:]
    frames = np.repeat(neighbour == 1, STATES)[:, None] * np.array([[4.0, 0.0]])
    pdfs = (STATES * sequence[:, None] + np.arange(STATES)).ravel()
    return {"u": pdfs}, {"u": frames + rng.normal(size=frames.shape)}, mono


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_trying_every_split(seed: int) -> None:
    alignments, features, mono = random_corpus(seed, phones=3 + seed % 3)
    options = TreeOptions(leaves=len(mono.phones) * STATES + 4 + seed, min_frames=2 + seed % 3, variance_floor=0.05)
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    tying = grow(statistics, options)
    expected = twin.grow(twin.labelled_frames(alignments, features, mono), len(mono.phones), options)
    np.testing.assert_array_equal(tying.table, expected)
    assert tying.num_pdfs > mono.num_pdfs


@pytest.mark.parametrize("seed", range(4))
def test_questions_agree_with_comparing_every_pair(seed: int) -> None:
    alignments, features, mono = random_corpus(seed, phones=7, utterances=10)
    options = TreeOptions()
    asked = questions(ContextStatistics.accumulate(alignments, features, mono), options)
    frames = twin.labelled_frames(alignments, features, mono)
    expected = twin.question_sets(frames, len(mono.phones), twin.variance_floor(frames, options))
    assert [frozenset(np.flatnonzero(row).tolist()) for row in asked] == expected
    assert len(asked) == len(mono.phones) - 2 + len(mono.phones)


def test_statistics_are_the_sums_of_the_labelled_frames() -> None:
    alignments, features, mono = random_corpus(3, utterances=4)
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    expected: dict[tuple[int, ...], list[np.ndarray]] = {}
    for frame in twin.labelled_frames(alignments, features, mono):
        expected.setdefault((frame.centre, frame.left, frame.right, frame.state), []).append(frame.vector)
    assert [tuple(row) for row in statistics.contexts.tolist()] == sorted(expected)
    for i, key in enumerate(sorted(expected)):
        assert statistics.counts[i] == len(expected[key])
        np.testing.assert_allclose(statistics.sums[i], np.sum(expected[key], 0), atol=1e-10)
        np.testing.assert_allclose(statistics.squares[i], np.sum(np.square(expected[key]), 0), atol=1e-10)
    assert statistics.frames == sum(map(len, alignments.values()))


def test_merging_as_it_goes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alignments, features, mono = random_corpus(5, utterances=12)
    whole = ContextStatistics.accumulate(alignments, features, mono)
    monkeypatch.setattr("quadric.speech.tree._PENDING_ROWS", 40)
    merged = ContextStatistics.accumulate(alignments, features, mono)
    np.testing.assert_array_equal(merged.contexts, whole.contexts)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.sums, whole.sums, atol=1e-10)
    np.testing.assert_allclose(merged.squares, whole.squares, atol=1e-10)


def test_cepstra_are_the_cosine_sums_and_their_slopes() -> None:
    features = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    np.testing.assert_allclose(cepstra(features), twin.cepstra(features), atol=1e-12)
    assert cepstra(features).shape == (5, 26)
    one = cepstra(features[:1])
    np.testing.assert_array_equal(one[:, 13:], 0.0)
    assert cepstra(features, 4, order=2).shape == (5, 12)
    with pytest.raises(ValueError, match="coefficients=0"):
        cepstra(features, 0)


def test_features_that_are_cepstra_are_taken_as_they_are() -> None:
    alignments, features, mono = random_corpus(3, bins=5)
    ready = {id: cepstra(rows, 4) for id, rows in features.items()}
    from_ready = ContextStatistics.accumulate(alignments, ready, mono, cepstra=None)
    from_bands = ContextStatistics.accumulate(alignments, features, mono, cepstra=4)
    assert from_ready.sums.shape[1] == 8
    np.testing.assert_array_equal(from_ready.sums, from_bands.sums)
    np.testing.assert_array_equal(from_ready.squares, from_bands.squares)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(0, 40), st.integers(1, 20))
def test_every_triphone_has_a_leaf_of_its_own_phone_and_state(
    seed: int, phones: int, extra: int, min_frames: int
) -> None:
    alignments, features, mono = random_corpus(seed, phones=phones)
    options = TreeOptions(leaves=mono.num_pdfs + extra, min_frames=min_frames)
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    tying = grow(statistics, options)
    assert tying.context == 3 and tying.phones == mono.phones
    assert mono.num_pdfs <= tying.num_pdfs <= options.leaves
    for centre in range(phones):
        for state in range(STATES):
            pdfs = np.unique(tying.table[centre, :, :, state])
            assert (tying.phone_of_pdf[pdfs] == centre).all() and (tying.state_of_pdf[pdfs] == state).all()
    assert [len(np.unique(tying.table[0, ..., s])) for s in range(STATES)] == [1] * STATES
    occupied = np.bincount(np.concatenate(list(retie(alignments, mono, tying).values())), minlength=tying.num_pdfs)
    root = untie({"every": np.arange(tying.num_pdfs)}, mono, tying)["every"]
    divided = np.bincount(root, minlength=mono.num_pdfs)[root] > 1
    assert (occupied[divided] >= min_frames).all()


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_more_leaves_never_lower_the_likelihood_and_only_refine(seed: int) -> None:
    alignments, features, mono = random_corpus(seed)
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    frames = twin.labelled_frames(alignments, features, mono)
    floor = twin.variance_floor(frames, TreeOptions())
    last, coarse = -np.inf, None
    for leaves in range(mono.num_pdfs, mono.num_pdfs + 10, 2):
        tying = grow(statistics, TreeOptions(leaves=leaves, min_frames=3))
        likelihood = twin.tied_log_likelihood(frames, tying, floor)
        assert likelihood >= last - 1e-8
        if coarse is not None and tying.num_pdfs > coarse.num_pdfs:
            assert likelihood > last
            pairs = np.unique(np.stack([tying.table.ravel(), coarse.table.ravel()]), axis=1)
            assert pairs.shape[1] == tying.num_pdfs
        last, coarse = likelihood, tying


@pytest.mark.parametrize("side", [0, 1])
def test_asks_only_about_the_side_that_matters(side: int) -> None:
    alignments, features, mono = context_corpus(side)
    spoken = (len(mono.phones) - 1) * STATES
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    tying = grow(statistics, TreeOptions(leaves=mono.num_pdfs + spoken, min_frames=50))
    assert tying.num_pdfs == mono.num_pdfs + spoken
    other_axis = 2 if side == 0 else 1
    assert (tying.table == np.take(tying.table, [0], axis=other_axis)).all()
    by_phone = tying.table[1:, 1:, 0] if side == 0 else tying.table[1:, 0, 1:]
    assert (by_phone[:, 1:] == by_phone[:, 1:2]).all()
    assert (by_phone[:, 0] != by_phone[:, 1]).all()


@pytest.mark.parametrize("seed", range(10))
def test_of_questions_that_differ_by_rounding_alone_the_left_one_is_asked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    neighbours = np.arange(2, 9)  # each left neighbour has a right neighbour of its own
    contexts = np.stack([np.ones(7), neighbours, rng.permutation(neighbours), np.zeros(7)], axis=1).astype(np.int32)
    vectors = rng.normal(size=(7, 30, 4)) + rng.normal(size=(7, 1, 4))
    phones = monophone([f"p{i}" for i in range(1, 9)]).phones
    statistics = ContextStatistics(phones, contexts, np.full(7, 30.0), vectors.sum(1), (vectors**2).sum(1))
    tying = grow(statistics, TreeOptions(leaves=100, min_frames=1))
    assert tying.num_pdfs == len(phones) * STATES + 6
    assert (tying.table == tying.table[:, :, :1]).all()


def test_silence_stays_whole_although_its_frames_depend_on_the_context() -> None:
    alignments, features, mono = context_corpus(0)
    shifted = {"u": alignments["u"] - STATES}  # the first phone takes the place of silence
    tying = grow(ContextStatistics.accumulate(shifted, features, mono), TreeOptions(leaves=200, min_frames=50))
    np.testing.assert_array_equal(tying.table[0], np.broadcast_to(np.arange(STATES), tying.table[0].shape))
    assert all(len(np.unique(tying.table[1, ..., s])) > 1 for s in range(STATES))


def test_no_split_numbers_as_the_monophones() -> None:
    alignments, features, mono = random_corpus(1)
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    for options in (TreeOptions(leaves=mono.num_pdfs, min_frames=1), TreeOptions(min_frames=10**6)):
        tying = grow(statistics, options)
        np.testing.assert_array_equal(tying.table, np.broadcast_to(mono.table, tying.table.shape))
        np.testing.assert_array_equal(retie(alignments, mono, tying)["u0"], alignments["u0"])


def test_constant_features_ask_nothing() -> None:
    alignments, features, mono = random_corpus(1)
    constant = {id: np.full_like(rows, 0.1) for id, rows in features.items()}
    statistics = ContextStatistics.accumulate(alignments, constant, mono)
    assert grow(statistics, TreeOptions(min_frames=1)).num_pdfs == mono.num_pdfs


def test_a_phone_that_is_never_heard_has_leaves_too() -> None:
    alignments, features, mono = random_corpus(2)
    wider = monophone([*mono.phones[1:], "unheard"])
    tying = grow(ContextStatistics.accumulate(alignments, features, wider), TreeOptions(leaves=40, min_frames=3))
    assert tying.num_pdfs > wider.num_pdfs
    assert len(np.unique(tying.table[-1])) == STATES


def test_retied_targets_follow_the_phone_segments() -> None:
    alignments, features, mono = random_corpus(11)
    alignments = {id: pdfs.astype(np.int64) for id, pdfs in alignments.items()}
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    tri = grow(statistics, TreeOptions(leaves=60, min_frames=2))
    assert tri.num_pdfs > mono.num_pdfs
    targets = retie(alignments, mono, tri)
    assert list(targets) == list(alignments)
    for id, pdfs in alignments.items():
        segments = phone_segments(pdfs, mono)
        phones = [0, *(segment.phone for segment in segments), 0]
        for i, segment in enumerate(segments):
            window = tri.pdfs(phones[i : i + 3])
            expected = [window[pdf % STATES] for pdf in pdfs[segment.start : segment.end]]
            assert targets[id][segment.start : segment.end].tolist() == expected
        assert targets[id].dtype == np.int32
        assert phone_segments(targets[id], tri) == segments


def test_retied_by_hand() -> None:
    mono = monophone(("A", "B"))
    table = np.arange(3 * 3 * 3 * STATES).reshape(3, 3, 3, STATES)
    tri = Tying(mono.phones, 3, table)
    target = retie({"u": np.array([3, 4, 4, 5, 0, 1, 2, 6, 7, 8])}, mono, tri)["u"]
    a, silence, b = table[1, 0, 0], table[0, 1, 2], table[2, 0, 0]
    assert target.tolist() == [a[0], a[1], a[1], a[2], *silence, *b]
    assert retie({"empty": np.zeros(0, np.int32)}, mono, tri)["empty"].shape == (0,)


def test_realigned_triphones_give_the_same_statistics() -> None:
    alignments, features, mono = random_corpus(4)
    first = ContextStatistics.accumulate(alignments, features, mono)
    tri = grow(first, TreeOptions(leaves=40, min_frames=3))
    again = ContextStatistics.accumulate(retie(alignments, mono, tri), features, tri)
    np.testing.assert_array_equal(again.contexts, first.contexts)
    np.testing.assert_array_equal(again.sums, first.sums)


def test_untying_undoes_retying() -> None:
    alignments, features, mono = random_corpus(6)
    tri = grow(ContextStatistics.accumulate(alignments, features, mono), TreeOptions(leaves=40, min_frames=3))
    again = untie(retie(alignments, mono, tri), mono, tri)
    assert again.keys() == alignments.keys()
    for id, target in again.items():
        np.testing.assert_array_equal(target, alignments[id])
    with pytest.raises(ValueError, match="mono has context=3"):
        untie(alignments, tri, tri)


def test_a_grown_tying_survives_the_disk(tmp_path: Path) -> None:
    alignments, features, mono = random_corpus(8)
    tri = grow(ContextStatistics.accumulate(alignments, features, mono), TreeOptions(leaves=40, min_frames=3))
    tri.save(tmp_path / "tree.npz")
    again = Tying.load(tmp_path / "tree.npz")
    assert again.phones == tri.phones and again.context == 3
    np.testing.assert_array_equal(again.table, tri.table)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("leaves", 0),
        ("min_frames", 0),
        ("variance_floor", 0.0),
        ("variance_floor", 1.0),
        ("variance_floor", np.nan),
        ("cepstra", 0),
    ],
)
def test_refuses_impossible_options(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        TreeOptions(**{field: value})  # type: ignore[arg-type]


def test_names_what_is_wrong_with_the_data() -> None:
    alignments, features, mono = random_corpus(0)
    statistics = ContextStatistics.accumulate(alignments, features, mono)
    with pytest.raises(ValueError, match=r"leaves=11 is too few.*need 12"):
        grow(statistics, TreeOptions(leaves=11))
    with pytest.raises(ValueError, match="holds no frame"):
        ContextStatistics.accumulate({}, features, mono)
    with pytest.raises(ValueError, match="lacks 6 of the aligned utterances, 'u0'"):
        ContextStatistics.accumulate(alignments, {}, mono)
    with pytest.raises(ValueError, match=r"features\['u2'\] has shape"):
        ContextStatistics.accumulate(alignments, {**features, "u2": features["u2"][1:]}, mono)
    with pytest.raises(ValueError, match=r"features\['u2'\] has 2 dimensions"):
        ContextStatistics.accumulate(alignments, {**features, "u2": features["u2"][:, :2]}, mono)
    with pytest.raises(ValueError, match=r"features\['u2'\] holds values that are not finite"):
        ContextStatistics.accumulate(alignments, {**features, "u2": features["u2"] * np.inf}, mono)
    with pytest.raises(ValueError, match="not the same in order"):
        retie(
            alignments, mono, grow(ContextStatistics.accumulate(alignments, features, monophone("abc")), TreeOptions())
        )
