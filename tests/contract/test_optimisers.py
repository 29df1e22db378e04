"""What every optimiser promises: the treaty with torch."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from cases import draw, padded_classes
from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective
from quadric.optim.descent import Descent
from quadric.optim.second_order import SecondOrder, hessian_free
from quadric.outcome import Outcome
from quadric.space import ParameterSpace

Build = Callable[[Iterable[Any]], torch.optim.Optimizer]


@pytest.fixture(params=cases.OPTIMISERS.values(), ids=list(cases.OPTIMISERS))
def build(request: pytest.FixtureRequest) -> Build:
    return request.param


def problem(hidden: int = 6, dropout: float = 0.0) -> tuple[nn.Sequential, Objective]:
    torch.manual_seed(1)
    deep = [nn.Linear(3, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 4)] if hidden else None
    model = nn.Sequential(*(deep or [nn.Linear(3, 4)]))
    data = [(draw(3, 6, 3, seed=s).float(), padded_classes(6, 4, [6, 5, 2])) for s in (0, 1)]
    return model, Objective(model, CrossEntropy(), data)


def point(model: nn.Module) -> Tensor:
    return ParameterSpace(model).point()


def run(optimiser: torch.optim.Optimizer, objective: Objective, steps: int) -> list[float]:
    return [float(optimiser.step(objective)) for _ in range(steps)]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file and back, without trusting it to run code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_decreases_a_convex_problem(build: Build) -> None:
    model, objective = problem(hidden=0)
    optimiser = build(model.parameters())
    values, moved = [], []
    for _ in range(8):
        values.append(float(optimiser.step(objective)))
        moved.append(not isinstance(optimiser, SecondOrder) or optimiser.diagnosis.outcome is Outcome.ACCEPTED)
    assert sum(moved) >= 5  # a step that is refused is followed by another try
    for (earlier, later), took in zip(itertools.pairwise(values), moved, strict=False):
        assert later < earlier if took else later == earlier
    _, gradient = objective.value_and_grad(point(model))
    assert values[-1] < 0.9 * values[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resume_is_identical_to_the_bit(build: Build, dropout: float) -> None:
    model, objective = problem(dropout=dropout)
    optimiser = build(model.parameters())
    straight = run(optimiser, objective, 6)

    first, objective = problem(dropout=dropout)
    before = build(first.parameters())
    values = run(before, objective, 3)
    weights, state = saved(first.state_dict()), saved(before.state_dict())

    second, objective = problem(dropout=dropout)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    after = build(second.parameters())
    second.load_state_dict(weights)
    after.load_state_dict(state)
    values += run(after, objective, 3)
    assert values == straight
    assert torch.equal(point(second), point(model))
    for a, b in zip(after.state_dict()["state"].values(), optimiser.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a | b)
    assert after.state_dict()["param_groups"] == optimiser.state_dict()["param_groups"]


@pytest.mark.parametrize("dropped", ["state", "param_groups"])
def test_a_lost_state_would_be_noticed(dropped: str) -> None:
    """What the state holds matters to Hessian-free steps, else the test above would pass with nothing saved."""
    build = partial(hessian_free, max_steps=3)  # so few that the start matters
    straight = problem()
    expected = run(build(straight[0].parameters()), straight[1], 6)
    model, objective = problem()
    optimiser = build(model.parameters())
    run(optimiser, objective, 3)
    state, fresh = saved(optimiser.state_dict()), build(model.parameters())
    fresh.load_state_dict({**state, dropped: fresh.state_dict()[dropped]})
    assert run(fresh, objective, 3) != expected[3:]


def test_a_copy_goes_on_the_same_way(build: Build) -> None:
    model, objective = problem()
    optimiser = build(model.parameters())
    run(optimiser, objective, 2)
    twin_model, twin, twin_objective = copy.deepcopy((model, optimiser, objective))
    assert run(twin, twin_objective, 2) == run(optimiser, objective, 2)
    assert torch.equal(point(twin_model), point(model))


def test_groups_change_nothing_and_their_rate_scales_their_part(build: Build) -> None:
    starts, ends = [], []
    for rates in (None, (1.0, 1.0), (0.0, 0.5)):
        model, objective = problem()
        bias = [p for p in model.parameters() if p.ndim == 1]
        weight = [p for p in model.parameters() if p.ndim == 2]
        groups = model.parameters()
        if rates is not None:
            groups = [{"params": bias, "lr": rates[0]}, {"params": weight, "lr": rates[1]}]
        starts.append([p.detach().clone() for p in (*bias, *weight)])
        run(build(groups), objective, 1)
        ends.append([*bias, *weight])
    for start, plain, grouped, scaled in zip(starts[0], *ends, strict=True):
        assert torch.equal(plain, grouped)
        rate = 0.0 if start.ndim == 1 else 0.5
        torch.testing.assert_close(scaled - start, rate * (plain - start), rtol=1e-4, atol=1e-6)
        assert not torch.equal(plain, start)


def test_a_schedule_sets_the_rate(build: Build) -> None:
    model, objective = problem()
    optimiser = build(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: [1.0, 0.0][step])
    run(optimiser, objective, 1)
    schedule.step()
    before = point(model)
    run(optimiser, objective, 1)
    assert torch.equal(point(model), before)


def test_hooks_are_called(build: Build) -> None:
    model, objective = problem()
    optimiser, calls = build(model.parameters()), []
    optimiser.register_step_pre_hook(lambda *_: calls.append("before"))
    optimiser.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimiser, objective, 1)
    assert calls == ["before", "after"]


def test_frozen_parameters_stay(build: Build) -> None:
    model, _ = problem()
    model[0].requires_grad_(False)
    objective = Objective(model, CrossEntropy(), [(draw(2, 3).float(), torch.tensor([0, 1]))])
    frozen, moved = model[0].weight.clone(), model[3].weight.clone()
    run(build(model.parameters()), objective, 2)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[3].weight, moved)


def test_state_lives_per_parameter(build: Build) -> None:
    model, objective = problem()
    optimiser = build(model.parameters())
    run(optimiser, objective, 2)
    for parameter, state in optimiser.state.items():
        assert all(x.shape == parameter.shape for x in state.values() if isinstance(x, Tensor) and x.ndim)


@pytest.mark.parametrize("make", cases.DESCENTS.values(), ids=lambda make: make.__name__)
@pytest.mark.parametrize("damping", cases.DAMPINGS.values(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("search", cases.SEARCHES.values(), ids=lambda make: make.__name__)
def test_every_combination_of_parts_is_a_sentence(make: Callable[[], Descent], damping: Any, search: Any) -> None:
    model, objective = problem(hidden=0)
    optimiser = SecondOrder(model.parameters(), descent=make(), search=search(), damping=damping())
    values = run(optimiser, objective, 5)
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_unknown_groups_are_refused(build: Build) -> None:
    model, objective = problem()
    with pytest.raises(ValueError, match="trainable parameters"):
        build(list(model.parameters())[:1]).step(objective)
