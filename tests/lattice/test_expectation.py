from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice import kernels
from quadric.lattice.expectation import (
    PathSums,
    arc_occupancy,
    arc_values,
    mean_curvature,
    path_sums,
    path_sums_batch,
)
from quadric.lattice.lattice import Lattice
from reference.lattice_sums import arc_scores, list_paths, log_z_by_recursion, mean_by_autograd
from reference.lattices import lattices, random_lattice, random_scores

Case = tuple[Lattice, np.ndarray, np.ndarray]
"""A lattice, scores and values."""


def random_case(seed: int, *, frames: int = 5, width: int = 3, spread: float = 3.0, extra: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    lattice = random_lattice(rng, frames=frames, width=width)
    scores = random_scores(rng, lattice, pdfs=lattice.num_pdfs + extra, spread=spread)
    return lattice, scores, rng.normal(size=lattice.num_arcs)


def chain(frames: int = 3) -> Lattice:
    """One state between two frames, with a choice of two pdfs in each frame."""
    return Lattice.from_arcs([(t, t + 1, pdf) for t in range(frames) for pdf in (0, 1)], final={frames: -0.25})


def close(found: PathSums, expected: PathSums, tolerance: float = 1e-11) -> None:
    """All four, or None in both."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@settings(max_examples=150)
@given(lattices(), st.integers(0, 10_000), st.sampled_from([0.3, 3.0, 30.0]))
def test_agrees_with_every_path_listed(lattice: Lattice, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    scores = random_scores(rng, lattice, spread=spread)
    value, direction = rng.normal(size=lattice.num_arcs), rng.normal(size=scores.shape)
    listed = list_paths(lattice, scores, value, direction)
    close(path_sums(lattice, scores, value), PathSums(*listed[:4]))
    np.testing.assert_allclose(mean_curvature(lattice, scores, value, direction), listed.curvature, atol=1e-11)
    np.testing.assert_allclose(arc_occupancy(lattice, scores), listed.arcs, atol=1e-12)
    alone = path_sums(lattice, scores)
    assert (alone.log_z, alone.mean, alone.derivative) == (pytest.approx(listed.log_z, abs=1e-11), 0.0, None)
    np.testing.assert_allclose(alone.occupancy, listed.occupancy, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_autograd_through_logarithms(seed: int) -> None:
    """First derivatives of log Z, and first and second of the mean, where there are too many paths to list."""
    lattice, scores, value = random_case(seed, frames=25, width=6)
    x, v = torch.tensor(scores, requires_grad=True), torch.tensor(value)
    u = torch.randn(scores.shape, dtype=torch.float64)
    log_z = log_z_by_recursion(lattice, arc_scores(lattice, x))
    mean = mean_by_autograd(lattice, x, v)
    (occupancy,) = torch.autograd.grad(log_z, x)
    (derivative,) = torch.autograd.grad(mean, x, create_graph=True)
    (curvature,) = torch.autograd.grad((derivative * u).sum(), x)
    expected = PathSums(log_z.item(), mean.item(), occupancy.numpy(), derivative.detach().numpy())
    close(path_sums(lattice, scores, value), expected)
    np.testing.assert_allclose(mean_curvature(lattice, scores, value, u.numpy()), curvature.numpy(), atol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_openfst(seed: int) -> None:
    fst = pytest.importorskip("pynini")
    lattice, scores, _ = random_case(seed, frames=20, width=5)
    automaton = fst.Fst(arc_type="log64")
    automaton.add_states(lattice.num_states)
    automaton.set_start(0)
    costs = -arc_scores(lattice, torch.tensor(scores)).numpy()
    for source, target, cost in zip(lattice.source.tolist(), lattice.target.tolist(), costs.tolist(), strict=True):
        automaton.add_arc(source, fst.Arc(1, 1, fst.Weight("log64", cost), target))
    for n, weight in enumerate(lattice.final.tolist()):
        automaton.set_final(lattice.num_states - len(lattice.final) + n, fst.Weight("log64", -weight))
    to_end = -float(str(fst.shortestdistance(automaton, reverse=True, delta=1e-15)[0]))
    assert path_sums(lattice, scores).log_z == pytest.approx(to_end, abs=1e-4)  # weights are printed in six digits


@pytest.mark.parametrize("seed", range(6))
def test_derivatives_are_limits_of_differences(seed: int) -> None:
    lattice, scores, value = random_case(seed, frames=30, width=6, extra=3)
    direction, step = np.random.default_rng(seed).normal(size=scores.shape), 1e-5
    ahead, behind = (path_sums(lattice, scores + sign * step * direction, value) for sign in (1, -1))
    here = path_sums(lattice, scores, value)
    assert here.occupancy is not None and here.derivative is not None
    assert ahead.derivative is not None and behind.derivative is not None
    assert (here.occupancy * direction).sum() == pytest.approx((ahead.log_z - behind.log_z) / (2 * step), abs=1e-7)
    assert (here.derivative * direction).sum() == pytest.approx((ahead.mean - behind.mean) / (2 * step), abs=1e-7)
    np.testing.assert_allclose(
        mean_curvature(lattice, scores, value, direction),
        (ahead.derivative - behind.derivative) / (2 * step),
        atol=1e-7,
    )


@given(lattices(frames=12, width=6), st.integers(0, 10_000))
def test_a_direction_as_value_gives_the_hessian_of_log_z(lattice: Lattice, seed: int) -> None:
    """It is a variance, the curvature of the mean is its derivative, and both products are symmetric."""
    rng = np.random.default_rng(seed)
    scores = random_scores(rng, lattice)
    value = rng.normal(size=lattice.num_arcs)
    u, v = rng.normal(size=(2, *scores.shape))
    by_u, by_v = (path_sums(lattice, scores, arc_values(lattice, x)).derivative for x in (u, v))
    assert by_u is not None and by_v is not None
    assert (v * by_v).sum() >= -1e-12
    assert (u * by_v).sum() == pytest.approx((v * by_u).sum(), abs=1e-10)
    bent_u, bent_v = (mean_curvature(lattice, scores, value, x) for x in (u, v))
    assert (u * bent_v).sum() == pytest.approx((v * bent_u).sum(), abs=1e-10)
    moved = [path_sums(lattice, scores + step * v, arc_values(lattice, u)).derivative for step in (1e-5, -1e-5)]
    third = (moved[0] - moved[1]) / 2e-5  # type: ignore[operator]
    np.testing.assert_allclose(mean_curvature(lattice, scores, arc_values(lattice, u), v), third, atol=1e-6)


@given(lattices(), st.integers(0, 10_000), st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=6))
def test_a_constant_on_a_frame_shifts_log_z_and_nothing_else(
    lattice: Lattice, seed: int, constants: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    scores, value = random_scores(rng, lattice), rng.normal(size=lattice.num_arcs)
    shift = np.array(constants)[: len(scores)]
    plain, shifted = path_sums(lattice, scores, value), path_sums(lattice, scores + shift[:, None], value)
    assert plain.occupancy is not None and plain.derivative is not None
    np.testing.assert_allclose(plain.occupancy.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(plain.derivative.sum(1), 0.0, atol=1e-12)
    close(shifted._replace(log_z=shifted.log_z - shift.sum()), plain, 1e-9)


@given(lattices(), st.integers(0, 10_000))
def test_forward_alone_is_the_same_to_the_bit_but_for_the_mean(lattice: Lattice, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, value = random_scores(rng, lattice), rng.normal(size=lattice.num_arcs)
    whole, half = path_sums(lattice, scores, value), path_sums(lattice, scores, value, backward=False)
    assert half.log_z == whole.log_z and half.mean == pytest.approx(whole.mean, abs=1e-12)
    assert half.occupancy is None and half.derivative is None
    assert path_sums(lattice, scores, backward=False) == (whole.log_z, 0.0, None, None)


@pytest.mark.parametrize("spread", [300.0, 1e4, 1e6])
@pytest.mark.parametrize("seed", range(8))
def test_scores_beyond_the_range_of_probabilities_are_summed_by_logarithms(seed: int, spread: float) -> None:
    lattice, scores, value = random_case(seed, frames=6, width=4, spread=spread)
    direction = np.random.default_rng(seed).normal(size=scores.shape)
    listed = list_paths(lattice, scores, value, direction)
    found = path_sums(lattice, scores, value)
    assert found.log_z == pytest.approx(listed.log_z, rel=1e-13)
    close(found._replace(log_z=0.0), PathSums(0.0, *listed[1:4]), 1e-16 * spread * 100)
    np.testing.assert_allclose(
        mean_curvature(lattice, scores, value, direction), listed.curvature, atol=1e-16 * spread * 100
    )


def test_a_path_that_is_worse_before_and_after_is_not_lost() -> None:
    """Nothing passes between an upper and a lower row of states, and the path that is best of all is by far the
    worse in its first frames as in its last: neither sweep over scaled probabilities would know it."""
    steps = [0, 1, 2, 3]
    rows = [[0, 1, 3, 5], [0, 2, 4, 6]]
    arcs = [(row[t], row[t + 1], n) for n, row in enumerate(rows) for t in steps[:-1]]
    lattice = Lattice.from_arcs(arcs, final={5: 0.0, 6: 0.0})
    scores = np.array([[0.0, -900.0], [-2000.0, 0.0], [0.0, -900.0]])
    sums = path_sums(lattice, scores)
    assert sums.log_z == pytest.approx(-1800.0)
    assert sums.occupancy is not None
    np.testing.assert_allclose(sums.occupancy, [[0.0, 1.0]] * 3, atol=1e-80)


@pytest.mark.parametrize("by", ["final", "scores"])
def test_what_is_unlikely_frame_after_frame_keeps_its_digits(by: str) -> None:
    """The best of a frame comes before the worst of the next, so that what is bad in both falls out of the range of
    probabilities, although no frame alone has states as far apart; and then the first frame favours it."""
    arcs = [(0, 1, 0), (0, 2, 1), (1, 4, 0), (1, 3, 1), (2, 4, 2), (2, 4, 3)]
    scores = np.array([[-800.0, 0.0, 0.0, 0.0], [0.0, -400.0, -300.0, -300.7], [0.0, 0.0, 0.0, -430.0]])
    if by == "final":
        lattice, scores = Lattice.from_arcs(arcs, final={3: 0.0, 4: -430.0}), scores[:2]
    else:
        lattice = Lattice.from_arcs([*arcs, (3, 5, 0), (4, 5, 3)], final={5: 0.0})
    sums = path_sums(lattice, scores)
    share = 1.0 / (1.0 + np.exp(-0.7))
    assert sums.log_z == pytest.approx(-730.0 - np.log(share), rel=1e-14)
    assert sums.occupancy is not None
    np.testing.assert_allclose(sums.occupancy[1], [0.0, 0.0, share, 1.0 - share], atol=1e-13)


@pytest.mark.parametrize("seed", range(8))
def test_both_ways_to_sum_agree(seed: int) -> None:
    """Scaled probabilities and logarithms, on scores that both can do; and the former are what is used."""
    lattice, scores, _ = random_case(seed, frames=60, width=6, spread=10.0)
    found = []
    for sums in (kernels.leave, kernels.leave_log):
        leave, states = np.empty(lattice.num_arcs), np.empty((2, lattice.num_states))
        source, target, pdf = (x.view(np.uint32) for x in (lattice.source, lattice.target, lattice.pdf))
        best, _ = kernels.arc_scores(pdf, lattice.weight, lattice.frames, scores, leave)
        log_z = sums(source, target, lattice.frames, lattice.levels, lattice.final, states, leave)
        found.append((best + log_z, leave))
    assert np.isfinite(found[0][0])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-14)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-12)


def test_long_utterances_stay_exact() -> None:
    """3,000 frames with scores of real size: log Z is near -300,000, and derivatives keep their digits."""
    rng = np.random.default_rng(0)
    lattice = random_lattice(rng, frames=3000, width=5, pdfs=40)
    scores = rng.normal(loc=-100.0, scale=5.0, size=(3000, 40))
    value = rng.random(lattice.num_arcs)
    sums = path_sums(lattice, scores, value)
    assert -320_000 < sums.log_z < -270_000
    assert sums.occupancy is not None and sums.derivative is not None
    np.testing.assert_allclose(sums.occupancy.sum(1), 1.0, atol=1e-11)
    np.testing.assert_allclose(sums.derivative.sum(1), 0.0, atol=1e-10)
    # As a common part of the scores goes, so does its rounding; the rest is what it was.
    centred = path_sums(lattice, scores + 100.0, value)
    np.testing.assert_allclose(sums.derivative, centred.derivative, atol=1e-10)
    assert sums.log_z == pytest.approx(centred.log_z - 300_000, abs=1e-8)


def test_the_least_lattice() -> None:
    lattice = Lattice.from_arcs([(0, 1, 2)], final={1: -0.5}, weight=[-1.0])
    sums = path_sums(lattice, np.array([[9.0, 9.0, -2.0]]), np.array([4.0]))
    close(sums, PathSums(-3.5, 4.0, np.array([[0.0, 0.0, 1.0]]), np.zeros((1, 3))))
    assert not mean_curvature(lattice, np.zeros((1, 3)), np.array([4.0]), np.ones((1, 3))).any()


def test_forbidden_pdfs_are_avoided() -> None:
    scores = np.array([[-np.inf, -2.0], [-1.0, -np.inf], [-1.0, -1.0]])
    sums = path_sums(chain(), scores, np.arange(6.0))
    assert sums.log_z == pytest.approx(-4.25 + np.log(2.0))
    assert sums.mean == pytest.approx(1.0 + 2.0 + 4.5)
    assert sums.occupancy is not None
    np.testing.assert_allclose(sums.occupancy, [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], atol=1e-15)
    assert sums.occupancy[0, 0] == 0.0


@given(lattices(), st.integers(0, 10_000))
def test_some_forbidden_pdfs_are_as_if_their_arcs_were_not(lattice: Lattice, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = random_scores(rng, lattice)
    value = rng.normal(size=lattice.num_arcs)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    sums = path_sums(lattice, scores, value)
    # What is very unlikely leaves the same sums behind, where anything better is left.
    listed = list_paths(lattice, np.where(np.isinf(scores), -1e5, scores), value)
    if listed.log_z < -5e4:
        assert sums.log_z == -np.inf
        assert sums.mean == 0.0 and not sums.occupancy.any() and not sums.derivative.any()  # type: ignore[union-attr]
        assert not mean_curvature(lattice, scores, value, np.ones_like(scores)).any()
        assert not arc_occupancy(lattice, scores).any()
    else:
        close(sums, PathSums(*listed[:4]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("others", [0.0, -np.inf])
def test_numerical_failure_stays_visible(bad: float, others: float) -> None:
    """Also where all paths are forbidden in another frame; not on pdfs that no arc has."""
    for frame in range(3):
        scores = np.zeros((3, 4))
        scores[frame, 3] = bad
        assert path_sums(chain(), scores).log_z == pytest.approx(3 * np.log(2) - 0.25)
        scores[(frame + 1) % 3] = others
        scores[frame, 1] = bad
        sums = path_sums(chain(), scores, np.zeros(6))
        assert all(np.isnan(x).all() for x in sums)  # type: ignore[arg-type]
        half = path_sums(chain(), scores, np.zeros(6), backward=False)
        assert np.isnan(half.log_z) and np.isnan(half.mean)
        assert np.isnan(path_sums(chain(), scores).mean)
        assert np.isnan(mean_curvature(chain(), scores, np.zeros(6), np.zeros((3, 4)))).all()
        assert np.isnan(arc_occupancy(chain(), scores)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_spoils_the_mean_alone(bad: float) -> None:
    value, scores = np.zeros(6), np.zeros((3, 3))
    value[2] = bad
    sums, plain = path_sums(chain(), scores, value), path_sums(chain(), scores)
    assert sums.log_z == plain.log_z and np.isnan(sums.mean)
    np.testing.assert_array_equal(sums.occupancy, plain.occupancy)
    assert np.isnan(sums.derivative).all()  # type: ignore[arg-type]
    assert np.isnan(path_sums(chain(), scores, value, backward=False).mean)
    assert np.isnan(mean_curvature(chain(), scores, value, np.ones((3, 3)))).all()
    assert np.isnan(mean_curvature(chain(), scores, np.ones(6), np.full((3, 3), bad))).all()


def test_float32_in_and_out_with_sums_in_float64() -> None:
    lattice, scores, value = random_case(0, frames=40, width=6, extra=5)
    single = scores.astype(np.float32)
    exact = path_sums(lattice, single.astype(np.float64), value)
    sums = path_sums(lattice, single, value.astype(np.float32))
    assert sums.occupancy is not None and sums.derivative is not None and exact.derivative is not None
    assert sums.occupancy.dtype == sums.derivative.dtype == np.float32
    assert sums.log_z == pytest.approx(exact.log_z, abs=1e-12)
    np.testing.assert_array_equal(sums.occupancy, exact.occupancy.astype(np.float32))  # type: ignore[union-attr]
    np.testing.assert_allclose(sums.derivative, exact.derivative, rtol=1e-5, atol=1e-5)
    product = mean_curvature(lattice, single, value, single)
    assert product.dtype == np.float32
    np.testing.assert_allclose(
        product, mean_curvature(lattice, single.astype(np.float64), value, single.astype(np.float64)), atol=1e-6
    )


def test_scores_may_be_read_only_or_of_another_layout() -> None:
    lattice, scores, value = random_case(3)
    expected = path_sums(lattice, scores, value)
    for same in (np.asfortranarray(scores), np.repeat(scores, 2, axis=1)[:, ::2], scores.copy()):
        same.flags.writeable = False
        close(path_sums(lattice, same, value), expected, 0.0)
    assert arc_values(lattice, scores).tolist() == scores[lattice.frame, lattice.pdf].tolist()


def test_batch_is_the_single_call_for_any_number_of_jobs() -> None:
    cases = [random_case(seed, frames=20, width=5) for seed in range(12)]
    items = [(lattice, scores, value if n % 3 else None) for n, (lattice, scores, value) in enumerate(cases)]
    alone = [path_sums(*item) for item in items]
    for jobs in (1, 4):
        for found, expected in zip(path_sums_batch(items, jobs=jobs), alone, strict=True):
            close(found, expected, 0.0)
        halves = path_sums_batch(items, backward=False, jobs=jobs)
        assert [half.log_z for half in halves] == [whole.log_z for whole in alone]


def test_earlier_results_are_written_over() -> None:
    cases = [random_case(seed, frames=9, extra=2) for seed in range(3)]
    expected = path_sums_batch(cases)
    others = [(lattice, scores * 0.5, -value) for lattice, scores, value in cases]
    used = path_sums_batch(others)
    again = path_sums_batch(cases, out=used, jobs=2)
    for found, old, fresh in zip(again, used, expected, strict=True):
        assert found.occupancy is old.occupancy and found.derivative is old.derivative
        close(found, fresh, 0.0)
    lattice, scores, value = cases[0]
    room = np.full_like(scores, np.nan)
    assert mean_curvature(lattice, scores, value, scores, out=room) is room
    np.testing.assert_array_equal(room, mean_curvature(lattice, scores, value, scores))


def test_results_do_not_depend_on_what_was_summed_before() -> None:
    """Memory is handed on between calls of all sizes."""
    small, large = random_case(0, frames=2), random_case(1, frames=50, width=8, spread=1e4)
    fresh = path_sums(*small)
    for before in (large, (large[0], np.full_like(large[1], np.nan), large[2])):
        path_sums(*before)
        mean_curvature(*before, before[1])
        close(path_sums(*small), fresh, 0.0)


def _log_z(case: Case) -> float:
    return path_sums_batch([case, case], jobs=2)[0].log_z


def test_a_forked_child_works_after_threads() -> None:
    case = random_case(0)
    expected = _log_z(case)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_log_z, (case,)).get(timeout=60) == expected


def test_calls_from_many_threads_do_not_mix() -> None:
    cases = [random_case(seed, frames=30, width=6) for seed in range(8)]
    expected = [path_sums(*case) for case in cases]
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda n: (n % 8, path_sums(*cases[n % 8])), range(200)):
            close(found[1], expected[found[0]], 0.0)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (np.zeros(3), r"scores must be a matrix .* 3 frames"),
        (np.zeros((4, 2)), r"3 frames, not of shape \(4, 2\)"),
        (np.zeros((3, 1)), "scores has 1 columns, but the lattice emits pdf 1"),
        (np.zeros((3, 2), np.float16), "float16: pass float32 or float64"),
        (np.zeros((3, 2), int), "int64: pass float32 or float64"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        path_sums(chain(), scores)


def test_other_misuse_is_refused() -> None:
    scores, value = np.zeros((3, 2)), np.zeros(6)
    with pytest.raises(ValueError, match="value must have one entry for each of the 6 arcs"):
        path_sums(chain(), scores, np.zeros(5))
    with pytest.raises(ValueError, match=r"direction has shape \(3, 3\)"):
        mean_curvature(chain(), scores, value, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="per_frame has 1 columns"):
        arc_values(chain(), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="jobs=0"):
        path_sums_batch([], jobs=0)
    with pytest.raises(ValueError, match="1 results for 2 items"):
        path_sums_batch([(chain(), scores, None)] * 2, out=path_sums_batch([(chain(), scores, None)]))
    with pytest.raises(ValueError, match=r"out.occupancy is float32 of shape \(3, 2\)"):
        path_sums(chain(), scores, out=path_sums(chain(), scores.astype(np.float32)))
    with pytest.raises(ValueError, match=r"out.derivative is float64 of shape \(3, 5\)"):
        path_sums(chain(), scores, value, out=PathSums(0.0, 0.0, None, np.zeros((3, 5))))
    with pytest.raises(ValueError, match="pass a contiguous array"):
        mean_curvature(chain(), scores, value, scores, out=np.zeros((2, 3)).T)
