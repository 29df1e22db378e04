from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cases import draw
from quadric.linalg.krylov import MinRes
from quadric.linalg.operator import Diagonal, Identity, Matrix
from quadric.linalg.pairs import LastPairs
from quadric.linalg.solver import Iterate
from quadric.linalg.truncation import FixedIterations, Residual
from quadric.outcome import Outcome
from reference import dense


def random_symmetric(n: int, seed: int) -> torch.Tensor:
    """Eigenvalues of both signs."""
    A = draw(n, n, seed=seed)
    return A + A.T


@settings(max_examples=60)
@given(
    n=st.integers(2, 15),
    seed=st.integers(0, 999),
    steps=st.integers(1, 6),
    preconditioned=st.booleans(),
    warm=st.booleans(),
)
def test_the_residual_is_the_least_over_the_krylov_space(
    n: int, seed: int, steps: int, preconditioned: bool, warm: bool
) -> None:
    A, b, steps = random_symmetric(n, seed), draw(n, seed=seed + 1), min(n - 1, steps)
    M = dense.random_spd(n, seed=seed + 2, condition=10.0) if preconditioned else torch.eye(n, dtype=torch.float64)
    x0 = draw(n, seed=5) if warm else torch.zeros(n, dtype=torch.float64)
    basis = dense.krylov_basis(A, b - A @ x0, M, steps)
    ritz = torch.linalg.eigvalsh(basis.T @ A @ basis)
    assume(float(ritz.abs().min()) > 1e-6)
    path = MinRes(steps, Residual(1e-13)).solve(Matrix(A), b, x0=x0, M=Matrix(M))
    assume(path.steps == steps)
    torch.testing.assert_close(path.last.x, dense.least_residual(A, b, x0, basis, M), rtol=1e-6, atol=1e-7)
    assert path.last.residual == pytest.approx(float((b - A @ path.last.x).norm()), rel=1e-6, abs=1e-9)
    assert path.last.model == pytest.approx(float(0.5 * path.last.x @ A @ path.last.x - b @ path.last.x), abs=1e-8)


@settings(max_examples=60)
@given(n=st.integers(1, 12), seed=st.integers(0, 999), shift=st.floats(0, 8), preconditioned=st.booleans())
def test_indefinite_is_reported_exactly_when_the_krylov_space_shows_it(
    n: int, seed: int, shift: float, preconditioned: bool
) -> None:
    A = random_symmetric(n, seed) + shift * torch.eye(n, dtype=torch.float64)
    b, steps = draw(n, seed=seed + 1), max(1, n // 2)
    M = dense.random_spd(n, seed=seed + 2, condition=10.0) if preconditioned else torch.eye(n, dtype=torch.float64)
    path = MinRes(steps, FixedIterations(steps)).solve(Matrix(A), b, M=Matrix(M))
    assume(path.steps == steps)
    basis = dense.krylov_basis(A, b, M, steps)
    lowest = float(torch.linalg.eigvalsh(basis.T @ A @ basis)[0])
    assume(abs(lowest) > 1e-8)
    assert path.met is (Outcome.INDEFINITE if lowest < 0 else None)


@settings(max_examples=40)
@given(n=st.integers(1, 20), seed=st.integers(0, 999), warm=st.booleans())
def test_an_indefinite_system_is_solved(n: int, seed: int, warm: bool) -> None:
    A, b = random_symmetric(n, seed), draw(n, seed=seed + 1)
    assume(float(torch.linalg.cond(A)) < 1e3)
    path = MinRes(500, Residual(1e-10)).solve(Matrix(A), b, x0=draw(n, seed=5) if warm else None)
    assert path.outcome is Outcome.CONVERGED
    torch.testing.assert_close(path.last.x, dense.solve(A, b), rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(n=st.integers(2, 25), seed=st.integers(0, 999), definite=st.booleans())
def test_the_residual_never_rises_and_on_definite_systems_neither_does_the_model(
    n: int, seed: int, definite: bool
) -> None:
    A = dense.random_spd(n, seed=seed) if definite else random_symmetric(n, seed)
    points = [p for p in MinRes(n).iterates(Matrix(A), draw(n)) if isinstance(p, Iterate)]
    for earlier, later in itertools.pairwise(points):
        assert later.residual <= earlier.residual * (1 + 1e-10)
        assert not definite or later.model <= earlier.model + 1e-10


@settings(max_examples=30)
@given(n=st.integers(2, 20), seed=st.integers(0, 999), preconditioned=st.booleans(), warm=st.booleans())
def test_equals_scipy(n: int, seed: int, preconditioned: bool, warm: bool) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    A, b, steps = random_symmetric(n, seed), draw(n, seed=seed + 1), max(1, n // 2)
    M = dense.random_spd(n, seed=seed + 2, condition=10.0) if preconditioned else torch.eye(n, dtype=torch.float64)
    x0 = draw(n, seed=5) if warm else torch.zeros(n, dtype=torch.float64)
    path = MinRes(steps, FixedIterations(steps)).solve(Matrix(A), b, x0=x0, M=Matrix(M))
    theirs, _ = linalg.minres(A.numpy(), b.numpy(), x0=x0.numpy(), M=M.numpy(), maxiter=steps, rtol=1e-15)
    torch.testing.assert_close(path.last.x, torch.from_numpy(theirs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_ends_at_a_least_residual(dtype: torch.dtype) -> None:
    A = torch.diag(torch.tensor([3.0, -2.0, 1.0, 0.0], dtype=dtype))
    b = torch.ones(4, dtype=dtype)
    path = MinRes(stop=Residual(1e-7)).solve(Matrix(A), b)
    assert path.outcome is Outcome.EXHAUSTED
    assert path.last.residual == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(A @ path.last.x, torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=dtype), rtol=0, atol=1e-5)


def test_a_consistent_singular_system_converges() -> None:
    A, b = Diagonal(torch.tensor([3.0, -2.0, 0.0])), torch.tensor([1.0, 1.0, 0.0])
    path = MinRes().solve(A, b)
    assert (path.outcome, path.steps, path.met) == (Outcome.CONVERGED, 2, Outcome.INDEFINITE)
    torch.testing.assert_close(path.last.x, torch.tensor([1 / 3, -1 / 2, 0.0]))


def test_a_zero_operator_is_exhausted_at_once() -> None:
    path = MinRes().solve(0.0 * Identity(3), torch.ones(3))
    assert (path.outcome, path.steps, path.met) == (Outcome.EXHAUSTED, 0, Outcome.INDEFINITE)


@pytest.mark.parametrize("tolerance", [0.0, 1e-30])
def test_a_rule_that_is_never_reached_ends_with_the_krylov_space(tolerance: float) -> None:
    A = torch.diag(torch.tensor([1.0, 7.0, -5.0] * 10, dtype=torch.float64))
    path = MinRes(stop=Residual(tolerance)).solve(Matrix(A), draw(30))
    assert path.outcome in (Outcome.EXHAUSTED, Outcome.CONVERGED)
    assert path.steps <= 4 and path.last.residual < 1e-12


def test_an_indefinite_preconditioner_is_named() -> None:
    A, b = Matrix(random_symmetric(6, 1)), torch.ones(6)
    signs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.5])
    path = MinRes().solve(A, b.double(), M=Diagonal(signs.double()))
    assert path.outcome is Outcome.INDEFINITE_PRECONDITIONER
    assert path.last.x.isfinite().all()
    assert MinRes().solve(A, b.double(), M=-1.0 * Identity(6)).outcome is Outcome.INDEFINITE_PRECONDITIONER
    assert MinRes().solve(A, b.double(), M=0.0 * Identity(6)).outcome is Outcome.INDEFINITE_PRECONDITIONER
    assert MinRes().solve(A, b.double(), M=math.nan * Identity(6)).outcome is Outcome.NON_FINITE


def test_pairs_are_lanczos_vectors() -> None:
    A = random_symmetric(10, 3)
    path = MinRes(6, pairs=LastPairs(6)).solve(Matrix(A), draw(10))
    V = torch.stack([pair.s for pair in path.pairs])
    torch.testing.assert_close(V @ V.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-8)
    assert min(pair.sy for pair in path.pairs) < 0 < max(pair.sy for pair in path.pairs)
