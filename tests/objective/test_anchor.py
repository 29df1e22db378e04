"""An anchored objective against the same sum written out, differentiated by torch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from cases import MicroBatch, draw, padded_classes
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.truncation import Residual
from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.objective.anchor import Anchor
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Data, Objective
from quadric.optim.damping import Fixed
from quadric.optim.descent import NewtonCG
from quadric.optim.search import Backtracking
from quadric.optim.second_order import SecondOrder, hessian_free, natural_gradient, nghf
from quadric.space import ParameterSpace
from reference import dense

WEIGHT = 0.37


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batches() -> list[MicroBatch]:
    return [(draw(2, 5, 3, seed=s), padded_classes(5, 4, [5 - s, 4])) for s in range(3)]


def place(model: nn.Module, seed: int = 8) -> Tensor:
    return draw(ParameterSpace(model).size, seed=seed)


def anchored(model: nn.Module, weight: float = WEIGHT, **options: object) -> Objective:
    anchor = Anchor(place(model), weight)
    return Objective(model, CrossEntropy(), batches(), batches()[:1], anchor=anchor, **options)  # type: ignore[arg-type]


def twin(model: nn.Module, data: list[MicroBatch], theta: Tensor, at: Tensor | None = None) -> Tensor:
    at = place(model) if at is None else at
    return dense.mean_loss(model, CrossEntropy(), data, theta) + WEIGHT / 2 * (theta - at).square().sum()


def test_value_and_gradient_are_those_of_the_sum() -> None:
    model = net()
    objective, theta = anchored(model), place(model, seed=1).requires_grad_()
    expected = twin(model, batches(), theta)
    (gradient,) = torch.autograd.grad(expected, theta)
    value, found = objective.value_and_grad(theta.detach())
    assert value == objective.value(theta.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13)
    small = objective.value(theta.detach(), Data.CURVATURE)
    assert small == pytest.approx(float(twin(model, batches()[:1], theta.detach())), rel=1e-13)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_gradient_is_the_slope_of_the_value(autocast: torch.dtype | None) -> None:
    """Along a line, by finite differences; in low precision of a weight beside which the loss hardly counts."""
    model = net()
    objective = anchored(model, 0.5 if autocast is None else 1e6, autocast=autocast)
    theta, v = place(model, seed=1), place(model, seed=2)
    slope = (objective.value(theta + 1e-5 * v) - objective.value(theta - 1e-5 * v)) / 2e-5
    assert slope == pytest.approx(float(objective.value_and_grad(theta)[1] @ v), rel=1e-6)


def test_the_closure_gives_the_same_and_every_parameter_a_gradient() -> None:
    model = net()
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    objective = anchored(model)
    value, gradient = objective.value_and_grad(objective.space.point())
    for _ in range(2):
        assert float(objective()) == pytest.approx(value, rel=1e-13)
        left = objective.space.flatten(p.grad for p in objective.space.parameters if p.grad is not None)
        torch.testing.assert_close(left, gradient, rtol=1e-11, atol=1e-14)
    expected = WEIGHT * (1.0 - objective.space.views(place(model))["idle"])
    torch.testing.assert_close(model.idle.grad, expected)
    assert model[0].bias.grad is None


@pytest.mark.parametrize("kind", [Curvature.GAUSS_NEWTON, Curvature.HESSIAN])
@pytest.mark.parametrize("memory", [None, 0])
def test_curvature_is_that_of_the_sum(kind: Curvature, memory: int | None) -> None:
    model, data = net(), batches()[:1]
    theta = place(model, seed=1)
    found = dense.matrix_of(anchored(model, memory=memory).curvature(theta, kind))
    if kind is Curvature.HESSIAN:
        at = place(model)
        expected = torch.func.hessian(lambda t: twin(model, data, t, at))(theta)
    else:
        held = WEIGHT * torch.eye(len(theta), dtype=theta.dtype)
        expected = dense.gauss_newton(model, CrossEntropy(), data, theta) + held
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_every_curvature_gains_the_precision_of_the_prior() -> None:
    """Of all kinds from one record, and along tiny directions too."""
    model = net()
    with_anchor, without = anchored(model), Objective(model, CrossEntropy(), batches(), batches()[:1])
    theta, v = place(model, seed=1), place(model, seed=2)
    kinds = list(Curvature)
    for held, free in zip(with_anchor.curvatures(theta, kinds), without.curvatures(theta, kinds), strict=True):
        for size in (1.0, 1e-8):
            torch.testing.assert_close(held @ (size * v), free @ (size * v) + WEIGHT * size * v, rtol=1e-11, atol=0)
        assert held.symmetric
    diagonals = [o.fisher_diagonal(theta, draws=3) for o in (with_anchor, without)]
    torch.testing.assert_close(diagonals[0], diagonals[1] + WEIGHT, rtol=1e-12, atol=0)


def test_the_split_into_micro_batches_and_their_weight_change_nothing() -> None:
    """The anchor is beside the mean, once."""
    model = net()
    theta, anchor = place(model, seed=1), Anchor(place(model), WEIGHT)
    x, y = draw(6, 5, 3), padded_classes(5, 4, [5, 4, 3, 2, 1, 5])
    whole, parts, twice = (
        Objective(model, CrossEntropy(), data, anchor=anchor)
        for data in ([(x, y)], list(zip(x.split(2), y.split(2), strict=True)), [(x, y), (x, y)])
    )
    for other in (parts, twice):
        assert other.value(theta) == pytest.approx(whole.value(theta), rel=1e-13)
        torch.testing.assert_close(other.value_and_grad(theta)[1], whole.value_and_grad(theta)[1], rtol=1e-11, atol=0)
        torch.testing.assert_close(
            other.curvature(theta) @ theta, whole.curvature(theta) @ theta, rtol=1e-11, atol=1e-13
        )


def test_noise_is_that_of_the_loss_beside_the_whole_gradient() -> None:
    model = net()
    theta = place(model, seed=1)
    held, free = anchored(model), Objective(model, CrossEntropy(), batches())
    (_, whole), (_, part) = held.value_and_grad(theta), free.value_and_grad(theta)
    assert held.gradient_noise * float(whole.norm()) == pytest.approx(free.gradient_noise * float(part.norm()))
    assert 0 < held.gradient_noise != pytest.approx(free.gradient_noise)


def test_at_a_point_without_a_slope_the_noise_is_not_known() -> None:
    """The anchor's pull and the loss's are opposite, to the bit."""
    model = nn.Linear(1, 1, bias=False).double()
    data = [(torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), y, dtype=torch.float64)) for y in (1.0, 3.0)]
    objective = Objective(model, SquaredError(), data, anchor=Anchor(torch.tensor([-2.0], dtype=torch.float64), 1.0))
    _, gradient = objective.value_and_grad(torch.zeros(1, dtype=torch.float64))
    assert not gradient.any() and math.isnan(objective.gradient_noise)


def test_second_order_steps_come_to_the_ridge_solution() -> None:
    """Linear least squares with an anchor, by its normal equations."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    x, y, at = draw(9, 4), draw(9, 1, seed=1), draw(4, seed=2)
    expected = dense.solve(x.T @ x / 9 + WEIGHT * torch.eye(4, dtype=torch.float64), (x.T @ y)[:, 0] / 9 + WEIGHT * at)
    objective = Objective(model, SquaredError(), [(x, y)], anchor=Anchor(at, WEIGHT))
    solver = NewtonCG(ConjugateGradient(50, Residual(1e-14)), 0.0)
    optimizer = SecondOrder(model.parameters(), descent=solver, search=Backtracking(), damping=Fixed(0.0))
    optimizer.step(objective)
    torch.testing.assert_close(model.weight.detach()[0], expected, rtol=1e-10, atol=1e-12)
    assert optimizer.diagnosis is not None and optimizer.diagnosis.ratio == pytest.approx(1.0)
    first_order = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=60, tolerance_grad=1e-12, tolerance_change=0.0)
    with torch.no_grad():
        model.weight.zero_()
    first_order.step(objective)
    torch.testing.assert_close(model.weight.detach()[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("build", [hessian_free, natural_gradient, nghf])
def test_a_heavy_anchor_holds(build: object) -> None:
    """Whatever the method, and further from the anchor than it started is none."""
    distances = []
    for weight in (0.0, 0.1, 100.0):
        model = net()
        start = ParameterSpace(model).point()
        objective = Objective(model, CrossEntropy(), batches(), anchor=Anchor(start, weight))
        optimizer = build(model.parameters())  # type: ignore[operator]
        values = [float(optimizer.step(objective)) for _ in range(6)]
        assert values[-1] < values[0]
        distances.append(float((objective.space.point() - start).norm()))
    assert distances[0] > distances[1] > 20 * distances[2] > 0


def test_misuse_is_explained() -> None:
    at = torch.zeros(3)
    for weight in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^weight={weight}: must be finite and not negative"):
            Anchor(at, weight)
    with pytest.raises(ValueError, match=r"^at has shape \(1, 3\): give a finite vector, such as ParameterSpace"):
        Anchor(at[None], 1.0)
    with pytest.raises(ValueError, match=r"^at has shape \(3,\): give a finite vector"):
        Anchor(at / 0, 1.0)
    model, size = net(), ParameterSpace(net()).size
    for wrong in (at.double(), torch.zeros(size)):
        own, theirs = rf"\({len(wrong)}, {re.escape(str(wrong.dtype))}, cpu\)", rf"\({size}, torch\.float64, cpu\)"
        with pytest.raises(ValueError, match=rf"^anchor: at is {own} .* parameters are {theirs}: give ParameterSpace"):
            Objective(model, CrossEntropy(), batches(), anchor=Anchor(wrong, 1.0))
