from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.accuracy import (
    approximate_phone_accuracy,
    exact_phone_accuracy,
    frame_phone_accuracy,
    spoken_phones,
    state_accuracy,
)
from quadric.lattice.lattice import Lattice, StatePath
from reference import accuracy as twin
from reference.lattices import random_lattice

SILENCE = [(), (0,), (0, 2)]


def random_reference(rng: np.random.Generator, frames: int, *, pdfs: int = 4, phones: int = 3) -> StatePath:
    begins = rng.random(frames) < 0.4
    begins[0] = True
    labels = rng.integers(phones, size=frames)[np.cumsum(begins) - 1]
    return StatePath(rng.integers(pdfs, size=frames).astype(np.int32), labels.astype(np.int32), begins)


def random_case(seed: int) -> tuple[Lattice, StatePath, tuple[int, ...]]:
    """Half of them without rhyme or reason: phones that change within a phone, first frames that begin none."""
    rng = np.random.default_rng(seed)
    lattice = random_lattice(rng, frames=int(rng.integers(1, 7)), width=4, density=1.3)
    if seed % 2:
        arcs = lattice.num_arcs
        lattice = replace(lattice, phone=rng.integers(3, size=arcs).astype(np.int32), begins=rng.random(arcs) < 0.4)
    return lattice, random_reference(rng, len(lattice)), SILENCE[seed % 3]


def what_is_said(lattice: Lattice, arcs: tuple[int, ...]) -> tuple[object, ...]:
    """All that a path says, with its weight."""
    fields = (lattice.pdf, lattice.phone, lattice.word, lattice.begins, lattice.weight)
    last = lattice.final[int(lattice.target[arcs[-1]]) - int(lattice.levels[-2])]
    return (*(tuple(field[list(arcs)].tolist()) for field in fields), float(last))


def same_paths(lattice: Lattice, refined: Lattice) -> bool:
    before, after = (Counter(what_is_said(x, arcs) for arcs in twin.lattice_paths(x)) for x in (lattice, refined))
    return before == after


@settings(max_examples=150)
@given(st.integers(0, 100_000), st.booleans())
def test_frames_right_are_counted_as_kaldi_does(seed: int, one_class: bool) -> None:
    lattice, reference, silence = random_case(seed)
    silent_there = np.isin(reference.phone, silence).tolist()
    for function, field in ((state_accuracy, "pdf"), (frame_phone_accuracy, "phone")):
        value = function(lattice, reference, silence, one_class)
        assert value.dtype == np.float32
        for arcs in twin.lattice_paths(lattice):
            at = list(arcs)
            silent = np.isin(lattice.phone[at], silence).tolist()
            found, wanted = getattr(lattice, field)[at].tolist(), getattr(reference, field).tolist()
            assert value[at].sum() == twin.frames_right(found, wanted, silent, silent_there, one_class)


@settings(max_examples=200)
@given(st.integers(0, 100_000))
def test_approximate_accuracy_is_the_definition_on_every_path(seed: int) -> None:
    lattice, reference, silence = random_case(seed)
    refined, value = approximate_phone_accuracy(lattice, reference, silence)
    wanted = twin.segments_of_reference(reference)
    assert value.dtype == np.float32 and same_paths(lattice, refined)
    for arcs in twin.lattice_paths(refined):
        expected = twin.approximate(twin.segments_of_path(refined, arcs), wanted, silence)
        assert value[list(arcs)].sum() == pytest.approx(float(expected), abs=1e-5)


@settings(max_examples=200)
@given(st.integers(0, 100_000))
def test_exact_accuracy_is_the_edit_distance_of_every_path(seed: int) -> None:
    lattice, reference, silence = random_case(seed)
    refined, value = exact_phone_accuracy(lattice, reference, silence)
    wanted = twin.segments_of_reference(reference)
    assert same_paths(lattice, refined)
    assert set(value.tolist()) <= {-1.0, 0.0, 1.0}
    for arcs in twin.lattice_paths(refined):
        assert value[list(arcs)].sum() == twin.exact(twin.segments_of_path(refined, arcs), wanted, silence)


@pytest.mark.parametrize("silence", SILENCE)
def test_the_reference_itself_has_all_its_phones_right(silence: tuple[int, ...]) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference = random_reference(rng, 12)
        frames = range(12)
        chain = Lattice.from_arcs(
            [(t, t + 1, int(reference.pdf[t])) for t in frames],
            final={12: 0.0},
            phone=reference.phone,
            begins=reference.begins,
        )
        right = spoken_phones(reference, silence)
        assert right == sum(s.phone not in silence for s in twin.segments_of_reference(reference))
        for function in (approximate_phone_accuracy, exact_phone_accuracy):
            assert function(chain, reference, silence)[1].sum() == pytest.approx(right)
        assert state_accuracy(chain, reference, silence).sum() == 12
        assert frame_phone_accuracy(chain, reference, silence).sum() == 12


def test_an_insertion_costs_one_and_half_an_overlap_half() -> None:
    """Povey's definition on numbers: the reference is phone 1 on frames 0 to 3, then silence (0)."""
    reference = StatePath(
        np.zeros(6, np.int32),
        np.array([1, 1, 1, 1, 0, 0], np.int32),
        np.array([True, False, False, False, True, False]),
    )
    arcs = [(t, t + 1, 0) for t in range(6)]
    said = Lattice.from_arcs(
        arcs, final={6: 0.0}, phone=[1, 1, 2, 2, 2, 3], begins=[True, False, True, False, False, True]
    )
    refined, value = approximate_phone_accuracy(said, reference, (0,))
    assert value.tolist() == [0.0, 0.0, 0.0, 0.0, -0.5, -1.0]  # -1 + 2/2, then -1 + 1/2 of another, then an insertion
    assert refined.num_states == 7


def test_long_references_and_wide_lattices_outgrow_the_first_arrays() -> None:
    rng = np.random.default_rng(0)
    lattice = random_lattice(rng, frames=40, width=8, density=2.0, phones=6)
    reference = random_reference(rng, 40, phones=6)
    refined, value = exact_phone_accuracy(lattice, reference, (0,), max_states=100_000)
    assert refined.num_states > 3000  # rows, buckets and arrays have all grown
    assert len(np.unique(refined.source)) == refined.num_states - len(refined.final)
    wanted = twin.segments_of_reference(reference)
    for _ in range(50):
        state, arcs = 0, []
        for _ in range(40):
            arcs.append(int(rng.choice(np.flatnonzero(refined.source == state))))
            state = int(refined.target[arcs[-1]])
        found = twin.segments_of_path(refined, tuple(arcs))
        assert value[arcs].sum() == twin.exact(found, wanted, (0,))


def test_too_many_states_are_refused() -> None:
    rng = np.random.default_rng(1)
    lattice, reference = random_lattice(rng, frames=30, width=8), random_reference(rng, 30)
    with pytest.raises(ValueError, match=r"max_states=500: .* take the approximate accuracy"):
        exact_phone_accuracy(lattice, reference, max_states=500)


@pytest.mark.parametrize(
    "function", [state_accuracy, frame_phone_accuracy, approximate_phone_accuracy, exact_phone_accuracy]
)
def test_a_reference_of_another_length_is_refused(function) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="reference has 4 frames, the lattice 5"):
        function(random_lattice(rng, frames=5), random_reference(rng, 4))
