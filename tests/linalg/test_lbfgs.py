from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import curvature_pairs, draw
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.lbfgs import LBFGSInverse
from quadric.linalg.operator import Diagonal, Identity, Matrix
from quadric.linalg.pairs import LastPairs, Pair, SpreadPairs
from quadric.linalg.truncation import Residual
from quadric.outcome import Outcome
from reference import dense

settings_of_pairs = {
    "n": st.integers(1, 12),
    "count": st.integers(0, 15),
    "seed": st.integers(0, 999),
    "given_start": st.booleans(),
}


def both(n: int, count: int, seed: int, given_start: bool) -> tuple[LBFGSInverse, torch.Tensor, list[Pair]]:
    """The operator, its dense twin and its pairs."""
    pairs = curvature_pairs(dense.random_spd(n, seed=seed), count, seed=seed + 1)
    start = torch.eye(n, dtype=torch.float64)
    if given_start:
        start = dense.random_spd(n, seed=seed + 2)
    elif pairs:
        start = start * (pairs[-1].s @ pairs[-1].y) / (pairs[-1].y @ pairs[-1].y)
    operator = LBFGSInverse(pairs, n, H0=Matrix(start) if given_start else None)
    return operator, dense.bfgs_inverse(start, [(p.s, p.y) for p in pairs]), pairs


@settings(max_examples=60)
@given(**settings_of_pairs)
def test_equals_the_dense_update(n: int, count: int, seed: int, given_start: bool) -> None:
    operator, H, pairs = both(n, count, seed, given_start)
    assert (operator.skipped, len(operator.pairs)) == (0, len(pairs))
    found = dense.matrix_of(operator)
    torch.testing.assert_close(found, H, rtol=1e-7, atol=1e-7 * float(H.abs().max()))
    assert float(torch.linalg.eigvalsh(0.5 * (found + found.T))[0]) > 0


@settings(max_examples=60)
@given(**settings_of_pairs)
def test_satisfies_the_secant_equation_of_the_newest_pair(n: int, count: int, seed: int, given_start: bool) -> None:
    operator, _, pairs = both(n, count, seed, given_start)
    if pairs:
        torch.testing.assert_close(operator @ pairs[-1].y, pairs[-1].s, rtol=1e-7, atol=1e-8)


def test_conjugate_pairs_are_all_kept_and_a_whole_run_gives_the_inverse() -> None:
    A, b = dense.random_spd(8, condition=20.0), draw(8)
    path = ConjugateGradient(8, Residual(0.0), pairs=LastPairs(8)).solve(Matrix(A), b)
    operator = LBFGSInverse(path.pairs, 8)
    for pair in path.pairs:
        torch.testing.assert_close(operator @ pair.y, pair.s, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(dense.matrix_of(operator), torch.linalg.inv(A), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", [LastPairs(12), SpreadPairs(12)], ids=["last", "spread"])
def test_pairs_of_one_run_speed_up_the_next(selection: LastPairs) -> None:
    """The use of papers: a few large eigenvalues, another right-hand side."""
    values = torch.cat([torch.ones(50), torch.logspace(2, 5, 10)]).double()
    basis, _ = torch.linalg.qr(draw(60, 60))
    A = (basis * values) @ basis.T
    A, solver = Matrix(0.5 * (A + A.T)), ConjugateGradient(400, Residual(1e-6), pairs=selection)
    first = solver.solve(A, draw(60, seed=1))
    plain, helped = (solver.solve(A, draw(60, seed=2), M=M) for M in (None, LBFGSInverse(first.pairs, 60)))
    assert helped.outcome is plain.outcome is Outcome.CONVERGED
    assert helped.steps < plain.steps


def test_the_scale_of_a_pair_changes_nothing() -> None:
    pairs = curvature_pairs(dense.random_spd(6), 3)
    scaled = [Pair(p.step, c * p.s, c * p.y) for p, c in zip(pairs, (1e-6, -3.0, 1e5), strict=True)]
    torch.testing.assert_close(LBFGSInverse(scaled, 6) @ draw(6), LBFGSInverse(pairs, 6) @ draw(6))


@pytest.mark.parametrize(
    "bad",
    [
        Pair(9, torch.ones(4).double(), -torch.ones(4).double()),
        Pair(9, torch.ones(4).double(), torch.tensor([1.0, -1.0, 1.0, -1.0]).double()),
        Pair(9, torch.ones(4).double(), torch.full((4,), math.nan).double()),
        Pair(9, torch.ones(4).double(), torch.full((4,), math.inf).double()),
        Pair(9, torch.zeros(4).double(), torch.zeros(4).double()),
    ],
    ids=["negative", "orthogonal", "nan", "inf", "zero"],
)
def test_a_pair_without_curvature_is_skipped(bad: Pair) -> None:
    good = curvature_pairs(dense.random_spd(4), 3)
    operator = LBFGSInverse([good[0], bad, *good[1:], bad], 4)
    assert (operator.skipped, operator.pairs) == (2, tuple(good))
    assert torch.equal(operator @ draw(4), LBFGSInverse(good, 4) @ draw(4))
    nothing = LBFGSInverse([bad], 4)
    assert (nothing.skipped, nothing.scaling) == (1, 1.0)
    assert torch.equal(nothing @ draw(4), draw(4))


def test_the_least_cosine_is_the_callers() -> None:
    pair = Pair(1, torch.tensor([1.0, 0.0]), torch.tensor([0.1, 1.0]))
    assert LBFGSInverse([pair], 2).skipped == 0
    assert LBFGSInverse([pair], 2, epsilon=0.2).skipped == 1


def test_neither_the_pairs_nor_the_start_are_written_to() -> None:
    class Reusing(Diagonal):
        def apply(self, v: torch.Tensor) -> torch.Tensor:
            return self.diagonal

    pairs, start = curvature_pairs(dense.random_spd(4), 3), torch.ones(4, dtype=torch.float64)
    before = [p.s.clone() for p in pairs] + [p.y.clone() for p in pairs]
    LBFGSInverse(pairs, 4, H0=Reusing(start)) @ draw(4)
    assert all(torch.equal(a, b) for a, b in zip(before, [p.s for p in pairs] + [p.y for p in pairs], strict=True))
    assert torch.equal(start, torch.ones(4, dtype=torch.float64))


def test_misuse_is_explained() -> None:
    pairs = curvature_pairs(dense.random_spd(3), 2)
    with pytest.raises(ValueError, match=r"pairs: the one of step 1 has shapes \(3,\) and \(3,\).*acts on \(4,\)"):
        LBFGSInverse(pairs, 4)
    with pytest.raises(ValueError, match=r"H0 has size 4, symmetric=True: give a symmetric one of size 3"):
        LBFGSInverse(pairs, 3, H0=Identity(4))
    with pytest.raises(ValueError, match=r"epsilon=0\.0: must be positive"):
        LBFGSInverse(pairs, 3, epsilon=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_accelerator_agrees() -> None:
    pairs = curvature_pairs(dense.random_spd(6), 4)
    there = LBFGSInverse([Pair(p.step, p.s.cuda(), p.y.cuda()) for p in pairs], 6)
    torch.testing.assert_close((there @ draw(6).cuda()).cpu(), LBFGSInverse(pairs, 6) @ draw(6))
