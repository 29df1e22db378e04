"""Steps by a scaled loss are those without the scale: of gradients, of calls and of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import draw
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.kbfgs import kbfgs, kbfgs_l
from quadric.optim.kfac import KroneckerFactors, kfac
from quadric.optim.length import KLClip, Natural, UnitEntries
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher
from quadric.optim.shampoo import shampoo

Build = Callable[..., BlockDiagonal]
LR = 1e-3
MEMBERS: dict[str, Build] = {
    "kfac, pi one": partial(kfac, factors=KroneckerFactors(pi="one"), length=Natural()),
    "kfac, reduce": partial(kfac, factors=KroneckerFactors(sharing="reduce"), length=KLClip(1e-4)),
    "kfac, unit entries": partial(kfac, length=UnitEntries()),
    "per example": partial(mini_block_fisher, blocks=MiniBlocks(per_example=True), length=Natural()),
    "per example, rows": partial(mini_block_fisher, blocks=MiniBlocks(False, per_example=True), length=Natural()),
    "of the batch": partial(mini_block_fisher, length=Natural()),
    "shampoo": partial(shampoo, length=Natural()),
}


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()


def loss(model: nn.Module, step: int, some: slice = slice(None)) -> Tensor:
    return (model(draw(8, 2, 5, seed=step)[some]) - 1).square().mean()


def point(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def scaled(
    build: Build, scaler: torch.amp.GradScaler, *, unscale: bool = False, steps: int = 6, **options: Any
) -> Tensor:
    model = network()
    optimizer = build(model, lr=LR, schedule=Schedule(1, 2), **options)
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss(model, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return point(model)


def grad_scaler(enabled: bool = True, growth: int = 2) -> torch.amp.GradScaler:
    """Of 2^10 at first, and twice as much after every two steps."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth, enabled=enabled)


@pytest.mark.parametrize("build", MEMBERS.values(), ids=list(MEMBERS))
def test_a_scaler_changes_nothing(build: Build) -> None:
    plain = scaled(build, grad_scaler(enabled=False))
    assert not torch.equal(plain, point(network()))
    torch.testing.assert_close(scaled(build, grad_scaler()), plain, rtol=0, atol=1e-12)
    scaler = grad_scaler()
    found = scaled(build, scaler, unscale=True, loss_scale=scaler.get_scale)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    scaler = grad_scaler()
    found = scaled(build, scaler, loss_scale=scaler.get_scale)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [kbfgs, kbfgs_l])
def test_pairs_of_a_scaled_loss(build: Build) -> None:
    ends = []
    for scale in (1.0, 3.0):
        model = network()
        optimizer = build(model, lr=LR, length=Natural(), loss_scale=lambda scale=scale: scale)
        for step in range(4):

            def closure(step: int = step, model: nn.Module = model, scale: float = scale) -> Tensor:
                model.zero_grad()
                value = loss(model, step)
                (scale * value).backward()
                for p in model.parameters():
                    p.grad /= scale
                return value

            optimizer.step(closure)
        ends.append(point(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-9)


def test_accumulated_passes_are_one() -> None:
    """Means over parts, divided by their number: no scale of the loss."""
    ends = []
    for parts in (1, 2, 4):
        model = network()
        optimizer = MEMBERS["kfac, pi one"](model, lr=LR)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(parts):
                size = 8 // parts
                (loss(model, step, slice(part * size, (part + 1) * size)) / parts).backward()
            optimizer.step()
        ends.append(point(model))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-12)


def test_an_overflow_is_left_to_the_scaler() -> None:
    """The scale is halved, and no step counted: of 2^10 with numbers beyond 2^1020 they overflow."""
    model = network()
    optimizer, scaler = kfac(model, lr=LR, patience=1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, scales = point(model), []
    for step in range(12):
        optimizer.zero_grad()
        (scaler.scale(loss(model, step)) * (math.inf if step < 8 else 1.0)).backward()
        assert scaler.step(optimizer) is None
        scaler.update()
        scales.append(scaler.get_scale())
        assert torch.equal(point(model), before) == (step < 8)
    assert scales == [2.0 ** max(9 - k, 2) for k in range(12)]
    assert (optimizer.param_groups[0]["skipped"], optimizer.param_groups[0]["step"]) == (0, 4)


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(ValueError, match=r"unscale_\(\) was called before .* loss_scale=scaler\.get_scale"):
        scaled(kfac, grad_scaler(), unscale=True)
    scaled(mini_block_fisher, grad_scaler(), unscale=True)  # has no calls
    with pytest.raises(ValueError, match=r"loss_scale\(\) is 0\.0: it must be positive"):
        scaled(kfac, grad_scaler(enabled=False), loss_scale=lambda: 0.0)
    model, scaler = network(), grad_scaler()
    optimizer = kbfgs(model)
    scaler.scale(loss(model, 0)).backward()
    with pytest.raises(ValueError, match=r"scaler\.step\(optimizer, closure\): .* call optimizer\.step\(closure\)"):
        scaler.step(optimizer, lambda: loss(model, 0))
    half = nn.Linear(2, 2).half()
    optimizer, scaler = kfac(half), grad_scaler()
    scaler.scale(half(torch.ones(3, 2).half()).sum()).backward()
    with pytest.raises(ValueError, match="float16, and lose digits unscaled: keep the parameters in float32"):
        scaler.step(optimizer)
