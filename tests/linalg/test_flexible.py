from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from cases import draw
from quadric.linalg.krylov import ConjugateGradient, Conjugation, FlexibleCG, Notay, PolakRibiere
from quadric.linalg.lbfgs import LBFGSInverse
from quadric.linalg.operator import Diagonal, Identity, LinearOperator, Matrix
from quadric.linalg.pairs import LastPairs, Pair, SpreadPairs
from quadric.linalg.solver import Iterate, KrylovSolver
from quadric.linalg.truncation import Residual
from quadric.outcome import Outcome
from reference import dense

FORMS = [PolakRibiere(), Notay(1), Notay(4), Notay(4, restart=False), Notay(200)]
every_form = pytest.mark.parametrize("form", FORMS, ids=repr)


def points(solver: KrylovSolver, *args: object, **kwargs: object) -> list[Iterate]:
    return [p for p in solver.iterates(*args, **kwargs) if isinstance(p, Iterate)]


class Wandering:
    """A random positive definite diagonal for every step, and the z = M r it led to."""

    def __init__(self, n: int, seed: int, spread: float = 1.0) -> None:
        self.n, self.seed, self.spread, self.seen = n, seed, spread, []

    def __call__(self, step: int, pairs: tuple[Pair, ...]) -> LinearOperator:
        diagonal = torch.exp(self.spread * draw(self.n, seed=1000 * self.seed + step))
        outer = self

        class Seen(Diagonal):
            def apply(self, v: torch.Tensor) -> torch.Tensor:
                outer.seen.append(super().apply(v))
                return outer.seen[-1]

        return Seen(diagonal)


@every_form
@settings(max_examples=20)
@given(n=st.integers(1, 20), seed=st.integers(0, 999), preconditioned=st.booleans(), warm=st.booleans())
def test_with_a_fixed_preconditioner_it_is_conjugate_gradients(
    form: Conjugation, n: int, seed: int, preconditioned: bool, warm: bool
) -> None:
    A, b = dense.random_spd(n, seed=seed, condition=20.0), draw(n, seed=seed + 1)
    M = Diagonal(1.0 / A.diagonal()) if preconditioned else None
    x0 = draw(n, seed=5) if warm else None
    plain = points(ConjugateGradient(n, Residual(1e-4)), Matrix(A), b, x0=x0, M=M)
    flexible = points(FlexibleCG(n, Residual(1e-4), conjugation=form), Matrix(A), b, x0=x0, M=M)
    for p, q in zip(plain, flexible, strict=False):
        torch.testing.assert_close(q.x, p.x, rtol=1e-7, atol=1e-7)
    assert abs(len(plain) - len(flexible)) <= 1


@settings(max_examples=20)
@given(n=st.integers(1, 20), seed=st.integers(0, 999))
def test_polak_ribiere_is_one_direction_of_notay(n: int, seed: int) -> None:
    A, b = dense.random_spd(n, seed=seed, condition=20.0), draw(n, seed=seed + 1)
    runs = [
        points(FlexibleCG(12, Residual(1e-5), conjugation=form), Matrix(A), b, M=Wandering(n, seed))
        for form in (PolakRibiere(), Notay(1))
    ]
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(q.x, p.x, rtol=1e-8, atol=1e-9)


@settings(max_examples=30)
@given(n=st.integers(2, 15), seed=st.integers(0, 999), steps=st.integers(1, 8), warm=st.booleans())
def test_full_orthogonalisation_minimises_over_all_it_has_seen(n: int, seed: int, steps: int, warm: bool) -> None:
    A, b, wandering = dense.random_spd(n, seed=seed), draw(n, seed=seed + 1), Wandering(n, seed)
    x0 = draw(n, seed=5) if warm else torch.zeros(n, dtype=torch.float64)
    steps = min(steps, n)
    path = FlexibleCG(steps, Residual(1e-9), conjugation=Notay(n)).solve(Matrix(A), b, x0=x0, M=wandering)
    expected = dense.least_model(A, b, x0, torch.stack(wandering.seen, dim=1))
    torch.testing.assert_close(path.last.x, expected, rtol=1e-6, atol=1e-7)


@every_form
@settings(max_examples=20)
@given(seed=st.integers(0, 999), spread=st.floats(0.1, 2.0))
def test_the_model_value_falls_whatever_the_preconditioner_does(form: Conjugation, seed: int, spread: float) -> None:
    A, b = dense.random_spd(20, seed=seed), draw(20, seed=seed + 1)
    found = points(FlexibleCG(60, Residual(1e-8), conjugation=form), Matrix(A), b, M=Wandering(20, seed, spread))
    assert all(later.model <= earlier.model + 1e-12 for earlier, later in itertools.pairwise(found))


@every_form
def test_converges_under_a_preconditioner_that_changes(form: Conjugation) -> None:
    A, b = dense.random_spd(30), draw(30)
    path = FlexibleCG(400, Residual(1e-10), conjugation=form).solve(Matrix(A), b, M=Wandering(30, 1))
    assert path.outcome is Outcome.CONVERGED
    torch.testing.assert_close(path.last.x, dense.solve(A, b), rtol=1e-7, atol=1e-8)


def test_plain_conjugate_gradients_need_longer_when_the_preconditioner_changes_behind_their_back() -> None:
    class Restless(LinearOperator):
        symmetric = True

        def __init__(self) -> None:
            self.size, self.made = 40, Wandering(40, 2, spread=0.5)
            self.calls = 0

        def apply(self, v: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.made(self.calls, ()) @ v

    A, b = Matrix(dense.random_spd(40, condition=1e3)), draw(40)
    plain = ConjugateGradient(1000, Residual(1e-8)).solve(A, b, M=Restless())
    flexible = FlexibleCG(1000, Residual(1e-8), conjugation=Notay(20)).solve(A, b, M=Restless())
    assert flexible.outcome is Outcome.CONVERGED
    assert flexible.steps < 0.7 * plain.steps


def test_the_function_is_told_the_step_and_the_pairs_kept_so_far() -> None:
    told: list[tuple[int, list[int]]] = []

    def watching(step: int, pairs: tuple[Pair, ...]) -> LinearOperator:
        told.append((step, [pair.step for pair in pairs]))
        return Identity(20)

    A, b = Matrix(dense.random_spd(20)), draw(20)
    FlexibleCG(4, pairs=LastPairs(2)).solve(A, b, M=watching)
    assert told == [(0, []), (1, [1]), (2, [1, 2]), (3, [2, 3])]
    told.clear()
    FlexibleCG(3).solve(A, b, M=watching)
    assert told == [(0, []), (1, []), (2, [])]


@pytest.mark.parametrize("selection", [LastPairs(50), SpreadPairs(50)], ids=["last", "spread"])
@pytest.mark.parametrize("form", [Notay(4), Notay(50)], ids=["four", "all"])
def test_the_l_bfgs_preconditioner_may_grow_inside_the_run(form: Conjugation, selection: LastPairs) -> None:
    A, b = dense.random_spd(30, condition=1e3), draw(30)
    solver = FlexibleCG(200, Residual(1e-8), pairs=selection, conjugation=form)
    path = solver.solve(Matrix(A), b, M=lambda step, pairs: LBFGSInverse(pairs, 30))
    assert path.outcome is Outcome.CONVERGED
    torch.testing.assert_close(path.last.x, dense.solve(A, b), rtol=1e-5, atol=1e-6)
    assert len(path.pairs) == min(50, path.steps)


@pytest.mark.parametrize("diagonal", [[1.0, -1.0], [0.0, 0.0], [-1.0, -1.0]])
def test_an_indefinite_preconditioner_is_named(diagonal: list[float]) -> None:
    path = FlexibleCG().solve(Diagonal(torch.tensor([2.0, 1.0])), torch.ones(2), M=Diagonal(torch.tensor(diagonal)))
    assert (path.outcome, path.steps) == (Outcome.INDEFINITE_PRECONDITIONER, 0)


def test_one_that_becomes_indefinite_keeps_the_iterate_before_it() -> None:
    A, b = Matrix(dense.random_spd(10)), draw(10)
    path = FlexibleCG().solve(A, b, M=lambda step, pairs: (1.0 if step < 3 else -1.0) * Identity(10))
    assert (path.outcome, path.steps) == (Outcome.INDEFINITE_PRECONDITIONER, 3)
    path = FlexibleCG().solve(A, b, M=lambda step, pairs: (1.0 if step < 3 else math.nan) * Identity(10))
    assert (path.outcome, path.steps) == (Outcome.NON_FINITE, 3)


def test_negative_curvature_keeps_the_iterate_before_it() -> None:
    path = FlexibleCG(stop=Residual(1e-12)).solve(Diagonal(torch.tensor([4.0, 1.0, -1.0])), torch.tensor([4.0, 1, 0.1]))
    assert path.outcome is Outcome.NEGATIVE_CURVATURE
    assert path.steps >= 1 and path.last.model < 0


@pytest.mark.parametrize("make", cases.CONJUGATIONS.values(), ids=[cls.__name__ for cls in cases.CONJUGATIONS])
def test_the_depth_of_a_form_grows_by_one_at_most(make: type[Conjugation]) -> None:
    depths = [make().depth(i) for i in range(1, 30)]
    assert depths[0] == 1
    assert all(1 <= later <= earlier + 1 for earlier, later in itertools.pairwise(depths))


def test_misuse_is_explained() -> None:
    A, b = Matrix(dense.random_spd(2)), draw(2)
    skew = Matrix(torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"M is not symmetric.*symmetrise M first"):
        FlexibleCG().solve(A, b, M=lambda step, pairs: skew)
    with pytest.raises(ValueError, match=r"M has size 3, A acts on \(2,\): give both one size"):
        FlexibleCG().solve(A, b, M=lambda step, pairs: Identity(3))
    with pytest.raises(ValueError, match=r"M\(0, pairs\) returned None: it must return a LinearOperator"):
        FlexibleCG().solve(A, b, M=lambda step, pairs: None)
    with pytest.raises(ValueError, match=r"M=3\.0: give a LinearOperator, or a function \(step, pairs\)"):
        FlexibleCG().solve(A, b, M=3.0)
    with pytest.raises(ValueError, match="directions=0: at least one"):
        Notay(0)
