from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.automaton import Automaton
from quadric.lattice.semiring import forward_backward, forward_backward_batch
from reference.paths import enumerate_paths, log_z_by_recursion


def random_automaton(rng: np.random.Generator, *, states: int, arcs: int, pdfs: int) -> Automaton:
    """Any shape: cycles, parallel arcs, several ends with weights, states that lead nowhere."""
    drawn = [
        (int(rng.integers(states)), int(rng.integers(states)), int(rng.integers(pdfs)), float(rng.normal()))
        for _ in range(arcs)
    ]
    ends = rng.choice(states, size=max(1, states // 2), replace=False)
    return Automaton.from_arcs(drawn, final={int(s): float(rng.normal()) for s in ends})


def random_case(seed: int) -> tuple[Automaton, np.ndarray]:
    rng = np.random.default_rng(seed)
    states, pdfs = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    automaton = random_automaton(rng, states=states, arcs=int(rng.integers(1, 9)), pdfs=pdfs)
    return automaton, rng.normal(scale=3.0, size=(int(rng.integers(0, 6)), pdfs))


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_every_path_listed(seed: int) -> None:
    automaton, scores = random_case(seed)
    log_z, posteriors = forward_backward(automaton, scores)
    expected_log_z, expected = enumerate_paths(automaton, scores)
    assert log_z == pytest.approx(expected_log_z, abs=1e-12)
    np.testing.assert_allclose(posteriors, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_posteriors_are_the_gradient_of_log_z(seed: int) -> None:
    rng = np.random.default_rng(seed)
    automaton = random_automaton(rng, states=6, arcs=20, pdfs=5)
    scores = torch.tensor(rng.normal(size=(12, 5)), requires_grad=True)
    by_recursion = log_z_by_recursion(automaton, scores)
    log_z, posteriors = forward_backward(automaton, scores.detach().numpy())
    assert log_z == pytest.approx(by_recursion.item(), abs=1e-11)
    if np.isfinite(log_z):
        (gradient,) = torch.autograd.grad(by_recursion, scores)
        np.testing.assert_allclose(posteriors, gradient.numpy(), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(-300.0, 300.0), min_size=5, max_size=5))
def test_a_constant_on_a_frame_shifts_log_z_and_nothing_else(seed: int, shifts: list[float]) -> None:
    automaton, scores = random_case(seed)
    shift = np.array(shifts)[: len(scores)]
    plain, shifted = forward_backward(automaton, scores), forward_backward(automaton, scores + shift[:, None])
    assume(plain.log_z > -np.inf)
    np.testing.assert_allclose(plain.posteriors.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(shifted.log_z, plain.log_z + shift.sum(), atol=1e-9)
    np.testing.assert_allclose(shifted.posteriors, plain.posteriors, atol=1e-9)


def left_to_right(states: int) -> Automaton:
    half = float(np.log(0.5))
    arcs = [(s, s + step, s, half) for s in range(states) for step in (0, 1)]
    return Automaton.from_arcs(arcs, final={states: 0.0})


def test_long_utterances_stay_exact() -> None:
    """Scores of real size over 3,000 frames: log Z near -300,000 while the posteriors still sum to one."""
    scores = np.random.default_rng(0).normal(loc=-100.0, scale=5.0, size=(3000, 40))
    log_z, posteriors = forward_backward(left_to_right(40), scores)
    assert -310_000 < log_z < -270_000
    np.testing.assert_allclose(posteriors.sum(1), 1.0, atol=1e-9)


def test_too_few_frames_are_impossible_not_an_error() -> None:
    automaton = left_to_right(4)
    log_z, posteriors = forward_backward(automaton, np.zeros((automaton.min_frames - 1, 4)))
    assert log_z == -np.inf
    assert not posteriors.any()
    assert forward_backward(automaton, np.zeros((automaton.min_frames, 4))).log_z > -np.inf


def test_forbidden_pdfs_are_avoided() -> None:
    automaton = Automaton.from_arcs([(0, 0, 0, 0.0), (0, 0, 1, 0.0)], final={0: 0.0})
    scores = np.array([[-np.inf, -2.0], [-1.0, -np.inf]])
    log_z, posteriors = forward_backward(automaton, scores)
    assert log_z == pytest.approx(-3.0)
    assert posteriors.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numerical_failure_stays_visible(bad: float) -> None:
    scores = np.zeros((5, 4))
    scores[2, 1] = bad
    log_z, posteriors = forward_backward(left_to_right(4), scores)
    assert np.isnan(log_z) and np.isnan(posteriors).all()


def test_batch_is_the_single_call_for_any_number_of_jobs() -> None:
    cases = [random_case(seed) for seed in range(20)]
    alone = [forward_backward(*case) for case in cases]
    for jobs in (1, 3):
        batch = forward_backward_batch(cases, jobs=jobs)
        assert all(a.log_z == b.log_z for a, b in zip(alone, batch, strict=True))
        assert all(np.array_equal(a.posteriors, b.posteriors) for a, b in zip(alone, batch, strict=True))


def test_float32_and_read_only_scores_are_accepted() -> None:
    scores = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    expected = forward_backward(left_to_right(4), scores.astype(np.float64)).log_z
    scores.flags.writeable = False
    assert forward_backward(left_to_right(4), scores).log_z == expected


@pytest.mark.parametrize(("scores", "message"), [(np.zeros((5, 3)), "emits pdf 3"), (np.zeros(5), r"shape \(5,\)")])
def test_scores_of_the_wrong_shape_are_refused(scores: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_backward(left_to_right(4), scores)


def test_jobs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="jobs=0"):
        forward_backward_batch([], jobs=0)
