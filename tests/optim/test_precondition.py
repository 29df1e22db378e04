"""Preconditioners: what they measure, against explicit per-frame gradients and known numbers of uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cases
from cases import draw, padded_classes
from quadric.linalg.krylov import ConjugateGradient, FlexibleCG
from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import Pair
from quadric.linalg.solver import ChangingInverse, Path
from quadric.linalg.truncation import Residual
from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.model.acoustic import TDNN
from quadric.model.recurrent import LSTM, RNN
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.optim.damping import Fixed
from quadric.optim.descent import LocalModel
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner, SharedCounts
from quadric.optim.search import Search, Step, Value
from quadric.optim.second_order import SecondOrder, hessian_free, natural_gradient, nghf
from reference import dense


def problem() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return Objective(model, CrossEntropy(), [(draw(4, 9, 3), padded_classes(9, 4, [9, 7, 8, 9]))])


def local(objective: Objective) -> LocalModel:
    theta = objective.space.point()
    return LocalModel(theta, *objective.value_and_grad(theta), objective.curvature(theta))


@pytest.mark.parametrize("build", cases.PRECONDITIONERS.values(), ids=lambda kind: kind.__name__)
def test_every_inverse_is_symmetric_and_positive_definite(build: type[Preconditioner]) -> None:
    objective = problem()
    model = local(objective)
    pairs = tuple(Pair(i + 1, v, model.curvature @ v) for i, v in enumerate(draw(3, len(model.theta))))
    inverse = build().operator(objective, model, pairs, 0.1)
    assert isinstance(inverse, LinearOperator) and inverse.symmetric
    matrix = dense.matrix_of(inverse)
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0


def test_pairs_of_the_solve_under_way_join_those_before() -> None:
    objective = problem()
    model = local(objective)
    s = draw(3, len(model.theta))
    pairs = tuple(Pair(i + 1, v, model.curvature @ v) for i, v in enumerate(s))
    changing = LBFGS(changes=True).operator(objective, model, pairs[:1], 0.1)
    assert callable(changing)
    for new in ((), pairs[1:2], pairs[1:]):
        inverse = changing(len(new), new)
        last = (*pairs[:1], *new)[-1]
        assert len(inverse.pairs) == 1 + len(new)
        torch.testing.assert_close(inverse @ last.y, last.s)


def test_a_changing_preconditioner_is_given_a_flexible_solver() -> None:
    for build in (hessian_free, natural_gradient, nghf):
        for preconditioner, kind in ((LBFGS(), ConjugateGradient), (LBFGS(changes=True), FlexibleCG)):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
            objective = Objective(model, CrossEntropy(), [(draw(4, 9, 3), padded_classes(9, 4, [9, 7, 8, 9]))])
            optimiser = build(model.parameters(), preconditioner=preconditioner)
            solver = getattr(optimiser.descent, "natural", optimiser.descent.solver)
            assert isinstance(solver, kind) and solver.pairs == preconditioner.pairs
            before = objective.value(objective.space.point())
            for _ in range(3):
                optimiser.step(objective)
            assert objective.value(objective.space.point()) < before


class OneLarge(LinearOperator):
    """v -> v + 2 u (u'v)."""

    symmetric = True

    def __init__(self, u: Tensor) -> None:
        self.u, self.size = u, len(u)

    def apply(self, v: Tensor) -> Tensor:
        return v + 2 * torch.dot(self.u, v) * self.u


class OneLargeAlong(Preconditioner):
    """An operator that no other part knows of; it keeps what it was given to build it."""

    def __init__(self) -> None:
        self.given: list[tuple[float, float]] = []

    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        assert not pairs
        self.given.append((objective.frames, damping))
        return OneLarge(functional.normalize(draw(len(local.theta), seed=9), dim=0))


class LastIterate(Search):
    """The end of the path, whatever it brings."""

    def select(self, local: LocalModel, path: Path, value: Value) -> Step | None:
        found = value(local.theta + path.last.x)
        return Step(path.last.x, found, found, len(path.points) - 1, 1.0)


@pytest.mark.parametrize("build", [hessian_free, natural_gradient, nghf])
def test_any_operator_of_ones_own_preconditions(build: Callable[..., SecondOrder]) -> None:
    """To the end of a solve it makes no difference, and to its first iterates it does."""
    ends = {}
    for own, steps in itertools.product((False, True), (2, 60)):
        objective, mine = problem(), OneLargeAlong()
        options = {"max_steps": steps, "tolerance": 0.0} if build is hessian_free else {"iterations": steps}
        damping = 0.5 if build is hessian_free else Fixed(0.5)
        optimiser = build(
            objective.model.parameters(), damping=damping, preconditioner=mine if own else None, **options
        )
        optimiser.search = LastIterate()
        optimiser.step(objective)
        ends[own, steps] = objective.space.point()
        assert mine.given == ([(33.0, pytest.approx(told_damping(build)))] if own else [])
    torch.testing.assert_close(ends[True, 60], ends[False, 60], rtol=1e-6, atol=1e-8)
    assert float((ends[True, 2] - ends[False, 2]).norm()) > 1e-3 * float(ends[False, 2].norm())


def told_damping(build: Callable[..., SecondOrder]) -> float:
    """What a lambda of 0.5 comes to for the first matrix that is solved with."""
    objective = problem()
    if build is hessian_free:
        return 0.5
    theta = objective.space.point()
    g = objective.value_and_grad(theta)[1]
    return 0.5 * float(g @ (objective.curvature(theta, Curvature.EMPIRICAL_FISHER) @ g) / (g @ g))


@pytest.mark.parametrize("preconditioner", [LBFGS(), LBFGS(changes=True), FisherDiagonal(), SharedCounts()])
def test_nghf_gets_as_far_with_a_preconditioner(preconditioner: Preconditioner) -> None:
    """Preconditioned by its own pairs, the second run has no short iterates, and the steps stay short for ever."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 2)
    target = (inputs.prod(dim=1) > 0).long()
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    objective = Objective(model, CrossEntropy(), [(inputs, target)])
    optimiser = nghf(model.parameters(), preconditioner=preconditioner)
    for _ in range(25):
        optimiser.step(objective)
    assert objective.value(objective.space.point()) < 0.06  # 0.7 at the start


def test_what_is_no_preconditioner_is_named() -> None:
    with pytest.raises(ValueError, match="preconditioner='lbfgs': give one such as"):
        nghf(nn.Linear(2, 2).parameters(), preconditioner="lbfgs")  # type: ignore[arg-type]


def test_the_diagonal_is_the_mean_square_of_the_frames_gradients() -> None:
    objective = problem()
    theta = objective.space.point()
    exact = dense.matrix_of(objective.curvature(theta, Curvature.EMPIRICAL_FISHER)).diagonal()
    found = objective.fisher_diagonal(theta, draws=4000)
    torch.testing.assert_close(found, exact, rtol=0.15, atol=1e-6)
    assert torch.equal(objective.fisher_diagonal(theta, 3), objective.fisher_diagonal(theta, 3))


def test_the_diagonal_is_exact_for_one_frame_per_micro_batch() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    data = [(draw(1, 3, seed=s), torch.tensor([s % 4])) for s in range(6)]
    objective = Objective(model, CrossEntropy(), data)
    theta = objective.space.point()
    expected = dense.matrix_of(objective.curvature(theta, Curvature.EMPIRICAL_FISHER)).diagonal()
    torch.testing.assert_close(objective.fisher_diagonal(theta, 1), expected, rtol=1e-10, atol=1e-14)
    inverse = FisherDiagonal(floor=1e-300).operator(objective, local(objective), (), 0.3)
    assert isinstance(inverse, LinearOperator)
    torch.testing.assert_close(inverse @ torch.ones_like(theta), (expected + 0.3) ** -0.75, rtol=1e-10, atol=0)


def test_a_diagonal_system_is_solved_sooner() -> None:
    """Features of very different sizes."""
    torch.manual_seed(0)
    model = nn.Linear(60, 1).double()
    x = draw(600, 60) * torch.logspace(-1.5, 1.5, 60, dtype=torch.float64)
    objective = Objective(model, SquaredError(), [(x, draw(600, 1, seed=1))])
    quadratic, solver = local(objective), ConjugateGradient(2000, Residual(1e-6))
    A = quadratic.curvature + 1e-3 * cases.Identity(len(quadratic.theta))
    steps = {
        M is None: solver.solve(A, -quadratic.gradient, M=M).steps
        for M in (None, FisherDiagonal(exponent=1.0, draws=20).operator(objective, quadratic, (), 1e-3))
    }
    assert steps[False] < 0.6 * steps[True], steps


class Stack(nn.Module):
    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


def counts(model: nn.Module, frames: int, features: int) -> dict[str, float]:
    model = model.double()
    outputs = model(draw(2, frames, features)).shape[1]
    objective = Objective(model, CrossEntropy(), [(draw(2, frames, features), torch.zeros(2, outputs).long())])
    vector = objective.shared_counts(objective.space.point())
    return {name: float(view.flatten()[0]) for name, view in objective.space.views(vector).items()}


def test_uses_of_a_time_delay_network_are_those_of_its_tree() -> None:
    """Two offsets a layer make a binary tree: 1, 1, 2, 4, 8 places from the top, of which two fall together."""
    offsets = ((-2, -1, 0, 1, 2), (-1, 2), (-3, 3), (-7, 2), (0,))
    model = TDNN(3, 4, (6,) * 5, offsets=offsets, activation="tanh")
    found = counts(model, model.left_context + 9 + model.right_context, 3)
    assert [found[name] for name in found if name.endswith("weight")] == [7, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("kind", [RNN, LSTM])
def test_uses_of_an_unfolded_layer_are_its_steps(kind: type[RNN | LSTM]) -> None:
    """But one for what a layer hands to itself: the first step starts from zero."""
    model = kind(3, 4, [6, 6], feed_forward=[5], window=(14, 5), activation="tanh")
    found = counts(model, 14 + 9 + 5, 3)
    recurrent = {name.partition("layers.")[2]: n for name, n in found.items() if name.startswith("hidden.0")}
    each = {"input.weight": 20.0, "input.bias": 20.0, "recurrent.weight": 19.0}
    assert recurrent == {f"{layer}.{name}": n for layer in (0, 1) for name, n in each.items()}
    assert {found[name] for name in found if not name.startswith("hidden.0")} == {1.0}


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_uses_of_a_recurrent_layer_are_its_steps(layer: type[nn.RNN | nn.LSTM | nn.GRU]) -> None:
    found = counts(Stack(layer(3, 5, batch_first=True), 5), 11, 3)
    assert {found[name] for name in found if name.startswith("layer")} == {6.0}  # the middle frame is the sixth
    assert found["out.weight"] == found["out.bias"] == 1.0


def test_a_tied_layer_counts_every_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.out = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.tied(torch.tanh(self.tied(x)))))

    assert counts(Twice(), 5, 3) == {"tied.weight": 2.0, "tied.bias": 2.0, "out.weight": 1.0, "out.bias": 1.0}


def test_shared_counts_divide() -> None:
    torch.manual_seed(0)
    model = Stack(nn.RNN(3, 5, batch_first=True), 5).double()
    objective = Objective(model, CrossEntropy(), [(draw(2, 7, 3), torch.zeros(2, 7).long())])
    theta = objective.space.point()
    inverse = SharedCounts().operator(objective, local(objective), (), 0.0)
    assert isinstance(inverse, LinearOperator)
    torch.testing.assert_close(inverse @ objective.shared_counts(theta), torch.ones_like(theta))


@pytest.mark.parametrize(
    ("build", "message"),
    [(lambda: FisherDiagonal(exponent=0.0), "exponent=0.0"), (lambda: FisherDiagonal(draws=0), "draws=0")],
)
def test_misuse(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
