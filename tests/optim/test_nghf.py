"""Natural gradient, NGHF and L-BFGS preconditioning against direct solves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cases import draw, padded_classes
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Matrix
from quadric.linalg.pairs import LastPairs
from quadric.linalg.solver import Iterate, Path
from quadric.linalg.truncation import FixedIterations, Residual
from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Data, Objective
from quadric.optim.damping import AfterRejection, Fixed
from quadric.optim.descent import EVERY_ITERATE, NGHF, Descent, LocalModel, NaturalGradient, NewtonCG, scale_along
from quadric.optim.precondition import LBFGS
from quadric.optim.search import Backtracking, BestIterate
from quadric.optim.second_order import SecondOrder, natural_gradient, nghf
from quadric.outcome import Outcome
from reference import dense


def problem() -> tuple[nn.Sequential, Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    data = [(draw(4, 9, 3), padded_classes(9, 4, [9, 7, 8, 9]))]
    other = [(draw(2, 9, 3, seed=5), padded_classes(9, 4, [6, 9]))]
    return model, Objective(model, CrossEntropy(), data, other)


def exact(storage_ratio: float = 1.3) -> ConjugateGradient:
    return ConjugateGradient(500, Residual(1e-13), storage_ratio)


def damped(objective: Objective, theta: Tensor, kind: Curvature, share: float) -> Tensor:
    """With lambda as a share of the curvature along the gradient."""
    matrix, g = dense.matrix_of(objective.curvature(theta, kind)), objective.value_and_grad(theta)[1]
    damping = share * float(g @ matrix @ g / g.square().sum())
    return matrix + damping * torch.eye(len(theta), dtype=torch.float64)


def of_best_length(x: Tensor, g: Tensor, B: Tensor) -> Tensor:
    return x * float(-(g @ x) / (x @ B @ x))


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_nghf_is_two_solves_and_the_best_length(share: float) -> None:
    _, objective = problem()
    theta = objective.space.point()
    gradient = objective.value_and_grad(theta)[1]
    F, G = (damped(objective, theta, kind, share) for kind in (Curvature.EMPIRICAL_FISHER, Curvature.GAUSS_NEWTON))
    natural = dense.solve(F, -gradient)
    direction = dense.solve(G, natural)
    expected = of_best_length(direction, gradient, G)
    descent = NGHF(exact(), exact())
    local = LocalModel(
        theta, 0.0, gradient, objective.curvature(theta), objective.curvature(theta, Curvature.EMPIRICAL_FISHER)
    )
    path = descent.propose(local, damping=share, x0=draw(len(theta)))
    torch.testing.assert_close(path.last.x, expected, rtol=1e-8, atol=1e-10)
    for point in path.points:
        torch.testing.assert_close(point.x, of_best_length(point.x, gradient, G), rtol=1e-8, atol=1e-10)
        assert point.model == pytest.approx(float(gradient @ point.x + point.x @ G @ point.x / 2), rel=1e-8)
    with pytest.raises(ValueError, match=r"metric is None: natural gradient and NGHF need a Fisher matrix"):
        descent.propose(LocalModel(theta, 0.0, gradient, Matrix(G)), damping=0.1, x0=None)


def test_the_first_iterate_goes_along_the_natural_gradient() -> None:
    _, objective = problem()
    theta = objective.space.point()
    gradient, natural = objective.value_and_grad(theta)[1], draw(len(theta), seed=7)
    metric = Matrix(torch.eye(len(theta), dtype=torch.float64) + 0.3 * dense.random_spd(len(theta)))
    local = LocalModel(theta, 0.0, gradient, objective.curvature(theta), metric)
    path = NGHF(exact(), exact(EVERY_ITERATE)).propose(local, damping=0.0, x0=None)
    natural = dense.solve(metric.matrix, -gradient)
    cosine = torch.dot(path.points[0].x, natural) / path.points[0].x.norm() / natural.norm()
    assert float(cosine) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("metric", [Curvature.EMPIRICAL_FISHER, Curvature.FISHER, Curvature.GAUSS_NEWTON])
def test_natural_gradient_solves_with_its_metric(metric: Curvature) -> None:
    model, objective = problem()
    theta = objective.space.point()
    gradient = objective.value_and_grad(theta)[1]
    natural = dense.solve(damped(objective, theta, metric, 5.0), -gradient)
    expected = of_best_length(natural, gradient, dense.matrix_of(objective.curvature(theta)))
    optimiser = SecondOrder(
        model.parameters(), descent=NaturalGradient(exact(), metric), search=Backtracking(), damping=Fixed(5.0)
    )
    optimiser.step(objective)
    torch.testing.assert_close(objective.space.point() - theta, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("descent", [NaturalGradient(), NGHF()])
def test_a_preconditioner_is_told_the_lambda_that_a_share_comes_to(descent: Descent) -> None:
    _, objective = problem()
    theta = objective.space.point()
    g, F = objective.value_and_grad(theta)[1], objective.curvature(theta, Curvature.EMPIRICAL_FISHER)
    local = LocalModel(theta, 0.0, g, objective.curvature(theta), F)
    matrix = dense.matrix_of(F)
    assert descent.shift(local, 0.0) == 0.0
    assert descent.shift(local, 0.1) == pytest.approx(0.1 * float(g @ matrix @ g / (g @ g)))
    assert NewtonCG().shift(local, 0.1) == 0.1


def test_a_share_of_indefinite_curvature_is_a_length() -> None:
    A = Matrix(torch.diag(torch.tensor([3.0, -4.0], dtype=torch.float64)))
    assert scale_along(A, torch.tensor([2.0, 0.0], dtype=torch.float64)) == 3.0
    assert scale_along(A, torch.tensor([0.0, 2.0], dtype=torch.float64)) == 4.0


def test_both_runs_of_nghf_are_preconditioned_by_a_diagonal_and_the_first_alone_by_pairs() -> None:
    _, objective = problem()
    theta = objective.space.point()
    g, F = objective.value_and_grad(theta)[1], objective.curvature(theta, Curvature.EMPIRICAL_FISHER)
    local = LocalModel(theta, 0.0, g, objective.curvature(theta), F)
    M = Matrix(dense.random_spd(len(theta)))
    one = ConjugateGradient(1, FixedIterations(1), EVERY_ITERATE, LastPairs(3))
    for both in (True, False):
        path = NGHF(one, replace(one, pairs=None), preconditions=both).propose(local, damping=0.0, x0=None, M=M)
        natural = M @ g  # one preconditioned iteration goes along M g
        expected = M @ natural if both else natural
        cosine = torch.dot(path.last.x, -expected) / path.last.x.norm() / expected.norm()
        assert float(cosine) == pytest.approx(1.0, abs=1e-9)
        (pair,) = path.pairs
        torch.testing.assert_close(pair.y, F @ pair.s)


def test_nghf_rests_at_a_hundredth_and_natural_gradient_at_none() -> None:
    rules = {build: build(nn.Linear(2, 2).parameters()).rule for build in (nghf, natural_gradient)}
    assert rules == {nghf: AfterRejection(initial=0.01), natural_gradient: AfterRejection(initial=0.0)}


@pytest.mark.parametrize("build", [natural_gradient, nghf])
def test_a_number_is_no_damping_rule(build: Callable[..., SecondOrder]) -> None:
    with pytest.raises(ValueError, match=r"damping=0\.1: give a rule, such as .*Fixed\(0\.1\)"):
        build(nn.Linear(2, 2).parameters(), damping=0.1)


@pytest.mark.parametrize("build", [natural_gradient, nghf])
def test_the_iterate_is_chosen_on_the_curvatures_data(build: Callable[..., SecondOrder]) -> None:
    model, objective = problem()
    theta = objective.space.point()
    optimiser = build(model.parameters(), iterations=6, damping=Fixed(1.0))
    optimiser.step(objective)
    found = optimiser.diagnosis
    assert found is not None and found.outcome is Outcome.ACCEPTED
    assert found.value == objective.value(theta) and found.old_value == objective.value(theta, Data.CURVATURE)
    assert found.new_value == objective.value(objective.space.point(), Data.CURVATURE) < found.old_value
    assert found.solver_steps == 6 and found.evaluations == 6
    # Of the runs; two of the dampings or of the damping and the length; and one of the ratio.
    assert found.products == (15 if build is nghf else 9)


@pytest.mark.parametrize(
    ("points", "chosen"), [((1.0, 2.5, 5.0), 1), ((2.0, 3.0, math.inf), 1), ((7.0, 8.0), None), ((0.0,), None)]
)
def test_the_best_iterate_or_none(points: tuple[float, ...], chosen: int | None) -> None:
    def value(theta: Tensor) -> float:
        return (float(theta) - 3.0) ** 2

    zero = torch.zeros(1, dtype=torch.float64)
    local = LocalModel(zero, 9.0, zero - 6.0, Matrix(torch.eye(1, dtype=torch.float64)))
    first = 0 if points == (0.0,) else 1
    iterates = [Iterate(first + i, torch.tensor([x], dtype=torch.float64), -1.0, 1.0) for i, x in enumerate(points)]
    step = BestIterate(attempts=0).select(local, Path(tuple(iterates), Outcome.STEP_LIMIT), value)
    assert (None if step is None else step.point) == chosen


def test_where_no_iterate_is_better_the_best_is_shortened() -> None:
    def value(theta: Tensor) -> float:
        return (float(theta) - 3.0) ** 2

    zero = torch.zeros(1, dtype=torch.float64)
    local = LocalModel(zero, 9.0, zero - 6.0, Matrix(torch.eye(1, dtype=torch.float64)))
    points = [Iterate(1 + i, torch.tensor([x], dtype=torch.float64), -1.0, 1.0) for i, x in enumerate((40.0, 20.0))]
    path = Path(tuple(points), Outcome.STEP_LIMIT)
    step = BestIterate(attempts=2).select(local, path, value)
    assert step is not None and (step.point, step.scale, step.direction.item(), step.value) == (1, 0.25, 5.0, 4.0)
    assert BestIterate(attempts=1).select(local, path, value) is None


def test_damping_comes_after_a_failure_and_goes() -> None:
    rule = AfterRejection(start=0.01, boost=4.0, drop=0.5)
    values = [rule.initial]
    for ratio in (1.0, math.nan, -math.inf, 0.1, 0.9, 1.0, 0.2):
        values.append(rule.update(values[-1], ratio))
    assert values == pytest.approx([0.0, 0.0, 0.01, 0.04, 0.02, 0.01, 0.0, 0.0])
    assert rule.update(0.0, 0.9, whole=False) == 0.01 and rule.update(0.01, 0.9, whole=False) == 0.04
    assert [rule.update(value, 0.9, whole=False) for value in (0.05, 0.1, 5.0)] == [0.2, 0.32, 5.0]
    assert [rule.update(value, math.nan) for value in (0.05, 0.1, 5.0)] == [0.2, 0.4, 20.0]
    resting, values = AfterRejection(start=0.01, boost=4.0, drop=0.5, initial=0.015), []
    for ratio in (1.0, math.nan, 0.1, 0.9):
        values.append(resting.update(values[-1] if values else resting.initial, ratio))
    assert values == pytest.approx([0.015, 0.06, 0.03, 0.015])
    for misuse, message in (
        ({"start": 0.0}, r"start=0\.0"),
        ({"most": 0.001}, r"most=0\.001"),
        ({"initial": -1.0}, r"initial=-1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            AfterRejection(**misuse)


def test_a_step_that_is_refused_on_the_same_data_is_not_repeated_for_ever() -> None:
    model, both = problem()
    objective = Objective(model, CrossEntropy(), both._gradient)
    optimiser = nghf(model.parameters(), iterations=8)
    for _ in range(60):
        optimiser.step(objective)
    assert objective.value(objective.space.point()) < 0.25


def test_pairs_of_the_previous_solve_make_the_next_one_shorter() -> None:
    """On the same quadratic model; the first step is not preconditioned."""
    steps = {}
    for preconditioner in (None, LBFGS(LastPairs(40))):
        torch.manual_seed(0)
        model = nn.Linear(40, 1).double()
        x = draw(300, 40) * torch.logspace(-2, 0, 40, dtype=torch.float64)
        objective = Objective(model, SquaredError(), [(x, draw(300, 1, seed=1))])
        pairs = None if preconditioner is None else preconditioner.pairs
        solver = ConjugateGradient(400, Residual(1e-6), pairs=pairs)
        optimiser = SecondOrder(
            model.parameters(),
            descent=NewtonCG(solver, momentum=0.0),
            search=Backtracking(),
            damping=Fixed(1e-6),
            preconditioner=preconditioner,
        )
        found = []
        for _ in range(2):
            optimiser.step(objective)
            assert optimiser.diagnosis is not None
            found.append(optimiser.diagnosis.solver_steps)
        steps[preconditioner is not None] = found
    assert steps[True][0] == steps[False][0]
    assert steps[True][1] < 0.5 * steps[False][1], steps
