"""Steps whose statistics or inverses are not finite are skipped, and leave nothing behind."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import cases
from cases import draw
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.blocks import squarable
from quadric.optim.kfac import kfac
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2))


def step(model: nn.Module, optimizer: BlockDiagonal, number: int, factor: float = 1.0, of_inputs: float = 1.0) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (model(of_inputs * draw(8, 2, 5, seed=number % 3).float()) - 1).square().mean()
        (factor * value).backward()
        return value

    if optimizer.wants_closure:
        return float(optimizer.step(closure).detach())
    value = closure()
    optimizer.step()
    return float(value.detach())


def tensors(optimizer: BlockDiagonal) -> dict[tuple[int, str], Tensor]:
    return {
        (place, name): x.clone()
        for place, state in optimizer.state_dict()["state"].items()
        for name, x in state.items()
        if name != "unheard"
    }


@pytest.mark.parametrize("name", cases.FAMILY)
def test_one_step_of_huge_gradients_is_skipped(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = cases.FAMILY[name](model, lr=0.01, schedule=Schedule(1, 2))
    values = [step(model, optimizer, k) for k in range(6)]
    before, point = tensors(optimizer), [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, 6, 1e25)
    assert "step skipped: the square of the gradient of 0.weight, 3.weight, 5.weight is not finite" in caplog.text
    assert optimizer.param_groups[0]["skipped"] == optimizer.param_groups[0]["skipped_in_a_row"] == 1
    after = tensors(optimizer)
    assert all(torch.equal(x, after[key]) for key, x in before.items()) and before.keys() == after.keys()
    assert all(torch.equal(x, p.detach()) for x, p in zip(point, model.parameters(), strict=True))
    values += [step(model, optimizer, k) for k in range(6, 60)]
    assert values[-1] < 0.5 * values[0] and optimizer.param_groups[0]["skipped_in_a_row"] == 0


PER_EXAMPLE = partial(mini_block_fisher, blocks=MiniBlocks(per_example=True))


@pytest.mark.parametrize("build", [kfac, PER_EXAMPLE], ids=["kfac", "per example"])
def test_statistics_that_overflow_begin_anew(build: partial[BlockDiagonal], caplog: pytest.LogCaptureFixture) -> None:
    """Cotangents of 1e25 whose sum is small: the gradient does not show them."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = build(model, lr=0.01, schedule=Schedule(1, 2))

    def one(number: int, huge: float) -> None:
        optimizer.zero_grad()
        x = draw(4, 3, seed=number).float()
        output = model(torch.cat([x, x]))
        ((output - 1).square().mean() + huge * (output[:4] - output[4:]).sum()).backward()
        optimizer.step()

    for number in range(4):
        one(number, 0.0)
    inverses, before = tensors(optimizer), model.weight.detach().clone()
    one(4, 1e25)
    assert "step skipped: the curvature of weight is not finite" in caplog.text
    assert torch.equal(model.weight, before) and optimizer.param_groups[0]["skipped"] == 1
    kept = tensors(optimizer)
    assert all(torch.equal(x, kept[key]) for key, x in inverses.items() if not key[1].startswith("statistics_"))
    one(4, 0.0)
    for key, x in tensors(optimizer).items():
        assert x.isfinite().all(), key
    assert not torch.equal(model.weight, before)
    for number in range(5, 12):
        one(number, 0.0)
    assert model.weight.isfinite().all() and optimizer.param_groups[0]["skipped"] == 1


def test_inverses_that_are_not_finite_leave_those_there_are(caplog: pytest.LogCaptureFixture) -> None:
    """Damping of 1e-42 of a curvature of 1e-3 is nothing in float32, and a curvature of rank one has no inverse."""
    model = nn.Linear(2, 2, bias=False)
    optimizer = mini_block_fisher(model, lr=0.01, patience=3, schedule=Schedule(1, 1))

    def one() -> None:
        optimizer.zero_grad()
        model(torch.tensor([[1.0, 0.0]])).sum().mul(1e-3).backward()
        optimizer.step()

    one()
    inverse, before = tensors(optimizer)[0, "inverse_0"], model.weight.detach().clone()
    optimizer.param_groups[0]["damping"] = 1e-42
    for _ in range(2):
        one()
    assert "step skipped: the inverse of weight is not finite" in caplog.text
    assert torch.equal(tensors(optimizer)[0, "inverse_0"], inverse) and torch.equal(model.weight, before)
    with pytest.raises(FloatingPointError, match="the inverse of weight was not finite in 3 steps in a row: lower lr"):
        one()
    optimizer.param_groups[0]["damping"] = 0.03
    one()
    assert not torch.equal(model.weight, before)


def test_too_many_steps_of_huge_gradients_end_the_training() -> None:
    model = network()
    optimizer = kfac(model, patience=2)
    step(model, optimizer, 0, 1e25)
    with pytest.raises(FloatingPointError, match=r"the square of the gradient of 0\.weight, .* in 2 steps in a row"):
        step(model, optimizer, 0, 1e25)


def test_what_can_be_squared() -> None:
    for dtype, largest in ((torch.float32, 1e18), (torch.bfloat16, 1e18), (torch.float64, 1e150)):
        assert squarable([torch.tensor([largest, 1.0], dtype=dtype), torch.zeros(2, dtype=dtype)])
        assert not squarable([torch.zeros(2, dtype=dtype), torch.tensor([20 * largest**1.03, 1.0], dtype=dtype)])
        for wrong in (math.nan, math.inf, -math.inf):
            assert not squarable([torch.tensor([wrong, 1.0], dtype=dtype)])
