"""Which backward passes and which calls count: those that make a gradient of the weight, of examples, by its bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import draw
from quadric.optim.capture import Capture
from quadric.optim.kbfgs import kbfgs
from quadric.optim.kfac import KroneckerFactors, kfac
from quadric.optim.layers import find_layers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def capture_of(model: nn.Module) -> Capture:
    return Capture(model, find_layers(model, model.parameters()), lambda: True)


def loss(model: nn.Module) -> Tensor:
    return model(draw(5, 3).float()).square().sum(1).mean()


def counts(capture: Capture) -> list[list[int]]:
    """Of each layer the numbers of the passes that its calls are of."""
    taken = capture.take()
    return [[call.number for call in taken.get(layer, [])] for layer in capture.layers]


WATCHED: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "of inputs": lambda model, x: torch.autograd.grad(100 * model(x).sum(), x),
    "of inputs, added": lambda model, x: (100 * model(x).sum()).backward(inputs=[x]),
    "of parameters": lambda model, x: torch.autograd.grad(100 * model(x).sum(), list(model.parameters())),
}
"""Passes that add to no gradient of a parameter."""

MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 2, 2), nn.Tanh()),
    "recurrent": lambda: nn.Sequential(nn.GRU(3, 4, batch_first=True), Output()),
    "recurrent, dropped at random": lambda: nn.Sequential(nn.LSTM(3, 2, 2, dropout=0.1, batch_first=True), Output()),
    "cell": lambda: nn.Sequential(nn.Flatten(0, 1), nn.GRUCell(3, 2)),
}


class Output(nn.Module):
    """The first of a pair."""

    def forward(self, found: tuple[Tensor, Tensor]) -> Tensor:
        return found[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_pass_that_adds_to_no_gradient_is_not_in_the_statistics(name: str, watched: str, when: str) -> None:
    made = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = MODELS[name]()
        optimizer = kfac(model, lr=0.0)
        for part in ("before", "between", "after"):
            x = draw(6, 5, 3).float().requires_grad_()
            if watch and part == when:
                with torch.random.fork_rng():
                    WATCHED[watched](model, x)
            if part != "after":
                model(x).square().mean().backward()
        optimizer.step()
        assert all(layer.block.startswith("Kronecker") for layer in optimizer.coverage)
        made.append([x for numbers in optimizer.state.values() for x in numbers.values()])
    assert made[0] and len(made[0]) == len(made[1])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


def test_a_pass_of_a_step_whose_graph_serves_once_more() -> None:
    made = []
    for more in (False, True):
        model, x = network(), draw(5, 3).float().requires_grad_()
        optimizer = kfac(model)
        output = model(x)
        output.square().mean().backward(retain_graph=True)
        if more:
            torch.autograd.grad(100 * output.sum(), x)
        optimizer.step()
        made.append(optimizer.state[model[0].weight]["statistics_G"])
    assert torch.equal(*made)


def test_gradients_that_are_put_in_place_by_hand_have_calls() -> None:
    model = network()
    capture = capture_of(model)
    for _ in range(2):
        parameters = list(model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss(model), parameters), strict=True):
            p.grad = g
        taken = capture.take()
        for layer in capture.layers:
            (call,) = taken[layer]
            torch.testing.assert_close(call.cotangent.T @ call.inputs, layer.weight.grad)
        model.zero_grad()


def test_a_frozen_weight_has_the_calls_of_its_bias() -> None:
    model = network()
    capture = capture_of(model)
    model[0].weight.requires_grad_(False)
    loss(model).backward()
    torch.autograd.grad(loss(model), model[2].weight)
    assert counts(capture) == [[0], [0]]
    model[0].weight.requires_grad_(True)
    model.zero_grad()
    loss(model).backward()
    assert counts(capture) == [[0], [0]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_of_recomputed_activations_are_there_once(reentrant: bool) -> None:
    model, x = network(), draw(5, 3).float().requires_grad_()
    capture = capture_of(model)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    taken = capture.take()
    for layer in capture.layers:
        made = sum(call.cotangent.T @ call.inputs for call in taken[layer])
        torch.testing.assert_close(made, layer.weight.grad)


@pytest.mark.parametrize("name", MODELS)
def test_calls_of_no_examples_are_no_calls(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    capture = capture_of(model)
    model(torch.ones(2, 5, 3)).sum().backward()
    model(torch.ones(0, 5, 3)).sum().backward()
    assert {number for found in counts(capture) for number in found} == {0}
    assert not capture.take()
    model(torch.ones(0, 5, 3)).sum().backward()
    assert not capture.take()


class Tied(nn.Module):
    """Two linear layers of one weight, each with its own bias or the second with none."""

    def __init__(self, bias: bool, linear: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.second = linear(3, 3), linear(3, 3, bias=bias)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def wide(size: int, outputs: int, bias: bool = True) -> nn.Module:
    return nn.Conv1d(size, outputs, 2, padding=1, bias=bias)


@pytest.mark.parametrize(("build", "sharing"), [("kfac", "expand"), ("kfac", "reduce"), ("kbfgs", "expand")])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_counts_its_own_bias_alone(build: str, sharing: str, bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Tied(bias, nn.Linear).double(), draw(5, 3)
    own = kfac(model, lr=0.0, factors=KroneckerFactors(sharing=sharing))  # type: ignore[arg-type]
    optimizer = own if build == "kfac" else kbfgs(model, lr=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        one, none = x.new_ones(5, 1), x.new_zeros(5, 1)
        first, second = torch.cat([x, one], 1), torch.cat([model.first(x).tanh(), none], 1)
    rows = torch.cat([first, second]) if sharing == "expand" else (first + second) / 2
    A = optimizer.state[model.first.weight]["statistics_A"]
    torch.testing.assert_close(A.tril(), (rows.T @ rows / len(rows)).tril())


def test_a_tied_kernel_counts_its_own_bias_alone() -> None:
    torch.manual_seed(0)
    model, x = Tied(True, wide).double(), draw(5, 3, 6)
    optimizer = kfac(model, lr=0.0)
    model(x).square().mean().backward()
    optimizer.step()
    A = optimizer.state[model.first.weight]["statistics_A"]
    assert float(A[-1, -1]) == pytest.approx(7 / (7 + 8))
    rows = nn.functional.unfold(nn.functional.pad(x, (1, 1)).unsqueeze(2), (1, 2)).sum((0, 2)) / (5 * (7 + 8))
    assert sorted(A[-1, :-1].tolist()) == pytest.approx(sorted(rows.tolist()))


def test_tied_cells_have_each_their_bias() -> None:
    """In the sums of outputs as well, which K-BFGS compares."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.RNNCell(2, 3), nn.RNNCell(2, 3)
            self.second.weight_ih = self.first.weight_ih

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x, self.first(x))

    torch.manual_seed(0)
    model, x = Cells().double(), draw(5, 2)
    layers = find_layers(model, model.parameters())
    capture = Capture(model, layers, lambda: True, layers)
    model(x).sum().backward()
    found = {call.biased: call for call in capture.take()[layers[0]]}
    assert layers[0].weight is model.first.weight_ih and len(found) == 2
    for biased, bias in ((True, model.first.bias_ih), (False, model.second.bias_ih)):
        torch.testing.assert_close(found[biased].outputs, (x @ model.first.weight_ih.T + bias).sum(0).detach())
