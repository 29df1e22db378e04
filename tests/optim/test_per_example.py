from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cases import draw
from quadric.model.recurrent import LSTM
from quadric.optim.blocks import Call, Seen
from quadric.optim.layers import find_layers
from quadric.optim.length import Natural
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher
from quadric.optim.per_example import factors_of_examples
from reference import kronecker, mini_blocks


def examples_gradients(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of the layer, the gradient of each example's loss, flat."""
    found = []
    for n in range(len(x)):
        model.zero_grad()
        kronecker.wave(model(x[n : n + 1]), y[n : n + 1]).backward()
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    model.zero_grad()
    return found


def blocks_of(layer: nn.Module, options: MiniBlocks) -> tuple[list[list[int]], int]:
    """The entries of each block, and how many kinds of them there are if those of a kind are averaged."""
    matrix = layer.weight[0, 0].numel() == 1
    kind = "rows" if matrix else "kernels"
    inputs, bias = layer.weight[0].numel(), layer.bias is not None
    count = -(-inputs // options.largest)
    widths = [inputs // count + (k < inputs % count) for k in range(count)]
    widths[-1] += bias
    alike = len(widths) if matrix and options.averaged else 0
    return mini_blocks.groups(kind, tuple(layer.weight.shape), bias, widths), alike


def moved(
    model: nn.Module, layer: nn.Module, options: MiniBlocks, batches: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A step's momentum, which is its gradient, and its direction."""
    optimizer = mini_block_fisher(model, lr=1.0, damping=0.1, momentum=0.0, length=Natural(), blocks=options)
    before = torch.cat([p.detach().flatten() for p in layer.parameters()])
    for x, y in batches:
        (kronecker.wave(model(x), y) / len(batches)).backward()
    gradient = torch.cat([p.grad.flatten() for p in layer.parameters()])
    assert not [line for line in optimizer.coverage if "batch" in line.why and "weight" in line.parameters[0]]
    optimizer.step()
    return gradient, before - torch.cat([p.detach().flatten() for p in layer.parameters()])


@pytest.mark.parametrize("name", kronecker.LAYERS)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    averaged=st.booleans(),
    largest=st.sampled_from([2, 100]),
    exponent=st.sampled_from([-1.0, -0.5]),
    passes=st.sampled_from([1, 2]),
)
def test_the_direction_is_that_of_the_gradients_one_by_one(
    name: str, seed: int, averaged: bool, largest: int, exponent: float, passes: int
) -> None:
    build, shape = kronecker.LAYERS[name]
    layer = build().double()
    model, options = nn.Sequential(layer), MiniBlocks(averaged, largest, exponent, per_example=True)
    x = draw(*shape, seed=seed)[: len(draw(*shape)) // passes * passes]
    y = draw(*model(x).shape, seed=seed + 1)
    single = examples_gradients(model, layer, x, y)
    gradient, step = moved(model, layer, options, list(zip(x.chunk(passes), y.chunk(passes), strict=True)))
    blocks, alike = blocks_of(layer, options)
    shift = 0.1 * float(torch.stack(single).square().mean())
    torch.testing.assert_close(step, mini_blocks.direction(single, gradient, blocks, alike, shift, exponent))


@pytest.mark.parametrize("averaged", [True, False])
def test_layers_that_are_called_at_every_step_have_one_gradient_an_example(averaged: bool) -> None:
    torch.manual_seed(0)
    model = LSTM(3, 2, [3, 4], window=(2, 2)).double()
    layer, options = model.hidden[0].layers[1].recurrent, MiniBlocks(averaged, per_example=True)
    x = draw(4, 8, 3)
    y = draw(*model(x).shape, seed=1)
    single = examples_gradients(model, layer, x, y)
    gradient, step = moved(model, layer, options, [(x, y)])
    blocks, alike = blocks_of(layer, options)
    shift = 0.1 * float(torch.stack(single).square().mean())
    torch.testing.assert_close(step, mini_blocks.direction(single, gradient, blocks, alike, shift, -1.0))


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_has_the_bias_of_its_own_module(averaged: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3, bias=bias)).double()
    model[2].weight = model[0].weight
    options, x, y = MiniBlocks(averaged, per_example=True), draw(4, 3), draw(4, 3, seed=1)
    single = examples_gradients(model, model[0], x, y)
    gradient, step = moved(model, model[0], options, [(x, y)])
    blocks, alike = blocks_of(model[0], options)
    shift = 0.1 * float(torch.stack(single).square().mean())
    torch.testing.assert_close(step, mini_blocks.direction(single, gradient, blocks, alike, shift, -1.0))


@pytest.mark.parametrize("averaged", [True, False])
def test_a_few_examples_at_a_time_are_as_good(averaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, steps = draw(6, 5, 4), draw(6, 5, 3, seed=1), []
    for chunk in (2**22, 40):
        monkeypatch.setattr("quadric.optim.convolution._CHUNK", chunk)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3)).double()
        steps.append(moved(model, model[0], MiniBlocks(averaged, per_example=True), [(x, y)])[1])
    torch.testing.assert_close(steps[0], steps[1])


@pytest.mark.parametrize("wide", [True, False])
def test_what_is_laid_out_at_a_time_is_bounded(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, shape in ((nn.Linear(9, 8), (50, 3, 9)), (nn.Conv2d(2, 4, 3), (50, 2, 4, 5))):
        (layer,) = find_layers(module, module.parameters())
        x = draw(*shape).float()
        calls = [Call(x, module(x).detach())]
        monkeypatch.setattr("quadric.optim.convolution._CHUNK", 1000)
        for a, g in factors_of_examples(layer, calls, torch.float32, wide):
            gradients = len(a) * a.shape[2] * g.shape[2]
            assert 2 * a.numel() + g.numel() + wide * gradients <= 1000


def test_of_one_example_both_are_the_same() -> None:
    ends = []
    for per_example in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
        optimizer = mini_block_fisher(model, blocks=MiniBlocks(per_example=per_example))
        for step in range(3):
            optimizer.zero_grad()
            kronecker.wave(model(draw(1, 2, 5, seed=step)), draw(1, 4)).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1])


def test_layers_without_calls_have_blocks_of_the_batch_and_say_so() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GRU(4, 2), nn.Linear(2, 2))
    optimizer = mini_block_fisher(model, lr=0.01, blocks=MiniBlocks(per_example=True))
    x = torch.randn(5, 3)

    def forward() -> Tensor:
        return functional.linear(model[:3](x)[0], model[3].weight, model[3].bias)

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        forward().square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    found = {line.parameters[0]: (line.block, line.why) for line in optimizer.coverage}
    assert found["0.weight"] == ("ExampleAveraged", "Linear: a matrix")
    assert found["1.weight"] == ("Entries", "LayerNorm: not known as a linear map; of the batch's gradient")
    assert found["2.weight_ih_l0"] == ("ExampleAveraged", "GRU: a matrix")
    assert found["3.weight"] == ("Averaged", "Linear: a matrix; its module is not called: of the batch's gradient")


@pytest.mark.parametrize("averaged", [True, False])
def test_a_rank_without_examples_has_a_share_of_nothing(averaged: bool) -> None:
    for module in (nn.Linear(3, 2), nn.Conv1d(2, 3, 2)):
        (layer,) = find_layers(module, module.parameters())
        block, numbers = MiniBlocks(averaged, per_example=True)(layer), dict[str, Tensor]()
        block.observe(numbers, Seen(list(layer.parameters), [], 0), 1.0)
        assert all((x == 0).all() for x in numbers.values()) and len(block.inverses(numbers)) == len(numbers) / 2
        numbers["statistics_0"].fill_(2.0)
        block.observe(numbers, Seen(list(layer.parameters), [], 0), 0.25)
        assert (numbers["statistics_0"] == 1.5).all()


def test_positions_need_the_same_examples() -> None:
    model = nn.Linear(3, 2)
    optimizer = mini_block_fisher(model, blocks=MiniBlocks(per_example=True))
    (model(torch.ones(4, 3)).sum() + model(torch.ones(2, 3)).sum()).backward()
    with pytest.raises(ValueError, match=r"weight is called with \[2, 4\] examples in one pass.*per_example=False"):
        optimizer.step()
