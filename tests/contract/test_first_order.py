"""What every first-order optimiser promises: the treaty with torch, at the iterate and at what it is judged by."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from cases import draw
from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective
from quadric.optim.averaged import at_average

Build = Callable[[Iterable[Any]], torch.optim.Optimizer]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(params=cases.FIRST_ORDER.values(), ids=list(cases.FIRST_ORDER))
def build(request: pytest.FixtureRequest) -> Build:
    return request.param


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype)


def loss(model: nn.Module, step: int) -> Tensor:
    x = draw(10, 1, 3, 3, seed=step % 4).to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x).float(), torch.arange(10) % 4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    values = []
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def points(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    """Its parameters, and what it is judged by."""
    yield [p.detach().clone() for p in model.parameters()]
    with at_average(optimizer):
        yield [p.detach().clone() for p in model.parameters()]


def same(left: Iterator[list[Tensor]], right: Iterator[list[Tensor]]) -> bool:
    pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file and back, without trusting it to run code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_it_learns(build: Build) -> None:
    model = network()
    optimizer = build(model.parameters())
    values = train(model, optimizer, range(200))
    assert values[-1] < 0.95 * values[0]
    with at_average(optimizer):
        assert loss(model, 199).item() < 0.95 * values[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [2, 5])
def test_resume_is_identical_to_the_bit(build: Build, dtype: torch.dtype, steps: int) -> None:
    model = network(dtype)
    optimizer = build(model.parameters())
    straight = train(model, optimizer, range(9))

    first = network(dtype)
    before = build(first.parameters())
    values = train(first, before, range(steps))
    weights, state = saved(first.state_dict()), saved(before.state_dict())
    second = network(dtype)
    after = build([{"params": list(second.parameters()), "lr": 0.7}])
    second.load_state_dict(weights)
    after.load_state_dict(state)
    assert same(points(first, before), points(second, after))
    assert values + train(second, after, range(steps, 9)) == straight
    assert same(points(model, optimizer), points(second, after))
    assert after.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_the_state_that_is_loaded_is_its_own(build: Build) -> None:
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(5))
    state, other = optimizer.state_dict(), network()
    twin = build(other.parameters())
    twin.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    before = list(points(model, optimizer))
    train(other, twin, range(5, 8))
    assert same(iter(before), points(model, optimizer))


def test_a_state_of_another_kind_is_refused(build: Build) -> None:
    model = network()
    optimizer = build(model.parameters())
    with pytest.raises(ValueError, match="another kind of optimiser"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_a_copy_goes_on_the_same_way(build: Build) -> None:
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(4))
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert train(twin_model, twin, range(4, 8)) == train(model, optimizer, range(4, 8))
    assert same(points(twin_model, twin), points(model, optimizer))


def test_groups_change_nothing_and_have_their_own_rate(build: Build) -> None:
    plain, grouped, still = network(), network(), network()
    one = build(plain.parameters())
    two = build([{"params": [p]} for p in grouped.parameters()])
    train(plain, one, range(6))
    train(grouped, two, range(6))
    assert same(points(plain, one), points(grouped, two))
    biases = [p for p in still.parameters() if p.ndim == 1]
    weights = [p for p in still.parameters() if p.ndim > 1]
    starts = [p.detach().clone() for p in biases]
    three = build([{"params": weights}, {"params": biases, "lr": 0.0}])
    train(still, three, range(6))
    assert all(torch.equal(p, start) for p, start in zip(biases, starts, strict=True))
    assert not torch.equal(weights[0], network()[0].weight)


def test_a_group_may_come_later(build: Build) -> None:
    model, start = network(), network()
    last = list(model[4].parameters())
    optimizer = build([p for p in model.parameters() if not any(p is q for q in last)])
    train(model, optimizer, range(4))
    assert torch.equal(model[4].weight, start[4].weight)
    optimizer.add_param_group({"params": last})
    train(model, optimizer, range(4, 10))
    assert not torch.equal(model[4].weight, start[4].weight)
    with at_average(optimizer):
        assert not torch.equal(model[4].weight, start[4].weight)


def test_a_schedule_sets_the_rate(build: Build) -> None:
    model = network()
    optimizer = build(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 1.0, 0.0][step])
    before, _ = points(model, optimizer)
    for moves in (True, True, False):
        train(model, optimizer, [0])
        now, _ = points(model, optimizer)
        assert same(iter([before]), iter([now])) is not moves
        before = now
        schedule.step() if moves else None


def test_hooks_are_called(build: Build) -> None:
    model, calls = network(), []
    optimizer = build(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    train(model, optimizer, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "loaded"]


def test_what_is_frozen_or_has_no_gradient_stays(build: Build) -> None:
    model, start = network(), network()
    model[0].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    optimizer = build([*model.parameters(), unused])
    train(model, optimizer, range(6))
    with at_average(optimizer):
        assert torch.equal(model[0].weight, start[0].weight) and torch.equal(unused, torch.ones(3))
        assert not torch.equal(model[4].weight, start[4].weight)
    assert optimizer.step() is None


def test_closures_and_objectives_are_steps_by_their_gradients(build: Build) -> None:
    ends = []
    data = [(draw(10, 1, 3, 3).float(), torch.arange(10) % 4)]
    for kind in ("gradients", "closure", "objective"):
        model = network()
        optimizer = build(model.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            assert torch.is_grad_enabled()
            value = loss(model, 0)  # noqa: B023
            value.backward()
            return value

        for _ in range(5):
            if kind == "gradients":
                train(model, optimizer, [0])
            else:
                given = closure if kind == "closure" else Objective(model, CrossEntropy(), data)
                before = loss(model, 0).item()
                assert optimizer.step(given).item() == pytest.approx(before)
        ends.append([p for point in points(model, optimizer) for p in point])
    for plain, closed, by_objective in zip(*ends, strict=True):
        assert torch.equal(plain, closed)
        torch.testing.assert_close(plain, by_objective)


def test_sparse_gradients_are_refused_before_anything_moves(build: Build) -> None:
    table, weight = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(2))
    optimizer = build([weight, *table.parameters()])
    (table(torch.tensor([1, 2])) * weight).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match=r"shape \(5, 2\) is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2)) and torch.equal(table.weight, before)
    weight.grad, table.weight.grad = torch.ones(2), torch.ones(5, 2)
    optimizer.step()


def test_complex_parameters_are_refused(build: Build) -> None:
    optimizer = build([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_state_lives_per_parameter(build: Build) -> None:
    model = network()
    optimizer = build(model.parameters())
    train(model, optimizer, range(6))
    assert set(optimizer.state) == set(model.parameters())
    for parameter, state in optimizer.state.items():
        assert all(x.shape == parameter.shape for x in state.values() if isinstance(x, Tensor) and x.ndim)
