"""What every member of the block-diagonal family promises: the treaty with torch, and that all parameters move."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cases
from cases import draw
from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.length import UnitEntries

Build = Callable[..., BlockDiagonal]
SCHEDULE = Schedule(statistics=2, inverses=3)


@pytest.fixture(params=cases.FAMILY.values(), ids=list(cases.FAMILY))
def build(request: pytest.FixtureRequest) -> Build:
    return request.param


class Zoo(nn.Module):
    """Layers of every kind, on tokens ``[B, T]``; the output is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.batch = nn.BatchNorm1d(6)
        self.pointwise = nn.Conv1d(6, 4, 1)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.output = nn.Linear(4, 7)
        self.output.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.pointwise(self.batch(self.conv(x.mT).tanh())).mT
        x = x + self.gru(self.lstm(x)[0])[0]
        x = x + self.attention(x, x, x)[0]
        return self.output(self.norm(x) * self.scale.flatten())


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    return draw(10, 1, 3, 3, seed=step % 4).float(), torch.arange(10) % 4


def loss(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)


def advance(optimizer: BlockDiagonal, compute: Callable[[], Tensor]) -> float:
    """A step by the gradient of a loss that is ``compute``d; by a closure where the member wants one."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = compute()
        value.backward()
        return value

    if optimizer.wants_closure:
        return float(optimizer.step(closure).detach())
    value = closure()
    assert optimizer.step() is None
    return float(value.detach())


def train(model: nn.Module, optimizer: BlockDiagonal, steps: range) -> list[float]:
    return [advance(optimizer, lambda: loss(model, step)) for step in steps]  # noqa: B023


def point(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file and back, without trusting it to run code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_it_learns(build: Build) -> None:
    model = small()
    values = train(model, build(model, lr=0.01), range(100))
    assert values[-1] < 0.75 * values[0]
    assert all(math.isfinite(value) for value in values)


def test_a_batch_of_no_examples_is_a_step_of_nothing_new(build: Build) -> None:
    """By momentum alone; the first as well as a later one, and one of several accumulated."""
    model = small()
    optimizer = build(model, lr=0.01)
    for step in range(4):
        before = point(model)
        advance(optimizer, lambda: model(batch(0)[0][:0]).sum())
        assert torch.equal(point(model), before) is (step == 0)
        advance(optimizer, lambda: loss(model, 0) + model(batch(0)[0][:0]).sum())
    assert point(model).isfinite().all() and optimizer.param_groups[0]["skipped"] == 0
    fewer = [layer for layer in optimizer.coverage if "not called" in layer.why]
    assert not fewer


def test_every_parameter_moves_and_is_named_once_in_the_coverage(build: Build) -> None:
    torch.manual_seed(0)
    model = Zoo()
    optimizer = build(model, lr=0.01)
    named = [name for layer in optimizer.coverage for name in layer.parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    reasons = {layer.parameters: layer.why for layer in optimizer.coverage}
    assert reasons["table.weight",].startswith(
        "Embedding: not known as a linear map"
    )  # a matrix of the output's as well
    assert reasons["pointwise.weight", "pointwise.bias"] == "Conv1d: a matrix"
    assert reasons["lstm.weight_hh_l0", "lstm.bias_hh_l0"].startswith("LSTM: a matrix")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        advance(optimizer, lambda: functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        moved = p.detach() != before[name]
        assert moved.all() if name != "table.weight" else moved.any(1).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4])
def test_resume_is_identical_to_the_bit(build: Build, dtype: torch.dtype, stop: int) -> None:
    model = small().to(dtype)
    optimizer = build(model, schedule=SCHEDULE)
    straight = train(model, optimizer, range(8))

    first = small().to(dtype)
    before = build(first, schedule=SCHEDULE)
    values = train(first, before, range(stop))
    weights, state = saved(first.state_dict()), saved(before.state_dict())
    second = small().to(dtype)
    after = build(second, lr=9.0, damping=9.0, schedule=SCHEDULE)
    second.load_state_dict(weights)
    after.load_state_dict(state)
    values += train(second, after, range(stop, 8))
    assert values == straight
    assert torch.equal(point(second), point(model))
    for a, b in zip(after.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a | b)
    assert after.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("dropped", ["state", "param_groups"])
def test_a_lost_state_would_be_noticed(build: Build, dropped: str) -> None:
    model = small()
    straight = train(model, build(model, schedule=SCHEDULE), range(8))
    model = small()
    optimizer = build(model, schedule=SCHEDULE)
    train(model, optimizer, range(4))
    fresh = build(model, schedule=SCHEDULE)
    state = saved(optimizer.state_dict())
    fresh.load_state_dict({**state, dropped: fresh.state_dict()[dropped]})
    with contextlib.suppress(KeyError):  # there is no inverse, and none is due
        assert train(model, fresh, range(4, 8)) != straight[4:]


def test_statistics_are_wide_and_parameters_keep_their_type(build: Build) -> None:
    model = small().bfloat16()
    optimizer = build(model)
    train(model, optimizer, range(2))
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    assert kept and all(x.dtype is torch.float32 for x in kept if x.is_floating_point())


def test_a_copy_goes_on_the_same_way(build: Build) -> None:
    model = small()
    optimizer = build(model, schedule=SCHEDULE)
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert train(twin, twin_optimizer, range(2, 6)) == train(model, optimizer, range(2, 6))
    assert torch.equal(point(twin), point(model))


def test_a_closure_and_an_objective_serve_as_well(build: Build) -> None:
    ends, values = [], []
    for way in ("backward", "closure", "objective"):
        model = small()
        optimizer = build(model)
        for step in range(3):

            def closure(step: int = step, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                value = loss(model, step)
                value.backward()
                return value

            if way == "backward":
                values.append(advance(optimizer, lambda step=step, model=model: loss(model, step)))
            else:
                given = closure if way == "closure" else Objective(model, CrossEntropy(), [batch(step)])
                values.append(float(optimizer.step(given)))
        ends.append(point(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-4, atol=1e-5)
    assert values[3:6] == values[:3] and values[6:] == pytest.approx(values[:3])


def test_groups_have_their_rates_and_their_decay(build: Build) -> None:
    ends = []
    for groups in (None, (1.0, 0.0), (0.5, 0.0), (1.0, 0.1), (0.0, 0.1)):
        model = small()
        start = point(model)
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim == 1]
        if groups is None:
            optimizer = build(model, lr=0.01)
        else:
            rate, decay = groups
            params = [{"params": weights, "lr": 0.01 * rate, "weight_decay": decay}, {"params": biases}]
            optimizer = build(model, params, lr=0.01)
        train(model, optimizer, range(1))
        ends.append([p.detach().clone() for p in weights])
    del start
    start_weights = [p.detach() for p in small().parameters() if p.ndim > 1]
    for start, plain, grouped, halved, decayed, still in zip(start_weights, *ends, strict=True):
        assert torch.equal(plain, grouped) and not torch.equal(plain, start)
        torch.testing.assert_close(halved - start, 0.5 * (plain - start), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(decayed, plain - 0.001 * start, rtol=1e-4, atol=1e-6)
        assert torch.equal(still, start)


def test_a_schedule_sets_the_rate(build: Build) -> None:
    model = small()
    optimizer = build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.0][step])
    train(model, optimizer, range(1))
    schedule.step()
    before = point(model)
    train(model, optimizer, range(1, 2))
    assert torch.equal(point(model), before)


def clipped(build: Build, way: str) -> Tensor:
    """Where three steps by clipped gradients lead that are made ``way``."""
    model = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way == "scaled")
    optimizer = build(model, loss_scale=scaler.get_scale)

    def closure() -> float:
        optimizer.zero_grad(set_to_none=bool(step))
        x, y = batch(step)
        for part in (slice(0, 5), slice(5, 10)) if way == "parts" else (slice(0, 10),):
            scaler.scale(functional.cross_entropy(model(x[part]), y[part]) * (len(x[part]) / len(x))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return 0.0

    for step in range(3):  # noqa: B007
        if optimizer.wants_closure:
            optimizer.step(closure)
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()
    return point(model)


def test_gradients_may_be_accumulated_clipped_and_scaled(build: Build) -> None:
    whole = clipped(build, "whole")
    torch.testing.assert_close(clipped(build, "parts"), whole, rtol=1e-3, atol=1e-4)
    if not build(small()).wants_closure:  # which a GradScaler refuses
        torch.testing.assert_close(clipped(build, "scaled"), whole, rtol=1e-3, atol=1e-4)


def test_hooks_are_called(build: Build) -> None:
    model, calls = small(), []
    optimizer = build(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(1))
    assert calls == ["before", "after"]


def test_what_is_frozen_or_has_no_gradient_stays(build: Build) -> None:
    model = small()
    model[3].weight.requires_grad_(False)
    optimizer = build(model, lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == {"0.weight", "0.bias", "3.bias", "5.weight", "5.bias"}
    frozen = point(model[:4])
    optimizer.zero_grad()
    advance(optimizer, lambda: functional.cross_entropy(model[5](draw(4, 6).float()), torch.arange(4)))
    assert torch.equal(point(model[:4]), frozen)


def test_layers_may_join_late(build: Build) -> None:
    model = small()
    optimizer = build(model, list(model[5].parameters()), schedule=Schedule(1, 4), lr=0.01)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(model[:4].parameters())})
    before = point(model[:4])
    train(model, optimizer, range(2, 8))
    assert not torch.equal(point(model[:4]), before)
    assert len(optimizer.coverage) == 3


@pytest.mark.parametrize("first", range(1, 6))
def test_a_layer_whose_gradient_comes_late_has_its_inverse_at_once(build: Build, first: int) -> None:
    """Also where no inverses are due in that step, and where its statistics have no inverse while another has."""
    model = small()
    optimizer = build(model, schedule=Schedule(1, 4), lr=0.01)

    def compute(step: int) -> Tensor:
        rest = draw(10, 8, seed=step).float()
        return functional.cross_entropy(model[3:](rest), torch.arange(10) % 4) if step < first else loss(model, step)

    for step in range(first + 2):
        before = point(model[:3])
        advance(optimizer, lambda step=step: compute(step))  # type: ignore[misc]
        assert torch.equal(point(model[:3]), before) == (step < first)
    assert any(name.startswith("inverse_") for name in optimizer.state[model[0].weight])


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = build(model)
    train(model, optimizer, range(2))
    state, before = copy.deepcopy(optimizer.state_dict()["state"]), point(model)
    for _ in range(2):
        hook = model[3].weight.register_hook(lambda g: g * math.nan)
        with caplog.at_level(logging.WARNING):
            advance(optimizer, lambda: loss(model, 0))
        hook.remove()
    assert "step skipped: the gradient of 3.weight is not finite" in caplog.text
    assert torch.equal(point(model), before)
    for a, b in zip(state.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a | b)
    assert optimizer.param_groups[0]["skipped"] == 2
    train(model, optimizer, range(2, 4))
    assert not torch.equal(point(model), before) and point(model).isfinite().all()


def test_too_many_in_a_row_end_the_training(build: Build) -> None:
    model = small()
    optimizer = build(model, patience=3)
    train(model, optimizer, range(1))
    for _ in range(2):
        advance(optimizer, lambda: loss(model, 0).mul(math.inf))
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row: lower lr, or look for NaN"):
        advance(optimizer, lambda: loss(model, 0).mul(math.inf))


def test_misuse(build: Build) -> None:
    model, other = small(), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is none of model=Sequential: .* serves one model"):
        build(model, [{"params": list(model.parameters())}, {"params": list(other.parameters())}])
    with pytest.raises(ValueError, match="no parameter has a gradient: call backward"):
        build(model).step(lambda: 0.0)
    for options, message in (
        ({"lr": -1.0}, "lr=-1.0: must be at least 0"),
        ({"momentum": 1.0}, "momentum=1.0: must be at least 0 and less than 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"damping": 0.0}, "damping=0.0: must be positive"),
        ({"patience": 0}, "patience=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(model, **options)
    with pytest.raises(ValueError, match=r"weight is complex: train its real view"):
        build(nn.Linear(2, 2, dtype=torch.complex64))
    sparse = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(ValueError, match=r"the gradient of weight is sparse: build the embedding with sparse=False"):
        advance(build(sparse), lambda: sparse(torch.tensor([0])).sum())


def test_a_changed_model_is_noticed(build: Build) -> None:
    model = small()
    optimizer = build(model, schedule=Schedule(1, 1))
    train(model, optimizer, range(1))
    old = model[5]
    model[5] = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"5\.weight is no longer a parameter of the model: build the optimiser anew"):
        advance(optimizer, lambda: loss(model, 0) + old(draw(2, 6).float()).sum())


def test_a_layer_that_is_used_late_or_never(build: Build) -> None:
    """First with gradients of zero and no call, then in a step without statistics, then in one of them."""
    model = small()
    spare = nn.Linear(4, 4)
    both = nn.ModuleList([model, spare])
    optimizer = build(both, lr=0.01, schedule=Schedule(statistics=4, inverses=40))
    for step in range(10):
        before = point(spare)

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x, y = batch(step)
            output = model(x)
            value = functional.cross_entropy(spare(output) if step > 4 else output, y)
            (value if step > 4 else value + 0.0 * sum(p.sum() for p in spare.parameters())).backward()
            return value

        optimizer.step(closure)
        assert torch.equal(point(spare), before) == (step <= 4)
        assert point(both).isfinite().all()


def test_what_is_frozen_later_stays_as_well(build: Build) -> None:
    """Whatever its momentum, and the decay of weights."""
    model = small()
    optimizer = build(model, lr=0.01, weight_decay=0.1)
    train(model, optimizer, range(3))
    frozen = [model[0].bias, model[3].weight, model[5].weight, model[5].bias]
    before = [p.requires_grad_(False).detach().clone() for p in frozen]
    moving = model[0].weight.detach().clone()
    train(model, optimizer, range(3, 6))
    assert all(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))
    assert not torch.equal(model[0].weight, moving)


def test_a_number_is_a_parameter_like_others(build: Build) -> None:
    model = small()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    model.nothing = nn.Parameter(torch.zeros(0, 3))
    optimizer = build(model, lr=0.01)
    for step in range(3):
        advance(optimizer, lambda step=step: loss(model, step) * model.temperature + model.nothing.sum())  # type: ignore[misc]
    assert float(model.temperature.detach()) != 1.0 and point(model).isfinite().all()


def test_a_step_that_overflows_is_scaled_or_skipped(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    """Curvature of a tiny loss, and then a loss of ordinary size: no parameter is lost, and none stands still."""
    for tiny, large in ((1e-12, 1.0), (1e-16, 1e6)):
        model = small()
        optimizer = build(model, lr=0.01, schedule=Schedule(1, 4), patience=20)
        for step in range(5):
            advance(optimizer, lambda step=step: loss(model, step) * tiny)  # type: ignore[misc]  # noqa: B023
        for step in range(5, 13):
            before = point(model)
            advance(optimizer, lambda step=step: loss(model, step) * large)  # type: ignore[misc]  # noqa: B023
        assert point(model).isfinite().all()
        if isinstance(optimizer.length, UnitEntries):
            assert not torch.equal(point(model), before) and point(model).norm() < 100


def test_a_state_of_another_kind_is_refused(build: Build) -> None:
    model = small()
    optimizer = build(model)
    train(model, optimizer, range(2))
    adam = torch.optim.Adam(small().parameters())
    with pytest.raises(ValueError, match="state_dict is not of an optimiser of blocks"):
        optimizer.load_state_dict(adam.state_dict())
    wider = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))
    with pytest.raises(ValueError, match=r"state_dict has the block .* where this optimiser has .*: load the state of"):
        build(wider).load_state_dict(optimizer.state_dict())


def test_parameters_that_were_frozen_at_first_are_told_of(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    model[0].requires_grad_(False)
    optimizer = build(model, schedule=Schedule(1, 4))
    train(model, optimizer, range(2))
    assert "stay as they are" not in caplog.text
    model[0].requires_grad_(True)
    train(model, optimizer, range(2, 9))
    assert caplog.text.count("0.weight and 1 more stay as they are: they were frozen when the optimiser was made") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": math.nan}, "damping=nan: must be positive"),
        ({"damping": "small"}, "damping='small': give a number, or a rule of damping"),
        ({"schedule": 5}, "schedule=5: give Schedule"),
        ({"length": "unit"}, "length='unit': give Length"),
        ({"lr": None}, "lr=None: give a number"),
    ],
)
def test_parts_of_another_type_are_refused(build: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(small(), **options)
    with pytest.raises(ValueError, match="model is a generator: give the module itself"):
        build(small().parameters())
