from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quadric.model.acoustic import AcousticModel
from quadric.model.recurrent import LSTM, RNN, Unfolded
from reference import windows

KINDS: list[tuple[type[RNN | LSTM], str]] = [(RNN, "relu"), (RNN, "sigmoid"), (RNN, "tanh"), (LSTM, "relu")]


def moved(model: AcousticModel) -> Any:
    """In float64, with no weight where it started, so that none is zero."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def padded(model: AcousticModel, batch: int, frames: int) -> Tensor:
    return torch.randn(batch, model.left_context + frames + model.right_context, model.inputs).double()


@pytest.mark.parametrize(("kind", "activation"), KINDS)
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_equals_torchs_network_run_on_every_window(kind: type[RNN | LSTM], activation: str, norm: str) -> None:
    options: dict[str, Any] = {"activation": activation, "norm": norm}
    model = moved(kind(3, 4, [6, 5], feed_forward=[7], **options))
    inputs = padded(model, 2, 3)
    torch.testing.assert_close(model(inputs), windows.scores(model, inputs), rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from([RNN, LSTM]),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    feed_forward=st.lists(st.integers(1, 4), max_size=2),
    window=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    frames=st.integers(1, 4),
)
def test_equals_torchs_network_in_every_shape(
    kind: type[RNN | LSTM], sizes: list[int], feed_forward: list[int], window: tuple[int, int], frames: int
) -> None:
    model = moved(kind(2, 3, sizes, feed_forward=feed_forward, window=window, activation="tanh"))
    assert (model.left_context, model.right_context) == window
    inputs = padded(model, 2, frames)
    torch.testing.assert_close(model(inputs), windows.scores(model, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_gradients_equal_those_of_torchs_network(kind: type[RNN | LSTM], activation: Any) -> None:
    model = moved(kind(3, 4, [6, 5], window=(3, 2), activation=activation))
    inputs = padded(model, 1, 4).requires_grad_()
    (found,) = torch.autograd.grad(model(inputs).square().sum(), inputs)
    (expected,) = torch.autograd.grad(windows.scores(model, inputs).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


def speech_like(frames: int, features: int, correlation: float) -> Tensor:
    """Frames [64, frames, features] of unit variance, each ``correlation`` like the one before."""
    x = torch.randn(64, frames, features)
    for t in range(1, frames):
        x[:, t] = correlation * x[:, t - 1] + (1 - correlation**2) ** 0.5 * x[:, t]
    return x


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_neither_the_signal_nor_its_gradient_dies_or_explodes(
    kind: type[RNN | LSTM], activation: Any, correlation: float
) -> None:
    """Gradients of the scored frame at the frames of its window: an RNN keeps them alike, an LSTM forgets slowly."""
    torch.manual_seed(0)
    model = kind(40, 100, [200, 200], activation=activation)
    x = speech_like(20, 40, correlation).requires_grad_()
    h = model.hidden[0](x)
    assert 0.05 < float(h.detach().std(dim=0).mean()) < 1.5
    assert float(model(x).detach().std(dim=0).mean()) < 0.5  # near the uniform distribution
    (gradient,) = torch.autograd.grad((h * torch.randn_like(h)).sum(), x)
    norms = gradient.norm(dim=(0, 2)) / (len(x) * h.shape[2]) ** 0.5
    assert float(norms.max()) < 1.0
    assert float(norms.max() / norms.min()) < (10 if kind is RNN else 1000)


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_starts_near_the_priors(kind: type[RNN | LSTM], activation: Any) -> None:
    prior = torch.tensor([0.6, 0.3, 0.1])
    model = kind(10, 3, [64, 64], feed_forward=[64], activation=activation)
    model.initialise_output_bias(prior.log())
    posterior = model(torch.randn(10, 30, 10)).softmax(-1).mean((0, 1))
    torch.testing.assert_close(posterior, prior, rtol=0.0, atol=0.1)


def test_forget_gates_start_open() -> None:
    layer = LSTM(3, 2, [4]).hidden[0].layers[0]
    assert layer.input.bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8


@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_recurrent_weights_start_orthogonal(kind: type[RNN | LSTM], activation: Any) -> None:
    gain = {"relu": 2.0**0.5, "sigmoid": 4.0, "tanh": 1.0}[activation] if kind is RNN else 1.0
    for layer in kind(3, 2, [6, 5], activation=activation).hidden[0].layers:
        for gate in layer.recurrent.weight.detach().chunk(1 if kind is RNN else 4):
            torch.testing.assert_close(gate @ gate.T, gain**2 * torch.eye(len(gate)), rtol=1e-5, atol=1e-5)


def test_logistic_units_start_in_the_middle() -> None:
    """With all units at a half, the next step's are as well."""
    model = RNN(10, 3, [20, 30], feed_forward=[40, 50], activation="sigmoid")
    recurrent, *above = model.hidden
    lower, upper = recurrent.layers
    half = torch.full((1, 1, 50), 0.5)
    (h,) = lower.step(lower.input(torch.zeros(1, 1, 10)), (half[..., :20],))
    torch.testing.assert_close(h, half[..., :20])
    (h,) = upper.step(upper.input(half[..., :20]), (half[..., :30],))
    torch.testing.assert_close(h, half[..., :30])
    for layer in above:
        h = layer(h)
        torch.testing.assert_close(h, half[..., : h.shape[2]])
    _, first, second = LSTM(10, 3, [20], feed_forward=[40, 50], activation="sigmoid").hidden
    torch.testing.assert_close(first(torch.zeros(1, 1, 20)), half[..., :40])  # an LSTM's units are around zero
    torch.testing.assert_close(second(half[..., :40]), half)


def test_dropout_spares_what_a_layer_hands_to_itself() -> None:
    one = Unfolded(RNN(3, 2, [50]).hidden[0].layers, steps=20, dropout=0.5)
    x = torch.randn(1, 20, 3)
    whole = one.eval()(x)
    dropped = one.train()(x)
    kept = dropped != 0
    assert kept.any() and not kept[whole > 0].all()
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])  # the state itself is as it was


def test_dropout_is_drawn_anew_at_every_step() -> None:
    """The upper layer sees each unit of the lower in about half of 40 steps, so it is never all or nothing."""
    lower, upper = RNN(1, 2, [1, 1], window=(39, 0), activation="relu").hidden[0].layers
    with torch.no_grad():
        for layer, recurrent in ((lower, 0.0), (upper, 1.0)):
            layer.input.weight.fill_(1.0)
            layer.input.bias.zero_()
            layer.recurrent.weight.fill_(recurrent)
    # A sum over the steps of 0 or 2, and then itself 0 or doubled.
    counted = Unfolded([lower, upper], 40, 0.5)(torch.ones(200, 40, 1)).detach()
    sums = counted[counted > 0] / 2
    assert float(sums.min()) > 20 and float(sums.max()) < 60
    assert float(sums.std()) > 2.0


def test_the_cell_adds_up_in_float32_under_autocast() -> None:
    """A sum of 400 times 1/512, which bfloat16 no longer sees beside a half."""
    layer = LSTM(1, 1, [1]).hidden[0].layers[0]
    with torch.no_grad():
        layer.recurrent.weight.zero_()
        layer.input.weight.zero_()
        layer.input.bias.copy_(torch.tensor([20.0, 20.0, 1 / 512, 20.0]))
    with torch.autocast("cpu", torch.bfloat16):
        h = Unfolded([layer], 400, 0.0)(torch.zeros(1, 400, 1)).detach()
    torch.testing.assert_close(float(h), float(torch.tanh(torch.tensor(400 / 512))), rtol=0.01, atol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": []}, "sizes"),
        ({"sizes": [4, 0]}, "sizes"),
        ({"inputs": 0}, "inputs"),
        ({"outputs": 0}, "outputs"),
        ({"feed_forward": [3, 0]}, "feed_forward"),
        ({"window": (-1, 2)}, "window"),
        ({"window": (1, 2, 3)}, "window"),
        ({"window": (0, 0)}, "choose a DNN"),
        ({"activation": "swish"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm": "batch"}, "norm"),
    ],
)
@pytest.mark.parametrize("kind", [RNN, LSTM])
def test_misuse_is_named(kind: type[RNN | LSTM], options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"inputs": 3, "outputs": 2, "sizes": [4, 4]}
    with pytest.raises(ValueError, match=message):
        kind(**{**good, **options})
