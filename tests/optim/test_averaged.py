"""Averaged SGD against its recursion, its precision, and where optimisers that average are judged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, Optimizer

from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.objective.objective import Objective
from quadric.optim import averaged as module
from quadric.optim.averaged import AveragedSGD, at_average, averaged_sgd, train_mode
from quadric.optim.rate import search_rate, sgd_cost
from quadric.optim.second_order import hessian_free
from reference.averaging import averaged, mean_of_every


def noise(step: int, n: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-3, 0.5),
    a=st.sampled_from([0.0, 0.01, 3.0]),
    power=st.sampled_from([2 / 3, 0.75, 0.0]),
    start=st.integers(0, 12),
    weight_decay=st.sampled_from([0.0, 0.3]),
    steps=st.integers(1, 10),
    scheduled=st.booleans(),
)
def test_it_is_the_recursion(
    lr: float, a: float, power: float, start: int, weight_decay: float, steps: int, scheduled: bool
) -> None:
    n, curvature = 5, torch.tensor([1.0, 0.5, 2.0, 0.1, 1.5], dtype=torch.float64)
    parameter = nn.Parameter(noise(0, n))
    optimizer = averaged_sgd([parameter], lr=lr, a=a, power=power, start=start, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step if scheduled else 1.0)
    for t in range(1, steps + 1):
        parameter.grad = curvature * parameter.detach() + noise(t, n)
        optimizer.step()
        scheduler.step()

    def gradient(t: int, theta: list[float]) -> list[float]:
        return [h * x + e for h, x, e in zip(curvature.tolist(), theta, noise(t, n).tolist(), strict=True)]

    theta, average = averaged(
        noise(0, n).tolist(),
        gradient,
        steps,
        lr=lambda t: lr * (0.9 ** (t - 1) if scheduled else 1.0),
        a=a,
        power=power,
        start=start,
        weight_decay=weight_decay,
    )
    torch.testing.assert_close(parameter.detach(), torch.tensor(theta, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    average = torch.tensor(average, dtype=torch.float64)
    torch.testing.assert_close(optimizer.average(parameter), average, rtol=1e-12, atol=1e-13)
    with at_average(optimizer):
        torch.testing.assert_close(parameter.detach(), average, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 3])
def test_one_of_every_so_many_iterates_is_averaged(every: int, start: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, iterates = averaged_sgd([parameter], lr=0.1, start=start, every=every), []
    for t in range(1, 18):
        parameter.grad = noise(t, 1).float()
        optimizer.step()
        iterates.append(parameter.item())
        assert float(optimizer.average(parameter)) == pytest.approx(mean_of_every(iterates, start, every), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_parts_are_moved_as_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of tensors that are larger than a chunk, smaller, of no entries or one, and not contiguous; to the bit."""

    def run() -> list[Tensor]:
        params = [nn.Parameter(torch.linspace(0, 1, n).reshape(shape)) for n, shape in SHAPES]
        params.append(nn.Parameter(torch.linspace(0, 1, 12).reshape(3, 4).mT))
        optimizer = averaged_sgd(params, lr=0.1, weight_decay=0.1)
        for t in range(4):
            for p in params:
                p.grad = noise(t, p.numel()).float().reshape(p.shape)
            optimizer.step()
        return [*map(Tensor.detach, params), *map(optimizer.average, params)]

    whole = run()
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))


SHAPES: list[tuple[int, tuple[int, ...]]] = [(1, ()), (0, (0, 3)), (20, (4, 5)), (100, (100,)), (3, (3,))]


def test_a_mean_in_float32_stalls_where_this_moves() -> None:
    """Of 1e5 iterates that were 1, and others of 1.001 after them."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = averaged_sgd([parameter], lr=1.0, a=0.0)
    parameter.grad = torch.ones(1)
    optimizer.step()
    state = optimizer.state[parameter]
    state["step"], state["averaged"], state["sum"][:] = 10**5, 10**5, 1e5
    mean = torch.ones(1)
    with torch.no_grad():
        parameter.fill_(1.001)
    parameter.grad = torch.zeros(1)
    for _ in range(1000):
        optimizer.step()
        mean += (parameter.detach() - mean) / optimizer.state[parameter]["step"]
    assert mean.item() == 1.0
    moved = (parameter.item() - 1) * 1000 / 101_000
    assert float(optimizer.average(parameter)) - 1 == pytest.approx(moved, rel=1e-6)
    twin = nn.Parameter(parameter.detach().clone())
    resumed = averaged_sgd([twin], lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.average(twin), optimizer.average(parameter))


def test_averaging_begins_after_the_start_and_costs_nothing_before() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = averaged_sgd([parameter], lr=1.0, a=0.0)
    optimizer.average_after(2)
    for gradient, average in ((-1.0, 1.0), (-1.0, 2.0), (-1.0, 3.0), (-2.0, 4.0)):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        assert float(optimizer.average(parameter)) == average
        assert ("sum" in optimizer.state[parameter]) is (average > 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"a": -1.0}, "a=-1.0"),
        ({"power": math.inf}, "power=inf"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"start": 0.5}, "start=0.5: give a whole number"),
        ({"start": -1}, "start=-1"),
        ({"every": 0}, "every=0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=match):
        averaged_sgd([parameter], **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=match):
        averaged_sgd([{"params": [parameter], **options}], lr=0.1)


def _trained(build: Callable[[list[nn.Parameter]], Optimizer], steps: int = 7) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.linspace(-1, 1, 50))
    optimizer = build([parameter])
    train_mode(optimizer)
    for step in range(steps):
        parameter.grad = noise(step, 50).float() + parameter.detach()
        optimizer.step()
    return parameter, optimizer


def _schedule_free(params: list[nn.Parameter]) -> Optimizer:
    return pytest.importorskip("schedulefree").SGDScheduleFree(params, lr=0.3)


JUDGED: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "averaged_sgd": lambda params: averaged_sgd(params, lr=0.3),
    "ASGD": lambda params: ASGD(params, lr=0.3, t0=2),
    "schedule-free": _schedule_free,
}
ELSEWHERE: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.3, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.3),
    "hessian_free": hessian_free,
}


@pytest.mark.parametrize("name", JUDGED)
def test_within_the_context_parameters_are_the_average_and_afterwards_they_are_back(name: str) -> None:
    parameter, optimizer = _trained(JUDGED[name])
    before = parameter.detach().clone()
    with at_average(optimizer):
        inside = parameter.detach().clone()
        assert torch.is_grad_enabled()
    assert torch.equal(parameter, before) and not torch.equal(inside, before)
    with pytest.raises(RuntimeError, match="thrown"), at_average(optimizer):
        raise RuntimeError("thrown")
    assert torch.equal(parameter, before)
    if name == "averaged_sgd":
        assert torch.equal(inside, optimizer.average(parameter).float())
    elif name == "ASGD":
        assert torch.equal(inside, optimizer.state[parameter]["ax"])
    else:
        optimizer.eval()
        assert torch.equal(inside, parameter)
        with at_average(optimizer):
            assert torch.equal(inside, parameter)
        assert torch.equal(inside, parameter) and not optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("name", JUDGED)
def test_looking_changes_nothing_of_the_training(name: str) -> None:
    ends = []
    for looks in (False, True):
        parameter, optimizer = _trained(JUDGED[name], steps=3)
        for step in range(3, 8):
            if looks:
                with at_average(optimizer):
                    pass
            parameter.grad = noise(step, 50).float() + parameter.detach()
            optimizer.step()
        with at_average(optimizer):
            ends.append(parameter.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", [*JUDGED, *ELSEWHERE])
def test_before_the_first_step_and_for_others_it_is_where_they_are(name: str) -> None:
    parameter, optimizer = _trained({**JUDGED, **ELSEWHERE}[name], steps=0)
    before = parameter.detach().clone()
    with at_average(optimizer):
        assert torch.equal(parameter, before)
    assert torch.equal(parameter, before)
    if name in ("SGD", "Adam"):
        parameter, optimizer = _trained(ELSEWHERE[name])
        before = parameter.detach().clone()
        with at_average(optimizer):
            assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("best", "first", "rate"),
    [(1.0, 1.0, 1.0), (5.0, 1.0, 4.0), (0.3, 1.0, 0.25), (1.9, 1.0, 2.0), (0.01, 3.0, 3 / 256), (100.0, 3.0, 96.0)],
)
def test_the_rate_is_the_best_of_the_powers(best: float, first: float, rate: float) -> None:
    tried: list[float] = []

    def cost(rate: float) -> float:
        tried.append(rate)
        return abs(math.log(rate / best))

    assert search_rate(cost, first) == rate
    assert len(tried) == len(set(tried)) <= 12  # none is tried twice


@settings(max_examples=60, deadline=None)
@given(
    best=st.floats(1e-6, 1e6),
    first=st.floats(1e-3, 1e3),
    bounded=st.booleans(),
    broken=st.sampled_from([math.nan, math.inf]),
)
def test_the_minimum_is_bracketed(best: float, first: float, bounded: bool, broken: float) -> None:
    """By the rate's neighbours; rates of more than 4 times the minimum may be infinite or NaN."""

    def cost(rate: float) -> float:
        return broken if bounded and rate > 4 * best else abs(math.log(rate / best))

    rate = search_rate(cost, first)
    assert math.frexp(rate / first)[0] == 0.5
    assert best / 2**0.5 * 0.999 <= rate <= best * 2**0.5 * 1.001


def test_a_cost_that_says_nothing_leaves_the_first_rate_and_one_that_is_never_finite_is_refused() -> None:
    assert search_rate(lambda rate: 1.0, 0.3) == 0.3
    with pytest.raises(ValueError, match="cost is not finite at any rate from"):
        search_rate(lambda rate: math.nan)
    with pytest.raises(ValueError, match="first=0"):
        search_rate(lambda rate: rate, 0.0)
    assert search_rate(lambda rate: -rate) == 2.0**41


def test_the_cost_is_that_of_a_pass_of_sgd_and_leaves_all_as_it_was() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    model[0].bias.requires_grad_(False)
    batches = [[(noise(s, 36).reshape(12, 3), torch.arange(12) % 4)] for s in range(5)]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    cost = sgd_cost(model.eval(), CrossEntropy(), batches)
    found = cost(0.3)
    assert cost(0.3) == found != cost(0.1)
    assert cost(1e200) == math.inf
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    model.train()
    optimizer = SGD(model.parameters(), lr=0.3)
    for [(x, y)] in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    losses = [nn.functional.cross_entropy(model(x), y).item() for [(x, y)] in batches]
    assert found == pytest.approx(sum(losses) / 5, rel=1e-10)
    with pytest.raises(ValueError, match="minibatches is empty"):
        sgd_cost(model, CrossEntropy(), [])


def test_the_cost_draws_the_same_dropout_at_every_rate_and_none_from_torch() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4))
    batches = [[(noise(s, 36).reshape(12, 3).float(), torch.arange(12) % 4)] for s in range(3)]
    cost, state = sgd_cost(model, CrossEntropy(), batches), torch.get_rng_state()
    assert cost(0.3) == cost(0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert sgd_cost(model, CrossEntropy(), batches, seed=9)(0.3) != cost(0.3)


def test_one_pass_reaches_the_solution_of_least_squares_to_its_own_noise() -> None:
    """The average is nearer than the iterate by far, and within a factor of the best estimate of all the data."""
    torch.manual_seed(0)
    n, d = 4000, 10
    truth, x = torch.randn(d), torch.randn(n, d) * torch.linspace(0.5, 1.5, d)
    y = x @ truth + torch.randn(n)
    parameter = nn.Parameter(torch.zeros(d))
    optimizer: AveragedSGD = averaged_sgd([parameter], lr=0.05, a=0.25, power=2 / 3, start=400)
    for row, target in zip(x, y, strict=True):
        parameter.grad = (row @ parameter.detach() - target) * row
        optimizer.step()
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    error = [float((v - truth).norm()) for v in (optimizer.average(parameter), parameter.detach(), best)]
    assert error[0] < 0.5 * error[1] and error[0] < 2 * error[2]


def test_an_objective_is_a_closure() -> None:
    model = nn.Linear(3, 4)
    objective = Objective(model, CrossEntropy(), [(noise(0, 36).reshape(12, 3).float(), torch.arange(12) % 4)])
    optimizer = averaged_sgd(model.parameters(), lr=0.5)
    values = [float(optimizer.step(objective)) for _ in range(20)]
    assert values == sorted(values, reverse=True)


def test_the_cost_under_a_delay_is_that_of_gradients_that_wait() -> None:
    """x <- x - rate * x_before of f = x^2 / 2: at the rate 1.5 SGD converges, and delayed by two steps it diverges."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    batch = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    rate, steps = 1.5, 12
    ends = {}
    for delay in (0, 2):
        x = [1.0]
        waiting: list[float] = []
        for _ in range(steps):
            waiting.append(x[-1])
            x.append(x[-1] - rate * waiting.pop(0) if len(waiting) > delay else x[-1])
        for late in waiting:
            x.append(x[-1] - rate * late)
        ends[delay] = x[-1]
        cost = sgd_cost(model, SquaredError(), [[batch]] * steps, delay=delay)
        scale = sgd_cost(model, SquaredError(), [[batch]], delay=0)(1e-12)  # of the loss at x = 1
        assert cost(rate * gradient_at_one(model, batch)) == pytest.approx(scale * x[-1] ** 2, rel=1e-6)
    assert abs(ends[0]) < 0.01 < 1 < abs(ends[2])
    with pytest.raises(ValueError, match="delay=-1: must not be negative"):
        sgd_cost(model, SquaredError(), [[batch]], delay=-1)


def gradient_at_one(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """What makes a rate one of f = x^2 / 2, whatever constant the loss has."""
    trial = copy.deepcopy(model)
    SquaredError()(trial(batch[0]), batch[1]).sum().backward()
    (gradient,) = [float(p.grad) for p in trial.parameters() if p.grad is not None]
    return 1 / gradient
