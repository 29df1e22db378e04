from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Diagonal, Identity, Matrix
from quadric.linalg.solver import Iterate
from quadric.linalg.truncation import RelativeProgress, Residual
from quadric.linalg.vector import dot
from quadric.outcome import Outcome
from reference import dense

EXACT = ConjugateGradient(max_steps=200, stop=Residual(1e-12))


def problem(n: int, seed: int, condition: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return dense.random_spd(n, condition=condition, seed=seed), b


@settings(max_examples=40)
@given(n=st.integers(1, 25), seed=st.integers(0, 999), preconditioned=st.booleans(), warm=st.booleans())
def test_equals_a_direct_solve(n: int, seed: int, preconditioned: bool, warm: bool) -> None:
    A, b = problem(n, seed)
    M = Diagonal(1.0 / A.diagonal()) if preconditioned else None
    x0 = torch.full((n,), 0.7, dtype=torch.float64) if warm else None
    path = EXACT.solve(Matrix(A), b, x0=x0, M=M)
    assert path.outcome is Outcome.CONVERGED
    torch.testing.assert_close(path.last.x, dense.solve(A, b), rtol=1e-8, atol=1e-9)


def test_directions_are_conjugate_so_every_eigenvalue_costs_one_step() -> None:
    basis = torch.linalg.eigh(dense.random_spd(30, seed=9)).eigenvectors
    values = torch.tensor([1.0, 7.0, 50.0], dtype=torch.float64).repeat(10)
    A = (basis * values) @ basis.T
    path = ConjugateGradient(50, Residual(1e-9)).solve(Matrix(0.5 * (A + A.T)), problem(30, 9)[1])
    assert (path.outcome, path.steps) == (Outcome.CONVERGED, 3)


def test_the_exact_preconditioner_needs_one_step() -> None:
    A, b = problem(12, 3)
    inverse = torch.linalg.inv(A)
    path = EXACT.solve(Matrix(A), b, M=Matrix(0.5 * (inverse + inverse.T)))
    assert (path.outcome, path.steps) == (Outcome.CONVERGED, 1)
    torch.testing.assert_close(path.last.x, dense.solve(A, b))


def test_a_preconditioner_saves_steps_on_a_badly_scaled_system() -> None:
    scales = torch.logspace(-3, 3, 40, dtype=torch.float64)
    A, b = problem(40, 5, condition=4.0)
    A = scales[:, None] * A * scales
    solver = ConjugateGradient(max_steps=400, stop=Residual(1e-8))
    plain, helped = solver.solve(Matrix(A), b), solver.solve(Matrix(A), b, M=Diagonal(1 / A.diagonal()))
    assert helped.outcome is Outcome.CONVERGED
    assert helped.steps < plain.steps / 2


def test_iterates_report_their_own_model_value_and_residual() -> None:
    A, b = problem(15, 1)
    x0 = torch.randn(15, dtype=torch.float64)
    for point in EXACT.iterates(Matrix(A), b, x0=x0):
        if isinstance(point, Iterate):
            assert point.model == pytest.approx(0.5 * dot(point.x, A @ point.x) - dot(b, point.x), rel=1e-9, abs=1e-9)
            assert point.residual == pytest.approx(float((b - A @ point.x).norm()), rel=1e-6, abs=1e-9)


def test_the_model_value_never_rises() -> None:
    A, b = problem(30, 2, condition=1e4)
    models = [p.model for p in EXACT.iterates(Matrix(A), b) if isinstance(p, Iterate)]
    assert len(models) > 10
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(models))


def test_a_start_at_the_solution_takes_no_step() -> None:
    b = torch.tensor([2.0, 4.0])
    path = EXACT.solve(2.0 * Identity(2), b, x0=torch.tensor([1.0, 2.0]))
    assert (path.outcome, path.steps) == (Outcome.CONVERGED, 0)
    assert torch.equal(path.last.x, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("x0", [None, torch.ones(3)])
def test_a_zero_right_hand_side_is_an_outcome(x0: torch.Tensor | None) -> None:
    path = EXACT.solve(Identity(3), torch.zeros(3), x0=x0)
    assert path.outcome is Outcome.ZERO_RIGHT_HAND_SIDE
    assert not path.last.x.any()


def test_negative_curvature_keeps_the_iterate_before_it() -> None:
    A = torch.diag(torch.tensor([4.0, 1.0, -1.0]))
    path = EXACT.solve(Matrix(A), torch.tensor([4.0, 1.0, 0.1]))
    assert path.outcome is Outcome.NEGATIVE_CURVATURE
    assert path.steps >= 1
    assert path.last.x.isfinite().all()
    assert path.last.model < 0


def test_negative_curvature_at_once_leaves_only_the_start() -> None:
    path = EXACT.solve(-1.0 * Identity(2), torch.ones(2))
    assert (path.outcome, path.steps) == (Outcome.NEGATIVE_CURVATURE, 0)
    assert not path.last.x.any()


@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [0.0, 0.0], [1.0, 0.0]])
def test_an_indefinite_preconditioner_is_an_outcome_and_no_exception(diagonal: list[float]) -> None:
    A = Diagonal(torch.tensor([2.0, 1.0]))
    path = EXACT.solve(A, torch.ones(2), M=Diagonal(torch.tensor(diagonal)))
    assert path.outcome in (Outcome.NEGATIVE_CURVATURE, Outcome.STEP_LIMIT)
    assert path.last.x.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_product_that_is_not_finite_keeps_the_iterate_before_it(value: float) -> None:
    A, b = problem(20, 4)
    healthy = [p for p in EXACT.iterates(Matrix(A), b) if isinstance(p, Iterate)]
    path = EXACT.solve(dense.Failing(A, 5, value), b)
    assert (path.outcome, path.steps) == (Outcome.NON_FINITE, 5)
    assert torch.equal(path.last.x, healthy[5].x)


def test_an_overflowing_iterate_is_never_part_of_the_path() -> None:
    b = torch.tensor([1e30, 1e-30])
    path = EXACT.solve(Diagonal(torch.tensor([1e-30, 1e30])), b)
    assert path.outcome is Outcome.NON_FINITE
    assert all(p.x.isfinite().all() for p in path.points)


def test_stored_steps_are_geometric_and_end_with_the_last() -> None:
    A, b = problem(60, 6, condition=1e6)
    path = ConjugateGradient(max_steps=50, stop=Residual(0.0), storage_ratio=1.3).solve(Matrix(A), b)
    assert path.outcome is Outcome.STEP_LIMIT
    expected = sorted({math.ceil(1.3**j) for j in range(16)} | {50})
    assert [p.step for p in path.points] == [s for s in expected if s <= 50]


def test_relative_progress_stops_where_the_formula_says() -> None:
    A, b = problem(80, 7, condition=1e6)
    rule = RelativeProgress(tolerance=5e-3, lag=4, share=0.1)
    models = [p.model for p in ConjugateGradient(300, Residual(0.0)).iterates(Matrix(A), b) if isinstance(p, Iterate)]
    path = ConjugateGradient(300, rule).solve(Matrix(A), b)

    def truncates(i: int) -> bool:
        k = max(4, math.ceil(0.1 * i))
        return i > k and models[i] < 0 and (models[i] - models[i - k]) / models[i] < k * 5e-3

    assert path.outcome is Outcome.TRUNCATED
    assert path.steps == next(i for i in range(len(models)) if truncates(i))


def test_single_precision_inner_products_are_accumulated_in_double() -> None:
    x = torch.full((1,), 1e8)
    assert dot(torch.cat([x, torch.ones(1)]), torch.cat([x, torch.ones(1)])) == 1e16 + 1


def test_misuse_is_explained() -> None:
    A, skew = Identity(2), Matrix(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    b = torch.ones(2)
    with pytest.raises(ValueError, match=r"A is not symmetric.*symmetrise A first"):
        EXACT.solve(skew, b)
    with pytest.raises(ValueError, match=r"M is not symmetric.*symmetrise M first"):
        EXACT.solve(A, b, M=skew)
    with pytest.raises(ValueError, match=r"b has shape \(3,\) and M size 2, A acts on \(2,\)"):
        EXACT.solve(A, torch.ones(3))
    with pytest.raises(ValueError, match="max_steps=0: at least one"):
        ConjugateGradient(max_steps=0)
    with pytest.raises(ValueError, match=r"storage_ratio=1\.0: must be over 1"):
        ConjugateGradient(storage_ratio=1.0)
