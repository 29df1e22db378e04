from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cases import draw
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.damping import Damping, LevenbergMarquardt
from quadric.optim.layers import Kind, find_layers
from quadric.optim.length import KLClip, Length, Natural, UnitEntries
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher


def kinds(module: nn.Module) -> dict[str, tuple[Kind, bool]]:
    return {layer.name: (layer.kind, layer.bias is not None) for layer in find_layers(module, module.parameters())}


def test_layers_of_torch() -> None:
    assert kinds(nn.Linear(2, 3)) == {"weight": (Kind.MATRIX, True)}
    assert kinds(nn.Bilinear(2, 3, 4)) == {"weight": (Kind.OTHER, False), "bias": (Kind.OTHER, False)}
    assert kinds(nn.Conv2d(2, 3, 1)) == {"weight": (Kind.MATRIX, True)}
    assert kinds(nn.Conv1d(2, 3, 3, bias=False)) == {"weight": (Kind.KERNELS, False)}
    assert kinds(nn.ConvTranspose2d(2, 3, 1)) == {"weight": (Kind.KERNELS, True)}
    assert kinds(nn.BatchNorm1d(3)) == {"weight": (Kind.OTHER, False), "bias": (Kind.OTHER, False)}
    assert kinds(nn.LSTMCell(2, 3)) == {"weight_ih": (Kind.MATRIX, True), "weight_hh": (Kind.MATRIX, True)}
    lstm = kinds(nn.LSTM(2, 3, 2, bidirectional=True, proj_size=1))
    assert len(lstm) == 12 and set(lstm.values()) == {(Kind.MATRIX, True), (Kind.MATRIX, False)}
    assert {name for name, (_, bias) in lstm.items() if not bias} == {name for name in lstm if "_hr_" in name}
    apart = kinds(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    assert apart["k_proj_weight"] == (Kind.MATRIX, False) and apart["in_proj_bias"] == (Kind.OTHER, False)
    assert apart["out_proj.weight"] == (Kind.MATRIX, True)


def test_tied_parameters_are_in_one_layer() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False)])
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model[2].weight = model[0].weight
    assert kinds(model) == {"0.weight": (Kind.MATRIX, True)}
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].bias = model[0].bias
    assert kinds(model) == {"0.weight": (Kind.MATRIX, True), "1.weight": (Kind.MATRIX, False)}


def test_when_inverses_are_made() -> None:
    schedule = Schedule(statistics=2, inverses=10)
    assert [step for step in range(32) if schedule.refreshes(step)] == [0, 1, 2, 4, 8, 10, 20, 30]
    assert [schedule.share(n) for n in (0, 1, 9)] == [1.0, 0.5, 0.1] and schedule.share(99) == pytest.approx(0.1)
    for options, message in (
        ({"statistics": 0}, "statistics=0: give a number of steps, 1 at least"),
        ({"inverses": 2.5}, "inverses=2.5: give a whole number"),
        ({"decay": 1.0}, "decay=1.0: must be at least 0 and less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(**options)


def quadratic(
    length: Length, lr: float, momentum: float = 0.0, **options: float | Damping
) -> tuple[nn.Module, BlockDiagonal]:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=k))
    return module, mini_block_fisher(module, lr=lr, momentum=momentum, length=length, **options)


def moved(length: Length, lr: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer: its step and its gradient."""
    module, optimizer = quadratic(length, lr)
    module(draw(6, 4, seed=9)).square().mean().backward()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    steps = [b - p.detach() for b, p in zip(before, module.parameters(), strict=True)]
    gradients = [p.grad for p in module.parameters()]
    return [torch.cat([w.flatten(), b]) for w, b in zip(steps[::2], steps[1::2], strict=True)], [
        torch.cat([w.flatten(), b]) for w, b in zip(gradients[::2], gradients[1::2], strict=True)
    ]


def test_lengths_of_steps() -> None:
    natural, gradients = moved(Natural(), 0.5)
    unit, _ = moved(UnitEntries(), 0.5)
    for step, same in zip(natural, unit, strict=True):
        assert float(same.square().mean().sqrt()) == pytest.approx(0.5)
        torch.testing.assert_close(same / same.norm(), step / step.norm())
    foreseen = 0.5 * sum(float(d @ g) for d, g in zip(natural, gradients, strict=True))  # d is the step over lr
    clipped, _ = moved(KLClip(foreseen / 9), 0.5)
    for step, shorter in zip(natural, clipped, strict=True):
        torch.testing.assert_close(shorter, step / 3)
    free, _ = moved(KLClip(2 * foreseen), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(free, natural, strict=True))
    with pytest.raises(ValueError, match=r"most=0\.0: must be positive"):
        KLClip(0.0)


def test_a_step_of_nothing_is_no_step() -> None:
    for length in (Natural(), KLClip(), UnitEntries()):
        module, optimizer = quadratic(length, 0.5)
        (0.0 * module(draw(6, 4))).sum().backward()
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
        assert all(torch.equal(b, p.detach()) for b, p in zip(before, module.parameters(), strict=True))


def test_momentum_is_of_the_gradient() -> None:
    """m <- 0.8 m + g, d = P m, by hand."""
    module, optimizer = quadratic(Natural(), 0.1, momentum=0.8, damping=0.5)
    m = [torch.zeros_like(p) for p in module.parameters()]
    blocks = [MiniBlocks()(layer) for layer in find_layers(module, module.parameters())]
    for step in range(4):
        module.zero_grad()
        module(draw(6, 4, seed=step)).square().mean().backward()
        for buffer, p in zip(m, module.parameters(), strict=True):
            buffer.mul_(0.8).add_(p.grad)
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
        for k, block in enumerate(blocks):
            expected = block.apply(optimizer.state[block.layer.weight], m[2 * k : 2 * k + 2])
            for j, d in enumerate(expected):
                p = block.layer.parameters[j].detach()
                torch.testing.assert_close(before[2 * k + j] - p, 0.1 * d)


def test_statistics_of_a_pass_before_the_first_step() -> None:
    """All minibatches of it count the same."""
    module, optimizer = quadratic(Natural(), 0.1)
    D = []
    for step in range(30):
        module.zero_grad()
        module(draw(6, 4, seed=step)).square().mean().backward()
        D.append(torch.cat([module[0].weight.grad, module[0].bias.grad[:, None]], 1))
        optimizer.observe()
    found = optimizer.state[module[0].weight]["statistics_0"].tril()
    torch.testing.assert_close(found, torch.stack([d.T @ d / 3 for d in D]).mean(0).tril())
    assert optimizer.param_groups[0]["observed"] == 30 and optimizer.param_groups[0]["step"] == 0
    optimizer.step()
    assert math.isfinite(module[0].weight.sum().item())


def test_damping_that_follows_the_loss() -> None:
    """Up where the loss falls by less than is foreseen, down where by more; by hand, with the dense blocks."""
    rule = LevenbergMarquardt(0.5)
    for lr, expected in ((1e-3, 0.5 * rule.drop), (1.5, 0.5 * rule.boost)):
        module, optimizer = quadratic(Natural(), lr, damping=rule)
        x = 0.3 * draw(6, 4, seed=3)

        def closure(
            module: nn.Module = module, optimizer: BlockDiagonal = optimizer, x: torch.Tensor = x
        ) -> torch.Tensor:
            optimizer.zero_grad()
            value = module(x).square().mean()
            value.backward()
            return value

        value = float(closure())
        gradients = [p.grad.clone() for p in module.parameters()]
        blocks = [MiniBlocks()(layer) for layer in find_layers(module, module.parameters())]
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step(closure)
        foreseen = 0.0
        for k, block in enumerate(blocks):
            part = slice(2 * k, 2 * k + 2)
            d = [p.detach() - b for p, b in zip(block.layer.parameters, before[part], strict=True)]
            g, numbers = gradients[part], optimizer.state[block.layer.weight]
            S = numbers["statistics_0"].tril() + numbers["statistics_0"].tril(-1).T
            damped = S + 0.5 * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
            D = torch.cat([d[0], d[1][:, None]], 1)
            foreseen += float(sum((a * b).sum() for a, b in zip(g, d, strict=True)) + 0.5 * (D @ damped * D).sum())
        ratio = (float(module(x).square().mean()) - value) / foreseen
        assert rule.update(0.5, ratio) == expected == optimizer.param_groups[0]["damping"]
        assert all(torch.equal(g, p.grad) for g, p in zip(gradients, module.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"it follows the loss after a step; call step\(closure\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("returned", "found"),
    [(None, "None"), (torch.ones(3), r"a tensor of shape \(3,\)"), ("0.5", "'0.5'")],
    ids=["nothing", "several", "text"],
)
def test_a_closure_that_returns_no_loss(returned: object, found: str) -> None:
    module, optimizer = quadratic(Natural(), 0.1, damping=LevenbergMarquardt(0.5))

    def closure() -> object:
        optimizer.zero_grad()
        module(draw(6, 4)).square().mean().backward()
        return returned

    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=f"closure returned {found}, and damping follows the loss: have it return"):
        optimizer.step(closure)
    assert all(torch.equal(b, p.detach()) for b, p in zip(before, module.parameters(), strict=True))
    module, optimizer = quadratic(Natural(), 0.1)
    assert optimizer.step(closure) is returned  # which nobody wants to know


def test_blocks_that_memory_has_no_room_for() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(30_000, 400, bias=False))
    with pytest.raises(ValueError, match=r"1\.weight alone takes .* for 400 of 30,000 x 30,000: choose av"):
        mini_block_fisher(module, blocks=MiniBlocks(averaged=False, largest=30_000))
    assert len(mini_block_fisher(module).coverage) == 2
