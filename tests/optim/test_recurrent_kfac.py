"""The blocks of layers whose products are inside of a module: recurrent ones and attention."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from cases import draw
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.blocks import Call
from quadric.optim.capture import Capture
from quadric.optim.kbfgs import kbfgs
from quadric.optim.kfac import KroneckerFactors, kfac
from quadric.optim.layers import Layer, find_layers
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher
from quadric.optim.rerun import draws, results, tensors, weights
from reference import kronecker
from reference.recurrences import SelfAttention, Steps

RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {
    "RNN": nn.RNN,
    "RNN, relu": partial(nn.RNN, nonlinearity="relu"),
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
    "LSTM, projected": partial(nn.LSTM, proj_size=2),
}
CELLS = {
    "RNN": nn.RNNCell,
    "RNN, relu": partial(nn.RNNCell, nonlinearity="relu"),
    "GRU": nn.GRUCell,
    "LSTM": nn.LSTMCell,
}
INPUTS = ("batch", "batch first", "one", "packed", "packed unsorted")


def value(outputs: Any) -> Tensor:
    """A loss in which all of a module's outputs count."""
    found = [z for z in tensors(outputs) if z.requires_grad]
    return torch.stack([(z * draw(*z.shape, seed=k)).tanh().sum() for k, z in enumerate(found)]).sum()


def heard(model: nn.Module, run: Callable[[], Any]) -> dict[Layer, list[Call]]:
    """The calls of all layers, of which the outputs are summed as well."""
    layers = [layer for layer in find_layers(model, model.parameters()) if "weight" in layer.name]
    capture = Capture(model, layers, lambda: True, layers)
    model.zero_grad()
    value(run()).backward()
    calls = dict(capture.take())
    capture.close()
    assert len(calls) == len(layers)
    return calls


def check(calls: dict[Layer, list[Call]]) -> None:
    """The calls make the gradients, and their outputs are those of the inputs."""
    for layer, own in calls.items():
        made = sum(torch.einsum("nro,nri->oi", _positions(call.cotangent), _positions(call.inputs)) for call in own)
        torch.testing.assert_close(made, layer.weight.grad)
        if layer.bias is not None:
            torch.testing.assert_close(sum(_positions(c.cotangent).sum((0, 1)) for c in own), layer.bias.grad)
        for call in own:
            z = nn.functional.linear(call.inputs, *(p.detach() for p in layer.parameters))
            whole = call.cotangent.flatten(0, -2).any(0)  # queries, keys and values have a part of the outputs each
            expected = torch.where(whole, z.flatten(0, -2).sum(0), 0.0)
            if not layer.name.startswith("in_proj"):
                expected = z.flatten(0, -2).sum(0)  # a cotangent may be zero elsewhere
            torch.testing.assert_close(call.outputs, expected)


def _positions(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 2 else x


def recurrent(build: Callable[..., nn.RNNBase], **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return build(3, 4, **options).double()


def inputs(kind: str) -> tuple[Tensor | PackedSequence, int | None]:
    """What a recurrent layer of 3 inputs is called with, and how many examples, None for one without a dimension."""
    lengths = {"packed": [5, 5, 2, 1], "packed unsorted": [2, 5, 1, 5]}.get(kind)
    if lengths:
        return pack_sequence([draw(n, 3, seed=n) for n in lengths], enforce_sorted=kind == "packed"), 4
    shape = {"batch": (5, 4, 3), "batch first": (4, 5, 3), "one": (5, 3)}[kind]
    return draw(*shape), None if kind == "one" else 4


def states(model: nn.RNNBase, examples: int | None) -> Any:
    widths = [model.proj_size or model.hidden_size, model.hidden_size][: 1 + isinstance(model, nn.LSTM)]
    count = model.num_layers * (2 if model.bidirectional else 1)
    shapes = [(count, *([] if examples is None else [examples]), width) for width in widths]
    found = tuple(draw(*shape, seed=7 + k) for k, shape in enumerate(shapes))
    return found if len(found) == 2 else found[0]


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", RECURRENT)
def test_calls_of_recurrent_layers_make_the_gradients(name: str, kind: str) -> None:
    for layers, both, bias, dropout, given in (
        (1, False, True, 0.0, False),
        (1, True, False, 0.0, True),
        (2, True, True, 0.0, True),
        (2, False, True, 0.5, True),
        (2, True, False, 0.5, False),
    ):
        model = recurrent(
            RECURRENT[name],
            num_layers=layers,
            bidirectional=both,
            bias=bias,
            batch_first=kind == "batch first",
            dropout=dropout,
        )
        x, examples = inputs(kind)
        hx = states(model, examples) if given else None
        calls = heard(model, lambda: model(x, hx))  # noqa: B023
        check(calls)
        assert {max(len(call.inputs) for call in own) for own in calls.values()} == {examples or 1}
        (own, *_) = calls.values()
        assert len(own) == (3 if kind.startswith("packed") else 1)  # stretches of steps with as many examples


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", RECURRENT)
def test_a_pass_in_products_has_the_modules_results(name: str, kind: str) -> None:
    """Dropout too: on this device the numbers are drawn in the same order."""
    model = recurrent(RECURRENT[name], num_layers=3, bidirectional=True, batch_first=kind == "batch first", dropout=0.5)
    x, examples = inputs(kind)
    for train in (True, False):
        model.train(train)
        for hx in (None, states(model, examples)):
            torch.manual_seed(1)
            expected = tensors(model(x, hx=hx))
            torch.manual_seed(1)
            made, _ = results(model, weights(model), (x,), {"hx": hx}, draws(model))
            torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_calls_of_cells_make_the_gradients(name: str, batched: bool) -> None:
    torch.manual_seed(0)
    for given, bias in itertools.product((True, False), (True, False)):
        cell = CELLS[name](3, 4, bias=bias).double()
        two, shape = isinstance(cell, nn.LSTMCell), (2, 4) if batched else (4,)
        first = (draw(*shape, seed=8), draw(*shape, seed=9)) if two else draw(*shape, seed=8)
        outside = []

        def run() -> Any:
            state, seen = first if given else None, []  # noqa: B023
            for t in range(3):
                state = cell(draw(*shape[:-1], 3, seed=t), state)  # noqa: B023
                seen.append(state)
            outside.append(seen)  # noqa: B023
            return seen

        calls = heard(cell, run)
        check(calls)
        assert all(len(own) == 3 for own in calls.values())
        for once, again in zip(tensors(run()), tensors(outside[0]), strict=True):
            torch.testing.assert_close(once, again)


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, **options).double()
    for p in module.parameters():
        p.data.normal_()
    return module


GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.arange(6) > torch.tensor([[5], [2], [3]])},
    "padding, no weights": {
        "key_padding_mask": torch.arange(6) > torch.tensor([[5], [2], [3]]),
        "need_weights": False,
        "attn_mask": draw(6, 6, seed=5),
    },
    "mask": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(2)},
    "masks of heads": {"attn_mask": draw(6, 6, 6, seed=5), "need_weights": False},
    "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("which", ["self", "keys are values", "all different", "widths of their own"])
def test_calls_of_attention_make_the_gradients_and_its_results_are_the_same(name: str, which: str) -> None:
    apart = {"kdim": 3, "vdim": 5} if which == "widths of their own" else {}
    for first, ends, dropout, bias in (
        (True, False, 0.0, True),
        (False, False, 0.5, True),
        (False, True, 0.0, False),
        (True, True, 0.5, True),
    ):
        module = attention(batch_first=first, add_bias_kv=ends, add_zero_attn=ends, dropout=dropout, bias=bias, **apart)
        shape = (3, 6) if first else (6, 3)
        q, k, v = (draw(*shape, width, seed=s) for s, width in enumerate((4, *(apart.values() or (4, 4)))))
        args = {"self": (q, q, q), "keys are values": (q, k, k)}.get(which, (q, k, v))
        for train in (True, False):
            module.train(train)
            torch.manual_seed(1)
            expected = tensors(module(*args, **GIVEN[name]))
            torch.manual_seed(1)
            made, _ = results(module, weights(module), args, GIVEN[name], draws(module))
            torch.testing.assert_close(made, expected)
        module.train()
        calls = heard(module, lambda: module(*args, **GIVEN[name]))  # noqa: B023
        check(calls)
        counts = {layer.name: [len(call.inputs) for call in own] for layer, own in calls.items()}
        assert counts["out_proj.weight"] == [3]
        if not apart:
            assert counts["in_proj_weight"] == [3] * {"self": 1, "keys are values": 2}.get(which, 3)


def test_attention_of_one_example() -> None:
    for first, need in itertools.product((True, False), (True, False)):
        module = attention(batch_first=first)
        q, k = draw(5, 4), draw(6, 4, seed=1)
        options = {"key_padding_mask": torch.arange(6) > 3, "need_weights": need}
        made, _ = results(module, weights(module), (q, k, k), options, 0.0)
        torch.testing.assert_close(made, tensors(module(q, k, k, **options)))
        check(heard(module, lambda: module(q, k, k, **options)))  # noqa: B023


class First(nn.Module):
    """A module's first output, of one input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)[0]


INSIDE: dict[str, tuple[Callable[[], nn.Module], type[Steps] | type[SelfAttention]]] = {
    **{
        f"{name}, {layers} layers": (
            partial(recurrent, build, num_layers=layers, bidirectional=layers == 2, batch_first=True),
            Steps,
        )
        for name, build in RECURRENT.items()
        for layers in (1, 2)
    },
    "attention": (partial(attention, batch_first=True), SelfAttention),
}


def lower(matrix: Tensor) -> Tensor:
    return matrix.tril() + matrix.tril(-1).T


def named(model: nn.Module) -> list[Layer]:
    return [layer for layer in find_layers(model, model.parameters()) if "weight" in layer.name]


def in_twin(layer: Layer) -> str:
    return f"products.{layer.name.removeprefix('inner.').replace('out_proj.', 'out_proj_')}"


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", INSIDE)
def test_factors_and_directions_are_those_of_loops_over_examples_and_steps(name: str, sharing: str) -> None:
    build, loops = INSIDE[name]
    inner = build()
    model, twin = First(inner), loops(inner)  # type: ignore[arg-type]
    x = draw(3, 5, 4 if name == "attention" else 3)
    y = draw(*twin(x).shape, seed=1)
    optimizer = kfac(model, factors=KroneckerFactors(sharing=sharing), damping=0.1)  # type: ignore[arg-type]
    kronecker.wave(model(x), y).backward()
    gradients = {layer.name: [g.clone() for g in layer.gradient] for layer in named(model)}
    optimizer.step()
    for layer in named(model):
        A, G = kronecker.factors(kronecker.uses(twin, in_twin(layer), x, y, kronecker.wave), sharing)
        numbers = optimizer.state[layer.weight]
        torch.testing.assert_close(lower(numbers["statistics_A"]), A)
        torch.testing.assert_close(lower(numbers["statistics_G"]), G)
        (block,) = [block for block in optimizer._serving if block.layer.weight is layer.weight]
        weight, *bias = block.apply(numbers, gradients[layer.name])
        D = torch.cat([gradients[layer.name][0], *(b[:, None] for b in gradients[layer.name][1:])], 1)
        step = torch.cat([weight, *(b[:, None] for b in bias)], 1)
        torch.testing.assert_close(step, kronecker.direction(A, G, D, 0.1, "trace"))


class Packed(nn.Module):
    """A recurrent layer, the first of its last states, of sequences of all lengths."""

    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, sequences: list[Tensor]) -> Tensor:
        states = self.inner(pack_sequence(sequences, enforce_sorted=False))[1]
        return (states[0] if isinstance(states, tuple) else states)[0]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_packed_sequences_have_the_factors_of_their_own_steps(name: str, sharing: str) -> None:
    inner = recurrent(RECURRENT[name])
    model, twin, lengths = Packed(inner), Steps(inner), [2, 5, 1, 5]
    sequences = [draw(n, 3, seed=k) for k, n in enumerate(lengths)]
    y = draw(4, 4, seed=9)
    optimizer = kfac(model, factors=KroneckerFactors(sharing=sharing))  # type: ignore[arg-type]
    kronecker.wave(model(sequences), y).backward()
    optimizer.step()
    for layer in named(model):
        found = []
        for x, own in zip(sequences, y, strict=True):
            last = lambda z, target: kronecker.wave(z[:, -1], target)  # noqa: E731
            found += kronecker.uses(twin, in_twin(layer), x[None], own[None], last)
        steps, A = sum(lengths), 0
        for example in found:
            R = len(example)
            if sharing == "reduce":
                mean = torch.stack([a for a, _ in example]).sum(0) / R
                A = A + torch.outer(mean, mean) / 4
            else:
                A = A + sum(torch.outer(a, a) for a, _ in example) / steps
        _, G = kronecker.factors(found, sharing)
        numbers = optimizer.state[layer.weight]
        torch.testing.assert_close(lower(numbers["statistics_A"]), A)
        torch.testing.assert_close(lower(numbers["statistics_G"]), G)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_mini_blocks_are_of_the_gradients_of_examples(name: str, averaged: bool, packed: bool) -> None:
    model = Packed(recurrent(RECURRENT[name]))
    sequences = [draw(n, 3, seed=n) for n in ([2, 5, 1] if packed else [4, 4, 4])]
    y = draw(3, 4, seed=9)
    optimizer = mini_block_fisher(model, blocks=MiniBlocks(averaged, per_example=True))
    single: dict[str, list[Tensor]] = {layer.name: [] for layer in named(model)}
    for x, own in zip(sequences, y, strict=True):
        optimizer.zero_grad()
        kronecker.wave(model([x]), own[None]).backward()
        for layer in named(model):
            weight, bias = layer.gradient
            single[layer.name].append(torch.cat([weight, bias[:, None]], 1))
    optimizer.zero_grad()
    kronecker.wave(model(sequences), y).backward()
    optimizer.step()
    for layer in named(model):
        D = torch.stack(single[layer.name])
        S = torch.einsum("noi,noj->oij", D, D) / len(D)
        made = optimizer.state[layer.weight]["statistics_0"]
        torch.testing.assert_close(lower(made) if averaged else made, S.mean(0) if averaged else S)


def test_packed_sequences_twice_in_a_pass_have_no_common_examples() -> None:
    model = Packed(recurrent(nn.GRU))
    optimizer = mini_block_fisher(model, blocks=MiniBlocks(per_example=True))
    (model([draw(2, 3), draw(3, 3)]).sum() + model([draw(3, 3), draw(1, 3)]).sum()).backward()
    with pytest.raises(
        ValueError, match=r"inner.weight_ih_l0 is called with .* examples in one pass.*per_example=False"
    ):
        optimizer.step()


class Everything(nn.Module):
    """What users have: a stack with dropout, an encoder layer with its, a cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, dropout=0.2, batch_first=True, bidirectional=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.cell, self.output = nn.LSTMCell(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.encoder(self.lstm(x)[0]), None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.output(state[0])


def train(optimizer: BlockDiagonal, model: nn.Module, steps: int) -> list[float]:
    values, x = [], draw(8, 5, 3).float()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 2)
        loss.backward()
        return loss

    for _ in range(steps):
        values.append(float(optimizer.step(closure).detach()))
    return values


@pytest.mark.parametrize("build", [kfac, kbfgs, partial(mini_block_fisher, blocks=MiniBlocks(per_example=True))])
def test_nothing_is_left_to_other_blocks(build: Callable[..., BlockDiagonal]) -> None:
    torch.manual_seed(0)
    model = Everything()
    optimizer = build(model, lr=0.01, schedule=Schedule(2, 4))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = train(optimizer, model, 40)
    assert min(values) < 0.6 * values[0]
    assert all((p != start[name]).all() for name, p in model.named_parameters())
    matrices = [line for line in optimizer.coverage if "a matrix" in line.why]
    assert len(matrices) == 8 + 4 + 2 + 1 and {";" in line.why for line in matrices} == {False}
    assert len({line.block for line in matrices}) == 1


def test_where_the_module_has_a_forward_pass_of_its_own_the_reason_is_told() -> None:
    class Own(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    class Other(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x)[0]

    model = nn.Sequential(Own(4, 4, batch_first=True), Other(4, 2, batch_first=True))
    optimizer = kfac(model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        model(draw(3, 5, 4).float()).square().sum().backward()
        optimizer.step()
    assert {line.block for line in optimizer.coverage} == {"Averaged"}
    reasons = {line.parameters[0]: line.why for line in optimizer.coverage}
    assert reasons["0.weight_ih_l0"] == "Own: a matrix; its class has a forward pass of its own"
    assert reasons["1.out_proj.weight"].endswith("its module is not called")
    # At attention's zero bias of the keys the gradient is zero.
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_steps_without_statistics_are_the_modules_own() -> None:
    torch.manual_seed(0)
    model = Everything()
    optimizer = kfac(model, schedule=Schedule(3, 3))
    x, names = draw(8, 5, 3).float(), []
    for _ in range(4):
        optimizer.zero_grad()
        model.lstm(x)[0].sum().backward()
        names.append(len(optimizer._capture._calls))
        optimizer.step()
    assert names == [8, 0, 0, 8]


def test_passes_are_accumulated() -> None:
    made = []
    for parts in (1, 3):
        model = First(recurrent(nn.GRU, num_layers=2, batch_first=True))
        optimizer = kfac(model)
        for x, y in zip(draw(6, 5, 3).chunk(parts), draw(6, 5, 4, seed=1).chunk(parts), strict=True):
            (kronecker.wave(model(x), y) / parts).backward()
        optimizer.observe()
        numbers = [optimizer.state[layer.weight] for layer in named(model)]
        made.append([x for own in numbers for x in (own["statistics_A"], own["statistics_G"])])
    torch.testing.assert_close(made[0], made[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_outlives_a_step(dropout: float) -> None:
    """No graph is held in a circle that only a garbage collector would see."""
    model = First(nn.LSTM(3, 4, 2, dropout=dropout))
    optimizer = kfac(model)
    x = torch.ones(5, 2, 3, requires_grad=True)
    inner = x * 1
    seen, kept = weakref.ref(inner), weakref.ref(optimizer._capture)
    gc.collect()
    gc.disable()
    try:
        model(inner).square().sum().backward()
        optimizer.step()
        del inner
        assert seen() is None
        model(x).square().sum()  # without a backward pass
        del optimizer
        assert kept() is None
    finally:
        gc.enable()


def test_two_optimisers_of_a_model_hear_the_same() -> None:
    torch.manual_seed(0)
    model = Everything()
    both = [kfac(model), kfac(model)]
    model(draw(8, 5, 3).float()).square().sum().backward()
    for optimizer in both:
        optimizer.observe()
    first, second = (
        [numbers["statistics_G"] for numbers in optimizer.state.values() if "statistics_G" in numbers]
        for optimizer in both
    )
    assert len(first) == 8 + 4 + 2 + 1
    torch.testing.assert_close(first, second)


def test_frozen_weights_and_other_weights() -> None:
    model = recurrent(nn.LSTM, num_layers=2)
    for name in ("weight_ih_l0", "bias_hh_l1", "bias_ih_l0"):
        getattr(model, name).requires_grad_(False)
    layers = [layer for layer in find_layers(model, [p for p in model.parameters() if p.requires_grad])]
    capture = Capture(model, [layer for layer in layers if "weight" in layer.name], lambda: True)
    value(model(draw(5, 2, 3))).backward()
    calls = dict(capture.take())
    assert [layer.name for layer in calls] == ["weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    for layer, (call,) in calls.items():
        made = torch.einsum("nro,nri->oi", call.cotangent, call.inputs)
        torch.testing.assert_close(made, layer.weight.grad)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    value(torch.func.functional_call(model, others, (draw(5, 2, 3),))).backward()
    with torch.no_grad():
        model(draw(5, 2, 3))
    model(draw(5, 2, 3))
    assert not dict(capture.take())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_reduced_precision(dropout: float) -> None:
    for model, autocast in ((First(nn.LSTM(3, 4, 2, dropout=dropout)), True), (First(nn.GRU(3, 4).bfloat16()), False)):
        optimizer = kfac(model)
        x = torch.ones(5, 2, 3, dtype=torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().sum()
        loss.backward()
        optimizer.step()
        for layer in named(model):
            numbers = optimizer.state[layer.weight]
            assert numbers["statistics_A"].dtype is numbers["inverse_G"].dtype is torch.float32
            assert numbers["inverse_G"].isfinite().all() and numbers["statistics_G"].any()


def test_memory_is_counted() -> None:
    (first, second, *_) = kfac(nn.LSTM(3, 4)).coverage
    assert (first.matrices, first.bytes) == ("4 x 4 and 16 x 16", 4 * 2 * (16 + 256))
    assert second.matrices == "5 x 5 and 16 x 16"
