from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cases import draw
from quadric.optim.block_diagonal import UNHEARD, BlockDiagonal, Schedule
from quadric.optim.capture import Capture, examples
from quadric.optim.kfac import kfac
from quadric.optim.layers import find_layers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def capture_of(model: nn.Module, due: bool = True) -> Capture:
    return Capture(model, find_layers(model, model.parameters()), lambda: due)


def loss(model: nn.Module, seed: int = 0, count: int = 5) -> Tensor:
    return model(draw(count, 3, seed=seed).to(next(model.parameters()).dtype)).square().sum(1).mean()


def counts(capture: Capture) -> list[list[int]]:
    """Of each layer the numbers of the passes that its calls are of."""
    taken = capture.take()
    return [[call.number for call in taken.get(layer, [])] for layer in capture.layers]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_calls_make_the_gradient() -> None:
    model = network()
    capture = capture_of(model)
    loss(model).backward()
    for layer, (call,) in capture.take().items():
        torch.testing.assert_close(call.cotangent.T @ call.inputs, layer.weight.grad)
        torch.testing.assert_close(call.cotangent.sum(0), layer.bias.grad)
        assert not call.inputs.requires_grad and not call.cotangent.requires_grad
    assert not capture.take()


def test_passes_are_numbered_until_the_gradient_is_gone() -> None:
    model = network()
    capture = capture_of(model)
    for count in (5, 3):
        loss(model, count=count).backward()
    (first, _) = capture.take().values()
    assert [call.number for call in first] == [0, 1] and examples(first) == 8
    loss(model).backward()
    model.zero_grad()
    loss(model).backward()
    assert counts(capture) == [[0], [0]]


def test_calls_of_one_pass_have_one_number() -> None:
    model = network()
    capture = capture_of(model)
    (loss(model, 0) + loss(model, 1, count=2)).backward()
    taken = capture.take()
    assert [[call.number for call in calls] for calls in taken.values()] == [[0, 0], [0, 0]]
    assert {examples(calls) for calls in taken.values()} == {5}


def test_a_pass_that_leaves_no_gradient_is_forgotten_by_the_next() -> None:
    """As a penalty on the gradient has it: the first pass is a part of the second."""
    model = network()
    capture = capture_of(model)
    value = loss(model)
    (slope,) = torch.autograd.grad(value, [model[2].weight], create_graph=True)
    (value + slope.square().sum()).backward()
    assert counts(capture)[1] == [0]


def test_what_is_no_training_pass_is_not_recorded() -> None:
    model = network()
    capture = capture_of(model)
    with torch.no_grad():
        loss(model)
    with torch.inference_mode():
        loss(model)
    loss(model)  # without a backward pass
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    functional_call(model, other, (torch.ones(2, 3),)).sum().backward()
    torch.func.grad(lambda x: model(x).sum())(torch.ones(2, 3))
    torch.func.vmap(lambda x: model(x))(torch.ones(2, 3))
    assert counts(capture) == [[], []]
    own = dict(model.named_parameters())
    functional_call(model, own, (torch.ones(2, 3),)).sum().backward()
    assert counts(capture) == [[0], [0]]


def test_what_is_not_due_is_not_recorded_but_on_demand() -> None:
    model = network()
    capture = capture_of(model, due=False)
    loss(model).backward()
    assert counts(capture) == [[], []]
    with pytest.raises(ZeroDivisionError), capture.recording():
        loss(model).backward()
        raise ZeroDivisionError
    assert not capture.listening
    model.zero_grad()
    with capture.recording():
        loss(model).backward()
        value = loss(model)
    value.backward()  # after the recording
    assert counts(capture) == [[0], [0]]


def test_an_exception_leaves_nothing_that_counts() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            raise ZeroDivisionError

    model = network()
    capture = capture_of(model)
    with pytest.raises(ZeroDivisionError):
        model[2](Broken.apply(model[0](torch.ones(2, 3)))).sum().backward()
    model.zero_grad()
    loss(model).backward()
    assert counts(capture) == [[0], [0]]


def test_tied_layers_have_the_calls_of_both() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    capture = capture_of(model)
    loss(model).backward()
    calls = capture.take()[capture.layers[0]]
    assert len(calls) == 2
    made = sum(call.cotangent.T @ call.inputs for call in calls)
    torch.testing.assert_close(made, model[0].weight.grad)


def test_outputs_may_be_changed_in_place_and_inputs_named() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x).mul_(3.0).relu_()

    model = InPlace()
    capture = capture_of(model)
    loss(model).backward()
    ((call,),) = capture.take().values()
    torch.testing.assert_close(call.cotangent.T @ call.inputs, model.linear.weight.grad)


def test_what_other_hooks_make_of_an_output_is_none_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    capture = capture_of(model)
    loss(model).backward()
    ((call,),) = capture.take().values()
    torch.testing.assert_close(call.cotangent.T @ call.inputs, model[0].weight.grad)


def test_one_example_without_a_dimension_of_its_own() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(0), nn.Linear(12, 1))
    capture = capture_of(model)
    model(torch.ones(2, 5)).sum().backward()
    shapes = [(call.inputs.shape, call.cotangent.shape) for (call,) in capture.take().values()]
    assert shapes == [((1, 2, 5), (1, 3, 4)), ((1, 12), (1, 1))]


def test_autocast() -> None:
    model = network()
    optimizer = kfac(model)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model)
    value.backward()
    optimizer.step()
    numbers = optimizer.state[model[2].weight]
    assert numbers["statistics_A"].dtype is numbers["inverse_G"].dtype is torch.float32
    assert all(layer.block == "Kronecker" for layer in optimizer.coverage)


def test_steps_without_statistics_record_nothing() -> None:
    model = network()
    optimizer = kfac(model, schedule=Schedule(statistics=3, inverses=3))
    recorded = []
    for _ in range(7):
        optimizer.zero_grad()
        loss(model).backward()
        recorded.append(len(optimizer._capture._calls))
        optimizer.step()
        assert not optimizer._capture._calls
    assert recorded == [2, 0, 0, 2, 0, 0, 2]


def test_nothing_outlives_a_step_nor_hooks_the_optimiser() -> None:
    model = network()
    optimizer = kfac(model)
    x = torch.ones(4, 3)
    x.requires_grad_()
    seen = weakref.ref(x)
    model(x).sum().backward()
    optimizer.step()
    del x
    assert seen() is None
    loss(model).backward()
    optimizer.zero_grad()
    assert not optimizer._capture._calls
    assert hooks(model) == 2
    gone = weakref.ref(optimizer._capture)
    del optimizer
    gc.collect()
    assert gone() is None and hooks(model) == 0


def train(model: nn.Module, optimizer: BlockDiagonal, steps: int = 3) -> list[float]:
    values = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def test_copies_hear_their_own_model() -> None:
    model = network()
    optimizer = kfac(model)
    train(model, optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    alone, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (alone, again):
        loss(other).backward()
    assert not optimizer._capture._calls and not copied._capture._calls
    loss(twin).backward()
    assert not optimizer._capture._calls and len(copied._capture._calls) == 2
    assert train(twin, copied) == train(model, optimizer)
    assert all(layer.block == "Kronecker" for layer in copied.coverage)


class Bypassed(nn.Module):
    """A linear layer whose module is called at first, and then is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bypass = nn.Linear(3, 4), nn.Linear(4, 2), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return nn.functional.linear(x, self.second.weight, self.second.bias) if self.bypass else self.second(x)


def blocks(optimizer: BlockDiagonal) -> list[str]:
    return [layer.block for layer in optimizer.coverage]


def test_a_layer_that_is_left_out_for_a_while_keeps_its_block() -> None:
    """As an expert that no example is sent to, whose weights an L2 term in the loss still moves."""
    model = Bypassed()
    optimizer = kfac(model, lr=0.01, schedule=Schedule(1, 100))
    train(model, optimizer, 3)
    held = optimizer.state[model.second.weight]["statistics_A"].clone()
    model.bypass = True
    train(model, optimizer, 5)
    assert torch.equal(optimizer.state[model.second.weight]["statistics_A"], held)
    model.bypass = False
    train(model, optimizer, 1)
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]
    assert not torch.equal(optimizer.state[model.second.weight]["statistics_A"], held)
    assert "unheard" not in optimizer.state[model.second.weight]


def test_a_layer_whose_module_is_not_called_has_mini_blocks_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    model = Bypassed()
    optimizer = kfac(model, lr=0.01, schedule=Schedule(1, 100))
    train(model, optimizer, 5)
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]
    model.bypass = True
    before = model.second.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, UNHEARD - 1)
        assert blocks(optimizer) == ["Kronecker", "Kronecker"] and not caplog.messages
        train(model, optimizer, 1)
    assert caplog.messages == ["second.weight: its module is not called; it has Averaged"]
    assert blocks(optimizer) == ["Kronecker", "Averaged"]
    assert optimizer.coverage[1].why == "Linear: a matrix; its module is not called"
    assert not torch.equal(model.second.weight, before)
    assert not [name for name in optimizer.state[model.second.weight] if name.endswith(("_A", "_G"))]
    model.bypass = False
    train(model, optimizer)
    assert blocks(optimizer) == ["Kronecker", "Averaged"]

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    resumed = kfac(twin, lr=0.01, schedule=Schedule(1, 100))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert blocks(resumed) == ["Kronecker", "Averaged"]
    assert train(twin, resumed) == train(model, optimizer)
    fresh = kfac(model)
    optimizer.load_state_dict(fresh.state_dict())
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]


@pytest.mark.parametrize("made", ["after the forward pass", "after the backward pass"])
def test_an_optimiser_that_is_made_within_a_step_hears_the_next(made: str) -> None:
    model = Bypassed()
    value = model(torch.ones(2, 3)).square().sum()
    if made == "after the backward pass":
        value.backward()
        optimizer = kfac(model, lr=0.01)
    else:
        optimizer = kfac(model, lr=0.01)
        value.backward()
    before = model.second.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.second.weight, before) and not any(
        name.startswith("statistics_") for name in optimizer.state[model.second.weight]
    )
    train(model, optimizer, 1)
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]
    assert {"inverse_A", "inverse_G"} <= optimizer.state[model.second.weight].keys()
    train(model, optimizer, 1)
    model.bypass = True
    train(model, optimizer, 1)
    model.bypass = False
    train(model, optimizer, 1)
    model.bypass = True
    train(model, optimizer, 1)
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]  # no two in a row


def test_calls_are_heard_of_layers_that_join_late() -> None:
    model = Bypassed()
    optimizer = kfac(model, list(model.first.parameters()), lr=0.01)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": list(model.second.parameters())})
    train(model, optimizer, 3)
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]


def test_first_statistics_of_a_layer_count_whole() -> None:
    """However late they come."""
    model = Bypassed()
    optimizer = kfac(model, lr=0.0, schedule=Schedule(1, 1))
    for _ in range(4):
        optimizer.zero_grad()
        model.first(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    train(model, optimizer, 1)
    late = optimizer.state[model.second.weight]["statistics_G"]
    fresh = kfac(model, lr=0.0)
    train(model, fresh, 1)
    torch.testing.assert_close(late, fresh.state[model.second.weight]["statistics_G"])


def test_a_layer_that_takes_no_part_keeps_its_block() -> None:
    model = Bypassed()
    optimizer = kfac(model, lr=0.01)
    train(model, optimizer)
    for zeros in (False, True):
        optimizer.zero_grad(set_to_none=not zeros)
        model.first(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert blocks(optimizer) == ["Kronecker", "Kronecker"]


def test_a_layer_with_a_forward_pass_of_its_own_has_mini_blocks() -> None:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    (layer,) = kfac(Halved(3, 2)).coverage
    assert (layer.block, layer.why) == ("Averaged", "Halved: a matrix; its class has a forward pass of its own")


def test_a_pass_over_the_data_is_recorded_before_the_first_step_alone() -> None:
    model = network()
    optimizer = kfac(model, schedule=Schedule(statistics=4))
    for seed in (0, 1):
        optimizer.zero_grad()
        loss(model, seed).backward()
        optimizer.observe()
    A = optimizer.state[model[0].weight]["statistics_A"]
    x = torch.cat([draw(5, 3, seed=0), draw(5, 3, seed=1)]).float()
    torch.testing.assert_close(A[:3, :3].tril(), (x.T @ x / 10).tril())
    train(model, optimizer, 1)
    loss(model).backward()
    with pytest.raises(ValueError, match="calls of modules are not recorded then; call it before the first step"):
        optimizer.observe()


def test_wrapped_by_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        values = []
        for wrap in (False, True):
            model: nn.Module = network()
            model = nn.parallel.DistributedDataParallel(model) if wrap else model
            optimizer = kfac(model, lr=0.01)
            values.append(train(model, optimizer, 5))
            assert blocks(optimizer) == ["Kronecker", "Kronecker"]
        assert values[0] == values[1]
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_models_have_mini_blocks_and_say_so() -> None:
    model = network()
    optimizer = kfac(model, lr=0.01)
    compiled = torch.compile(model, backend="eager")
    values = train(compiled, optimizer, 20)
    assert values[-1] < values[0]
    assert {layer.why for layer in optimizer.coverage} == {"Linear: a matrix; its module is not called"}
