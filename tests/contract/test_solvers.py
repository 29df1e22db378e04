"""What every KrylovSolver promises, on the definite systems that all of them solve."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from cases import SolverCase, draw
from quadric.linalg.krylov import FlexibleCG
from quadric.linalg.operator import Diagonal, Identity, LinearOperator, Matrix
from quadric.linalg.pairs import LastPairs, PairSelection, SpreadPairs
from quadric.linalg.solver import Iterate
from quadric.linalg.truncation import FixedIterations, Residual
from quadric.outcome import Outcome
from reference import dense

every_solver = pytest.mark.parametrize("build", cases.SOLVERS.values(), ids=[cls.__name__ for cls in cases.SOLVERS])


def walk(build: SolverCase, *args: object, **kwargs: object) -> list[Iterate]:
    return [p for p in build(60, Residual(1e-11)).iterates(*args, **kwargs) if isinstance(p, Iterate)]


@every_solver
@settings(max_examples=30)
@given(n=st.integers(1, 25), seed=st.integers(0, 999), preconditioned=st.booleans(), warm=st.booleans())
def test_equals_a_direct_solve(build: SolverCase, n: int, seed: int, preconditioned: bool, warm: bool) -> None:
    A, b = dense.random_spd(n, seed=seed), draw(n, seed=seed + 1)
    M = Diagonal(1.0 / A.diagonal()) if preconditioned else None
    path = build(200, Residual(1e-11)).solve(Matrix(A), b, x0=draw(n, seed=7) if warm else None, M=M)
    assert path.outcome is Outcome.CONVERGED
    assert path.met is None
    torch.testing.assert_close(path.last.x, dense.solve(A, b), rtol=1e-7, atol=1e-8)


@every_solver
@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_report_their_own_model_value_and_residual(build: SolverCase, preconditioned: bool) -> None:
    A, b = dense.random_spd(15, seed=1), draw(15)
    M = Diagonal(1.0 / A.diagonal()) if preconditioned else None
    points = walk(build, Matrix(A), b, x0=draw(15, seed=3), M=M)
    assert [p.step for p in points] == list(range(len(points)))
    for p in points:
        assert p.model == pytest.approx(float(0.5 * p.x @ (A @ p.x) - b @ p.x), rel=1e-9, abs=1e-9)
        assert p.residual == pytest.approx(float((b - A @ p.x).norm()), rel=1e-6, abs=1e-9)


@every_solver
def test_iterates_and_pairs_stay_as_they_were(build: SolverCase) -> None:
    A, b = dense.random_spd(15, seed=1), draw(15)
    x0 = draw(15, seed=3)
    given_b, given_x0 = b.clone(), x0.clone()
    points, copies = [], []
    for p in build(60, Residual(1e-11)).iterates(Matrix(A), b, x0=x0):
        if isinstance(p, Iterate):
            points.append(p.x)
            copies.append(p.x.clone())
    assert all(torch.equal(x, copy) for x, copy in zip(points, copies, strict=True))
    assert len({x.data_ptr() for x in (*points, x0, b)}) == len(points) + 2
    assert torch.equal(b, given_b) and torch.equal(x0, given_x0)


@every_solver
@pytest.mark.parametrize("x0", [None, torch.ones(3)])
def test_a_zero_right_hand_side_is_an_outcome(build: SolverCase, x0: torch.Tensor | None) -> None:
    path = build().solve(Identity(3), torch.zeros(3), x0=x0)
    assert path.outcome is Outcome.ZERO_RIGHT_HAND_SIDE
    assert not path.last.x.any()


@every_solver
def test_a_start_at_the_solution_takes_no_step(build: SolverCase) -> None:
    path = build().solve(2.0 * Identity(2), torch.tensor([2.0, 4.0]), x0=torch.tensor([1.0, 2.0]))
    assert (path.outcome, path.steps) == (Outcome.CONVERGED, 0)


@every_solver
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("products", [0, 5])
def test_a_product_that_is_not_finite_keeps_the_iterate_before_it(
    build: SolverCase, value: float, products: int
) -> None:
    A, b = dense.random_spd(20, seed=4), draw(20)
    healthy = walk(build, Matrix(A), b)
    path = build(60, Residual(1e-11)).solve(dense.Failing(A, products, value), b)
    assert (path.outcome, path.steps) == (Outcome.NON_FINITE, products)
    assert torch.equal(path.last.x, healthy[products].x)


@every_solver
def test_a_right_hand_side_that_is_not_finite_is_an_outcome(build: SolverCase) -> None:
    path = build().solve(Identity(2), torch.tensor([1.0, math.nan]))
    assert (path.outcome, path.steps) == (Outcome.NON_FINITE, 0)


@every_solver
@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [0.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
def test_an_indefinite_preconditioner_is_an_outcome_and_no_exception(build: SolverCase, diagonal: list[float]) -> None:
    path = build().solve(Diagonal(torch.tensor([2.0, 1.0])), torch.ones(2), M=Diagonal(torch.tensor(diagonal)))
    assert path.outcome is not Outcome.CONVERGED
    assert path.last.x.isfinite().all()


@every_solver
def test_a_fixed_number_of_iterations(build: SolverCase) -> None:
    path = build(60, FixedIterations(4)).solve(Matrix(dense.random_spd(20)), draw(20))
    assert (path.outcome, path.steps) == (Outcome.STEP_LIMIT, 4)


@every_solver
def test_a_solve_without_a_selection_hands_over_no_pairs(build: SolverCase) -> None:
    assert build().solve(Matrix(dense.random_spd(20)), draw(20)).pairs == ()


@every_solver
@pytest.mark.parametrize("selection", [LastPairs(4), SpreadPairs(4), LastPairs(60)], ids=["last", "spread", "all"])
def test_pairs_are_products_with_the_operator(build: SolverCase, selection: PairSelection) -> None:
    A, b = dense.random_spd(20, seed=2, condition=1e4), draw(20)
    M = Diagonal(1.0 / A.diagonal())
    path = build(60, Residual(1e-8), pairs=selection).solve(Matrix(A), b, M=M)
    for pair in path.pairs:
        torch.testing.assert_close(pair.y, A @ pair.s, rtol=1e-10, atol=1e-10)
        assert pair.sy == pytest.approx(float(pair.s @ A @ pair.s))
    steps = [pair.step for pair in path.pairs]
    if selection.memory == 4:
        assert len(steps) == 4
    else:
        assert steps == list(range(1, path.steps + 1))


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_of_the_vectors_is_kept(build: SolverCase, dtype: torch.dtype) -> None:
    path = build(pairs=LastPairs(2)).solve(Matrix(dense.random_spd(9).to(dtype)), draw(9).to(dtype))
    assert {path.last.x.dtype, *(pair.s.dtype for pair in path.pairs)} == {dtype}


@every_solver
def test_misuse_is_explained(build: SolverCase) -> None:
    solver, A, skew = build(), Identity(2), Matrix(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    b = torch.ones(2)
    with pytest.raises(ValueError, match=r"A is not symmetric.*symmetrise A first"):
        solver.solve(skew, b)
    with pytest.raises(ValueError, match=r"M is not symmetric.*symmetrise M first"):
        solver.solve(A, b, M=skew)
    with pytest.raises(ValueError, match=r"b has shape \(3,\) and M size 2, A acts on \(2,\)"):
        solver.solve(A, torch.ones(3))
    with pytest.raises(ValueError, match=r"b has shape \(2,\) and M size 3, A acts on \(2,\)"):
        solver.solve(A, b, M=Identity(3))
    with pytest.raises(ValueError, match=r"x0 has shape \(3,\), b \(2,\): give both one size"):
        solver.solve(A, b, x0=torch.ones(3))
    with pytest.raises(ValueError, match="max_steps=0: at least one"):
        build(max_steps=0)
    with pytest.raises(ValueError, match=r"storage_ratio=1\.0: must be over 1"):
        build(storage_ratio=1.0)


@every_solver
def test_only_the_flexible_solver_takes_a_preconditioner_that_changes(build: SolverCase) -> None:
    A, b = Matrix(dense.random_spd(5)), draw(5)

    def changing(step: int, pairs: object) -> LinearOperator:
        return Identity(5)

    if isinstance(build(), FlexibleCG):
        assert build(stop=Residual(1e-9)).solve(A, b, M=changing).outcome is Outcome.CONVERGED
        return
    with pytest.raises(ValueError, match=r"needs one preconditioner throughout.*FlexibleCG"):
        build().solve(A, b, M=changing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_solver
def test_the_accelerator_agrees(build: SolverCase) -> None:
    A, b = dense.random_spd(20), draw(20)
    here = build(60, Residual(1e-10)).solve(Matrix(A), b)
    there = build(60, Residual(1e-10)).solve(Matrix(A.cuda()), b.cuda())
    assert there.last.x.is_cuda
    torch.testing.assert_close(there.last.x.cpu(), here.last.x, rtol=1e-8, atol=1e-9)
