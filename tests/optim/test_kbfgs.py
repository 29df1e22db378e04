from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import draw
from quadric.comm.communicator import Solo
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.blocks import Call, Numbers, Seen
from quadric.optim.damping import LevenbergMarquardt
from quadric.optim.kbfgs import QuasiNewton, kbfgs, kbfgs_l
from quadric.optim.length import Natural
from quadric.optim.second_pass import compare
from reference import dense
from reference.quasi_newton import Twin

MEMORIES = (None, 3)


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=(1, 2), padding=1, bias=bias),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Linear(16, 5, bias=bias),
        nn.Tanh(),
        nn.Linear(5, 2, bias=bias),
    ).double()


def closure_of(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (module(x) - 1).square().sum() / len(x)
        value.backward()
        return value

    return closure


class Watched:
    """The inputs, outputs and gradients there of the last pass, by autograd alone."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        for place, part in enumerate(module):
            self.inputs[place] = x.detach()
            x = part(x.clone())
            self.outputs[place] = x
            x.retain_grad()
        (x - 1).square().sum().div(len(x)).backward()
        self.gradients = {place: z.grad for place, z in self.outputs.items()}
        self.outputs = {place: z.detach() for place, z in self.outputs.items()}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [0.02, 0.5])
def test_steps_are_those_of_the_twin(memory: int | None, bias: bool, damping: float) -> None:
    """Twelve steps of a network, H_a first by inverses and then by updates, against loops over dense matrices."""
    module = network(bias)
    schedule = Schedule(statistics=1, inverses=4, decay=0.7)
    blocks = QuasiNewton(memory=memory, start=3)
    optimizer = kbfgs(module, lr=0.3, momentum=0.5, damping=damping, blocks=blocks, schedule=schedule, length=Natural())
    twins = {place: Twin(module[place], memory, damping, 3) for place in (0, 3, 5)}
    momenta: dict[int, Tensor] = {}
    for step in range(12):
        x, share = draw(6, 2, 3, 6, seed=step), schedule.share(step)
        other = copy.deepcopy(module)
        first = Watched(other, x)
        before = {place: matrix(module[place], module[place].weight, module[place].bias) for place in twins}
        optimizer.step(closure_of(module, optimizer, x))
        moved = copy.deepcopy(module)
        second = Watched(moved, x)
        for place, twin in twins.items():
            twin.first(first.inputs[place], share, schedule.refreshes(step))
            D = matrix(other[place], other[place].weight.grad, other[place].bias.grad if bias else None)
            momenta[place] = 0.5 * momenta.get(place, 0) + D
            found = before[place] - matrix(module[place], module[place].weight, module[place].bias)
            torch.testing.assert_close(found, 0.3 * twin.direction(momenta[place]), rtol=1e-7, atol=1e-9)
            outputs = first.outputs[place], second.outputs[place]
            twin.second(outputs, (first.gradients[place], second.gradients[place]), share)
    assert all(len(twin.pairs) == 12 for twin in twins.values())


def matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    parts = [weight.detach().flatten(1)] + ([] if bias is None else [bias.detach().unsqueeze(1)])
    return torch.cat(parts, 1)


def of(optimizer: BlockDiagonal, place: int = 0) -> tuple[Any, Numbers]:
    """A block and its numbers."""
    block = optimizer._blocks[place]
    return block, optimizer.state[block.layer.weight]


def H_g(optimizer: BlockDiagonal) -> Tensor:
    block, numbers = of(optimizer)
    return block._from_left(numbers, torch.eye(block.outputs, dtype=numbers["y"].dtype))


@pytest.mark.parametrize("memory", [None, 100])
def test_on_a_quadratic_H_g_becomes_the_inverse_of_the_hessian_at_the_outputs(memory: int | None) -> None:
    """Of the loss (z - t)' Q (z - t) / 2; along pairs of a batch each, which are exact."""
    module, Q = nn.Linear(6, 4).double(), dense.random_spd(4, condition=20.0, seed=1)
    optimizer = kbfgs(
        module,
        lr=0.5,
        momentum=0.0,
        damping=1e-4,
        blocks=QuasiNewton(memory=memory),
        schedule=Schedule(decay=0.0),
        length=Natural(),
    )
    for step in range(400):
        x, t = draw(8, 6, seed=step), draw(8, 4, seed=1000 + step)

        def closure(x: Tensor = x, t: Tensor = t) -> Tensor:
            optimizer.zero_grad()
            error = module(x) - t
            value = 0.5 * (error @ Q * error).sum() / len(x)
            value.backward()
            return value

        optimizer.step(closure)
    torch.testing.assert_close(H_g(optimizer), torch.linalg.inv(Q), rtol=0, atol=1e-6)


LOOKS = st.lists(st.tuples(st.integers(0, 2**31), st.floats(-3, 3)), min_size=1, max_size=6)


@pytest.mark.parametrize("memory", MEMORIES)
@given(looks=LOOKS, damping=st.sampled_from([1e-4, 0.03, 0.9, 2.0]), share=st.sampled_from([0.1, 1.0]))
def test_inverses_stay_positive_definite(
    memory: int | None, looks: list[tuple[int, float]], damping: float, share: float
) -> None:
    """By pairs of any curvature, and inputs of which the statistics know nothing."""
    module = nn.Linear(4, 3).double()
    optimizer = kbfgs(module, damping=damping, blocks=QuasiNewton(memory=memory))
    optimizer.step(closure_of(module, optimizer, draw(5, 4)))
    block, numbers = of(optimizer)
    for seed, size in looks:
        z, y, a = draw(3, seed=seed), draw(3, seed=seed + 1) * 10**size, draw(5, seed=seed + 2)
        zero = torch.zeros_like(z)
        one = torch.ones(1, dtype=z.dtype)
        block.learn(numbers, [z, y, a, one], [zero, zero, a, one], share, damping)
        for H in (numbers["inverse_A"], H_g(optimizer)):
            values = torch.linalg.eigvalsh((H + H.T) / 2)
            assert values[0] > -1e-9 * values[-1]


@pytest.mark.parametrize("memory", MEMORIES)
def test_pairs_of_no_use_are_skipped(memory: int | None) -> None:
    module = nn.Linear(4, 3).double()
    optimizer = kbfgs(module, lr=0.0, blocks=QuasiNewton(memory=memory))
    optimizer.step(closure_of(module, optimizer, draw(5, 4)))
    assert torch.equal(H_g(optimizer), torch.eye(3, dtype=torch.float64))  # without a step there is no pair
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(closure_of(module, optimizer, draw(5, 4)))
    learnt, (block, numbers) = H_g(optimizer), of(optimizer)
    assert not torch.equal(learnt, torch.eye(3, dtype=torch.float64))
    s, y, steep = draw(3, seed=1), draw(3, seed=2), torch.tensor(1e9).double()
    averages = numbers["s"].clone(), numbers["y"].clone(), numbers["squares"].clone()
    for wrong in ((s * math.nan, y), (s, y * math.inf)):
        block._learn_pair(numbers, wrong, 0 * steep, 0.1, 0.1)
        assert torch.equal(H_g(optimizer), learnt)
        assert all(torch.equal(numbers[k], kept) for k, kept in zip(("s", "y", "squares"), averages, strict=True))
    scale = numbers.get("scale", steep).clone()
    block._learn_pair(numbers, (s, y), steep, 0.1, 0.1)  # of too little curvature for such a gradient
    if memory is None:
        assert torch.equal(H_g(optimizer), learnt)
    else:
        assert len(numbers["pairs_s"]) == 1 and not torch.equal(numbers["scale"], scale)
    block._learn_pair(numbers, (s, y), 0 * steep, 0.1, 0.1)
    assert not torch.equal(H_g(optimizer), learnt) and len(numbers.get("pairs_s", "12")) == 2


def test_a_second_pass_that_is_not_finite_does_no_harm() -> None:
    module = network()
    optimizer = kbfgs(module, lr=0.01)
    x = draw(6, 2, 3, 6)
    for _ in range(2):
        optimizer.step(closure_of(module, optimizer, x))
    before = [H_g(optimizer).clone(), of(optimizer)[1]["s"].clone()]
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        value = (module(x) - 1).square().sum() * (math.nan if calls == 2 else 1 / len(x))
        value.backward()
        return value

    optimizer.step(closure)
    assert calls == 2 and torch.equal(H_g(optimizer), before[0]) and torch.equal(of(optimizer)[1]["s"], before[1])
    for _ in range(20):
        value = optimizer.step(closure_of(module, optimizer, x))
    assert value.isfinite() and not torch.equal(H_g(optimizer), before[0])


class Alike(Solo):
    """Two ranks that hold the same."""

    size = 2

    def sum_(self, *tensors: Tensor) -> None:
        torch._foreach_mul_(tensors, 2.0)


def test_ranks_learn_from_the_means_of_theirs() -> None:
    learnt = []
    for communicator in (Solo(), Alike()):
        torch.manual_seed(0)
        module = nn.Linear(4, 3).double()
        optimizer = kbfgs(module)
        optimizer.step(closure_of(module, optimizer, draw(5, 4)))
        block, numbers = of(optimizer)
        first, second = (Call(draw(5, 4), draw(5, 3, seed=k), 0, draw(3, seed=9 + k)) for k in range(2))
        before = {block: block.look(Seen((), [first]))}
        compare(before, {block.layer: [second]}, optimizer.state, 0.5, 0.1, 1.0, communicator)
        learnt.append([numbers[name] for name in ("s", "y", "inverse_A", "inverse_G")])
    for one, two in zip(*learnt, strict=True):
        torch.testing.assert_close(two, one)


def test_pairs_are_kept_up_to_the_memory() -> None:
    module = nn.Linear(4, 3).double()
    optimizer = kbfgs_l(module, blocks=QuasiNewton(memory=2))
    for step in range(4):
        optimizer.step(closure_of(module, optimizer, draw(5, 4, seed=step)))
    _, numbers = of(optimizer)
    assert numbers["pairs_s"].shape == numbers["pairs_y"].shape == (2, 3)
    torch.testing.assert_close((numbers["pairs_s"] * numbers["pairs_y"]).sum(1), torch.ones(2, dtype=torch.float64))
    kept = optimizer.coverage[0].bytes / 8
    assert kept == 2 * 5 * 5 + 2 * 2 * 3 == sum(numbers[k].numel() for k in numbers if "_" in k)


@pytest.mark.parametrize("build", [kbfgs, kbfgs_l])
def test_a_loss_times_a_number_makes_the_same_steps(build: Callable[..., BlockDiagonal]) -> None:
    ends = []
    for factor in (1.0, 1000.0):
        module = network()
        optimizer = build(module, lr=0.01)
        for step in range(5):
            x = draw(6, 2, 3, 6, seed=step)

            def closure(x: Tensor = x, module: nn.Module = module, factor: float = factor) -> Tensor:
                module.zero_grad()
                value = factor * (module(x) - 1).square().mean()
                value.backward()
                return value

            optimizer.step(closure)
        ends.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


def test_without_a_closure_nothing_moves() -> None:
    module = network()
    optimizer = kbfgs(module)
    assert optimizer.wants_closure
    closure_of(module, optimizer, draw(6, 2, 3, 6))()
    before, state = copy.deepcopy(module.state_dict()), optimizer.state_dict()
    with pytest.raises(ValueError, match=r"pairs are of a second pass after the step; call step\(closure\)"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
    assert not optimizer.state and optimizer.state_dict() == state


def test_the_closure_is_called_again_when_statistics_are_due() -> None:
    """And once only, where the damping follows the loss as well."""
    module = network()
    optimizer = kbfgs(module, schedule=Schedule(statistics=3), damping=LevenbergMarquardt(0.1), length=Natural())
    counts = []
    for step in range(6):
        closure, calls = closure_of(module, optimizer, draw(6, 2, 3, 6, seed=step)), 0

        def counted(closure: Callable[[], Tensor] = closure) -> Tensor:
            nonlocal calls
            calls += 1
            return closure()

        optimizer.step(counted)
        counts.append(calls)
    assert counts == [2, 2, 2, 2, 2, 1]  # statistics in steps 0 and 3, inverses in 0, 1, 2 and 4


def test_what_has_no_factors_has_mini_blocks() -> None:
    class Own(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    module = nn.ModuleList([Own(2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 1), nn.LayerNorm(2)])
    found = {layer.parameters[0]: (layer.block, layer.why) for layer in kbfgs(module).coverage}
    assert found["0.weight_ih_l0"] == ("Averaged", "Own: a matrix; its class has a forward pass of its own")
    assert found["1.weight"] == ("Kernels", "Conv2d: kernels; its channels are in groups")
    assert found["2.weight"] == ("KroneckerPairsPatches", "Conv2d: a matrix")
    assert found["3.weight"][0] == "Entries"


def test_misuse() -> None:
    for options, message in (
        ({"memory": 0}, "memory=0: at least one pair; None keeps a matrix"),
        ({"memory": 2.5}, "memory=2.5: give a whole number"),
        ({"start": -1}, "start=-1: give a number of statistics, or 0"),
        ({"powell": 1.0}, "powell=1.0: must be between 0 and 1; the paper has 0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            QuasiNewton(**options)
