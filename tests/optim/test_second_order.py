"""The shell and Hessian-free steps, against direct solves and under failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from cases import draw, padded_classes
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Shifted
from quadric.linalg.solver import Path
from quadric.linalg.truncation import Residual
from quadric.loss.loss import CrossEntropy, Loss, SquaredError
from quadric.objective.objective import Objective
from quadric.optim.damping import Damping, Fixed, LevenbergMarquardt
from quadric.optim.descent import LocalModel, NewtonCG
from quadric.optim.search import Backtracking, Search, Step, Value
from quadric.optim.second_order import Diagnosis, SecondOrder, hessian_free
from quadric.outcome import Outcome
from quadric.space import ParameterSpace
from reference import dense

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


def newton(model: nn.Module, damping: Damping) -> SecondOrder:
    """Solves to the end and starts every solve afresh."""
    descent = NewtonCG(ConjugateGradient(300, Residual(1e-14)), momentum=0.0)
    return SecondOrder(model.parameters(), descent=descent, search=Backtracking(), damping=damping)


def point(model: nn.Module) -> Tensor:
    return ParameterSpace(model).point()


def seen(optimiser: SecondOrder) -> Diagnosis:
    assert optimiser.diagnosis is not None
    return optimiser.diagnosis


class PerOutput(Loss):
    """A loss from f and f'' of each output, for functions whose steps are known."""

    def __init__(self, f: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.second = f, second

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.f(output).sum()

    def weight(self, target: Tensor) -> Tensor:
        return torch.tensor(target.numel())

    def curvature(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: self.second(output) * v


def number(start: float, loss: Loss) -> tuple[nn.Module, Objective]:
    """A model whose one parameter is its output."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, start)
    one = torch.ones(1, 1, dtype=torch.float64)
    return model, Objective(model, loss, [(one, one)])


@pytest.mark.parametrize("damping", [0.03, 1.0, 50.0])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_one_step_on_a_quadratic_is_the_damped_newton_step(damping: float, device: str) -> None:
    model, data = nn.Linear(4, 2).double().to(device), [(draw(30, 4), draw(30, 2, seed=1))]
    objective = Objective(model, SquaredError(), data)
    theta = point(model)
    _, gradient = objective.value_and_grad(theta)
    B = dense.gauss_newton(model.cpu(), SquaredError(), data, theta.cpu())
    model.to(device)
    expected = theta.cpu() - dense.solve(B + damping * torch.eye(len(theta), dtype=torch.float64), gradient.cpu())
    optimiser = newton(model, Fixed(damping))
    optimiser.step(objective)
    torch.testing.assert_close(point(model).cpu(), expected, rtol=1e-9, atol=1e-11)
    assert seen(optimiser).outcome is Outcome.ACCEPTED
    assert seen(optimiser).solver is Outcome.CONVERGED


def test_one_step_with_little_damping_reaches_least_squares() -> None:
    model = nn.Linear(4, 2).double()
    x, y = draw(30, 4), draw(30, 2, seed=1)
    optimiser = newton(model, Fixed(1e-10))
    optimiser.step(Objective(model, SquaredError(), [(x[:11], y[:11]), (x[11:], y[11:])]))
    design = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1).T, solution, rtol=1e-7, atol=1e-8)
    assert seen(optimiser).ratio == pytest.approx(1.0, rel=1e-9)


def test_the_diagnosis_tells_what_happened() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    objective = Objective(model, CrossEntropy(), [(draw(4, 5, 3), padded_classes(5, 4, [5, 4, 3, 5]))])
    optimiser, before = hessian_free(model.parameters(), damping=0.5), point(model)
    returned = optimiser.step(objective)
    found = seen(optimiser)
    assert float(returned) == found.value == objective.value(before)
    assert found.new_value == objective.value(point(model)) < found.value
    assert found.step_norm == pytest.approx(float((point(model) - before).norm()), rel=1e-9)
    assert found.gradient_norm == pytest.approx(float(objective.value_and_grad(before)[1].norm()), rel=1e-12)
    assert (found.damping, optimiser.param_groups[0]["damping"]) == (0.5, LevenbergMarquardt().update(0.5, found.ratio))
    d = point(model) - before
    B = dense.matrix_of(objective.curvature(before))
    predicted = objective.value_and_grad(before)[1] @ d + 0.5 * d @ B @ d
    assert found.ratio == pytest.approx(float((found.new_value - found.value) / predicted), rel=1e-6)
    assert found.solver_steps > 0 and found.evaluations >= 2
    assert found.record()["outcome"] == "accepted"


@pytest.mark.parametrize("scale", [1.0, 0.5, 1 / 1024])
def test_the_ratio_is_of_the_whole_step_however_much_of_it_was_taken(scale: float) -> None:
    """A step short enough is always what the model says; a damping that heard that would fall."""
    ratios = []
    for taken in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        objective = Objective(model, CrossEntropy(), [(draw(4, 5, 3), padded_classes(5, 4, [5, 4, 3, 5]))])
        descent = NewtonCG(ConjugateGradient(30, Residual(1e-10)), momentum=0.0)
        optimiser = SecondOrder(model.parameters(), descent=descent, search=Taking(-1, taken), damping=Fixed(1e-4))
        optimiser.step(objective)
        ratios.append(seen(optimiser).ratio)
    assert ratios[0] < 0.25 and ratios[1] == pytest.approx(ratios[0], rel=1e-9)


def test_the_proposal_warm_starts_the_next_solve() -> None:
    model = nn.Linear(6, 1).double()
    x = draw(50, 6) * torch.logspace(-2, 1, 6, dtype=torch.float64)
    objective = Objective(model, SquaredError(), [(x, x.sum(1, keepdim=True))])
    solver = ConjugateGradient(2, Residual(1e-12))
    optimiser = SecondOrder(
        model.parameters(), descent=NewtonCG(solver, 0.9), search=Backtracking(), damping=Fixed(1e-4)
    )
    proposal = None
    for _ in range(3):
        theta = point(model)
        A = Shifted(objective.curvature(theta), 1e-4)
        start = None if proposal is None else 0.9 * proposal
        path = solver.solve(A, -objective.value_and_grad(theta)[1], x0=start)
        optimiser.step(objective)
        proposal = torch.cat([optimiser.state[p]["proposal"].reshape(-1) for p in model.parameters()])
        assert torch.equal(proposal, path.last.x)
    cold = solver.solve(A, -objective.value_and_grad(theta)[1])
    assert not torch.allclose(cold.last.x, proposal)


@dataclass(frozen=True)
class Taking(Search):
    """One point of the path, scaled, whatever it leads to."""

    point: int
    scale: float

    def select(self, local: LocalModel, path: Path, value: Value) -> Step:
        direction = self.scale * path.points[self.point].x
        whole = value(local.theta + direction / self.scale)
        return Step(direction, value(local.theta + direction), whole, self.point, self.scale)


@pytest.mark.parametrize(
    ("taken", "scale", "kept"), [(0, 1.0, True), (-1, 1.0, True), (0, 0.5, False), (-1, 0.5, False)]
)
def test_the_last_iterate_is_kept_unless_the_step_was_shortened(taken: int, scale: float, kept: bool) -> None:
    model = nn.Linear(6, 1).double()
    objective = Objective(model, SquaredError(), [(draw(50, 6), draw(50, 1, seed=1))])
    theta, solver = point(model), ConjugateGradient(4, Residual(1e-12))
    A = Shifted(objective.curvature(theta), 0.1)
    path = solver.solve(A, -objective.value_and_grad(theta)[1])
    descent = NewtonCG(solver, momentum=0.0)
    optimiser = SecondOrder(model.parameters(), descent=descent, search=Taking(taken, scale), damping=Fixed(0.1))
    for parameter in model.parameters():
        optimiser.state[parameter]["proposal"] = torch.ones_like(parameter)
    optimiser.step(objective)
    torch.testing.assert_close(point(model), theta + scale * path.points[taken].x)
    assert not torch.allclose(path.points[0].x, path.last.x)
    state = [optimiser.state[p] for p in model.parameters()]
    if kept:
        assert torch.equal(torch.cat([s["proposal"].reshape(-1) for s in state]), path.last.x)
    else:
        assert not any(state)


def test_a_rejected_step_leaves_the_parameters_and_raises_the_damping() -> None:
    """|z| at the tip: every step of a sensible length goes up again."""
    model, objective = number(1e-30, PerOutput(torch.abs, torch.ones_like))
    optimiser = newton(model, LevenbergMarquardt(1e-4))
    weight = next(model.parameters())
    optimiser.state[weight]["proposal"] = torch.full_like(weight, 0.1)
    before = point(model)
    for expected in (1e-4, 1.5e-4):
        optimiser.step(objective)
        found = seen(optimiser)
        assert torch.equal(point(model), before)
        assert (found.outcome, found.step_norm, found.damping) == (Outcome.NO_DECREASE, 0.0, pytest.approx(expected))
        assert found.new_value == found.value and math.isnan(found.ratio)
        assert found.evaluations == Backtracking().attempts
        assert optimiser.param_groups[0]["damping"] == pytest.approx(1.5 * expected)
        assert not optimiser.state[weight]


def test_negative_curvature_is_damped_away() -> None:
    """The double well z^4/4 - z^2/2 from near its top, where the curvature is -1."""
    well = PerOutput(lambda z: z**4 / 4 - z**2 / 2, lambda z: 3 * z**2 - 1)
    model, objective = number(0.1, well)
    optimiser, outcomes = newton(model, LevenbergMarquardt(0.2)), []
    for _ in range(40):
        optimiser.step(objective)
        outcomes.append((seen(optimiser).solver, seen(optimiser).outcome))
    assert outcomes[0] == (Outcome.NEGATIVE_CURVATURE, Outcome.NEGATIVE_CURVATURE)  # no point was there to be tried
    assert (Outcome.CONVERGED, Outcome.ACCEPTED) in outcomes
    assert float(point(model)) == pytest.approx(1.0, abs=1e-4)


def test_a_step_out_of_the_domain_is_shortened() -> None:
    """z - log z from 3: the Newton step leads to -3."""
    model, objective = number(3.0, PerOutput(lambda z: z - z.log(), lambda z: z**-2))
    optimiser = newton(model, Fixed(0.0))
    optimiser.step(objective)
    assert 0 < float(point(model)) < 3
    assert seen(optimiser).outcome is Outcome.ACCEPTED
    assert seen(optimiser).evaluations > 2


def test_curvature_that_is_not_finite_is_an_outcome() -> None:
    model, objective = number(1.0, PerOutput(torch.square, lambda z: z * math.nan))
    optimiser = newton(model, LevenbergMarquardt(1.0))
    optimiser.step(objective)
    assert seen(optimiser).solver is seen(optimiser).outcome is Outcome.NON_FINITE
    assert (float(point(model)), seen(optimiser).evaluations) == (1.0, 0)


def test_an_objective_that_is_not_finite_is_an_outcome() -> None:
    model, objective = number(-1.0, PerOutput(torch.log, torch.ones_like))
    optimiser = newton(model, LevenbergMarquardt(1.0))
    assert math.isnan(optimiser.step(objective))
    assert seen(optimiser).solver is seen(optimiser).outcome is Outcome.NON_FINITE_OBJECTIVE
    assert (float(point(model)), seen(optimiser).evaluations) == (-1.0, 0)
    assert optimiser.param_groups[0]["damping"] == 1.5


@pytest.mark.parametrize("warm", [False, True])
def test_a_vanishing_gradient_is_an_outcome(warm: bool) -> None:
    model, objective = number(0.0, PerOutput(torch.square, lambda z: 2 * torch.ones_like(z)))
    optimiser, weight = hessian_free(model.parameters()), next(model.parameters())
    if warm:
        optimiser.state[weight]["proposal"] = torch.ones_like(weight)
    optimiser.step(objective)
    assert seen(optimiser).outcome is Outcome.ZERO_RIGHT_HAND_SIDE
    assert float(point(model)) == 0.0


def test_misuse_is_explained() -> None:
    model, objective = number(1.0, SquaredError())
    optimiser = hessian_free(model.parameters())
    with pytest.raises(ValueError, match=r"closure=None: .*call step\(objective\)"):
        optimiser.step()
    other, _ = number(1.0, SquaredError())
    with pytest.raises(ValueError, match=r"not the same tensors: build the optimiser from this model's parameters\(\)"):
        hessian_free(other.parameters()).step(objective)
    with pytest.raises(ValueError, match=r"initial=-1\.0: damping must be positive"):
        hessian_free(model.parameters(), damping=-1.0)
    with pytest.raises(ValueError, match=r"momentum=1\.5: a share between 0 and 1"):
        hessian_free(model.parameters(), momentum=1.5)


def test_at_a_minimum_nothing_changes_not_even_the_damping() -> None:
    model = nn.Linear(2, 1).double()
    inputs = torch.randn(8, 2, dtype=torch.float64)
    objective = Objective(model, SquaredError(), [(inputs, model(inputs).detach())])
    optimizer = hessian_free(model.parameters(), damping=0.5)
    before = objective.space.point()
    optimizer.step(objective)
    assert optimizer.diagnosis is not None
    assert optimizer.diagnosis.outcome is Outcome.ZERO_RIGHT_HAND_SIDE
    assert torch.equal(objective.space.point(), before)
    assert optimizer.param_groups[0]["damping"] == 0.5


def test_the_state_of_another_model_is_named() -> None:
    model, other = nn.Linear(3, 1).double(), nn.Linear(4, 1).double()
    optimisers = [hessian_free(m.parameters()) for m in (model, other)]
    for optimiser, m in zip(optimisers, (model, other), strict=True):
        optimiser.step(Objective(m, SquaredError(), [(draw(9, m.in_features), draw(9, 1, seed=1))]))
    optimisers[0].load_state_dict(optimisers[1].state_dict())
    with pytest.raises(ValueError, match=r"state has shape \(1, 4\) for weight, the model \(1, 3\): load"):
        optimisers[0].step(Objective(model, SquaredError(), [(draw(9, 3), draw(9, 1, seed=1))]))
