from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quadric.model.acoustic import DNN, SHIFTS, TDNN, Activation, log_likelihoods, log_priors, splice

GAPPED = ((-2, 0, 1), (-1, 2), (0,))


def small(activation: Activation = "tanh", **options: object) -> TDNN:
    model = TDNN(3, 4, [5, 6, 5], offsets=GAPPED, activation=activation, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded(model: TDNN, batch: int, frames: int) -> Tensor:
    return torch.randn(batch, model.left_context + frames + model.right_context, model.inputs, dtype=torch.float64)


def frame_by_frame(model: TDNN, inputs: Tensor) -> Tensor:
    """The slow twin: every output frame by recursion through the layers, one vector at a time."""

    def value(utterance: Tensor, layer: int, time: int) -> Tensor:
        if layer == 0:
            return utterance[time]
        module = model.hidden[layer - 1]
        parts = [value(utterance, layer - 1, time + offset) for offset in module.offsets]
        z = module.linear.weight @ torch.cat(parts) + module.linear.bias
        return {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[module.activation](z)

    times = range(model.left_context, inputs.shape[1] - model.right_context)
    rows = [torch.stack([model.output(value(u, len(model.hidden), t)) for t in times]) for u in inputs]
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_equals_the_network_computed_frame_by_frame(activation: Activation) -> None:
    for model in (small(activation), DNN(3, 4, [5, 6], context=(2, 1), activation=activation).double()):
        inputs = padded(model, 2, 3)
        torch.testing.assert_close(model(inputs), frame_by_frame(model, inputs))


def test_default_shifts_are_those_of_the_paper() -> None:
    model = TDNN(40, 10, [8] * 5)
    assert (model.left_context, model.right_context) == (2 + 1 + 3 + 7, 2 + 2 + 3 + 2)
    assert [layer.offsets for layer in model.hidden] == list(SHIFTS)


@pytest.mark.parametrize("context", [(0, 0), (3, 1), (0, 2), 2])
def test_dnn_context(context: tuple[int, int] | int) -> None:
    left, right = context if isinstance(context, tuple) else (context, context)
    model = DNN(3, 4, [5, 5], context=context)
    assert (model.left_context, model.right_context) == (left, right)
    assert model(torch.zeros(1, left + 6 + right, 3)).shape == (1, 6, 4)


def test_starts_near_the_priors() -> None:
    prior = torch.tensor([0.6, 0.3, 0.1])
    for activation in ("relu", "sigmoid", "tanh"):
        model = TDNN(10, 3, [64] * 5, activation=activation)  # type: ignore[arg-type]
        model.initialise_output_bias(prior.log())
        posterior = model(torch.randn(20, 30, 10)).softmax(-1).mean((0, 1))
        torch.testing.assert_close(posterior, prior, rtol=0.0, atol=0.1)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_the_signal_survives_the_initial_layers(activation: Activation) -> None:
    model = TDNN(40, 3, [200] * 5, activation=activation)
    h = torch.randn(10, 40, 40)
    for layer in model.hidden:
        h = layer(h)
    assert h.std(dim=(0, 1)).mean() > 0.1


def test_log_likelihoods_are_posteriors_over_priors() -> None:
    logits, prior = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True) / prior).log()
    torch.testing.assert_close(log_likelihoods(logits, prior.log()), expected)
    torch.testing.assert_close(log_likelihoods(logits[0], prior.log()), expected[0])


def test_log_priors_floor_the_unseen() -> None:
    prior = log_priors(torch.tensor([90, 10, 0]), floor=1e-3).exp()
    assert math.isclose(float(prior.sum()), 1.0)
    assert math.isclose(float(prior[2]), 1e-3, rel_tol=2e-3)
    with pytest.raises(ValueError, match="counts"):
        log_priors(torch.zeros(3))
    with pytest.raises(ValueError, match="floor"):
        log_priors(torch.ones(3), floor=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": []}, "sizes"),
        ({"sizes": [4, 0]}, "sizes"),
        ({"inputs": 0}, "inputs"),
        ({"outputs": 0}, "outputs"),
        ({"offsets": SHIFTS}, "5 rows for 2"),
        ({"offsets": [(0,), ()]}, r"offsets\[1\]"),
        ({"offsets": [(1, 0), (0,)]}, "ascending"),
        ({"offsets": [(0, 0), (0,)]}, "distinct"),
        ({"offsets": [(1, 2), (0,)]}, "at most 0"),
        ({"activation": "swish"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm": "batch"}, "norm"),
    ],
)
def test_misuse_is_named(options: dict[str, object], message: str) -> None:
    good = {"inputs": 3, "outputs": 2, "sizes": [4, 4], "offsets": [(-1, 0), (0,)]}
    with pytest.raises(ValueError, match=message):
        TDNN(**{**good, **options})  # type: ignore[arg-type]


def test_bad_contexts_and_priors_are_named() -> None:
    with pytest.raises(ValueError, match="context"):
        DNN(3, 2, [4], context=(-1, 0))
    with pytest.raises(ValueError, match="sizes"):
        DNN(3, 2, [])
    with pytest.raises(ValueError, match="floor"):
        log_likelihoods(torch.zeros(1, 1, 2), torch.tensor([0.0, -math.inf]))


def test_splice_of_one_frame_is_a_view() -> None:
    x = torch.randn(2, 3, 4)
    assert splice(x, (0,)).data_ptr() == x.data_ptr()


def test_a_masked_window_does_not_blow_up_gradients() -> None:
    model = TDNN(8, 5, [32, 32], offsets=[(-1, 0, 1), (-1, 0, 1)], norm="layer")
    with torch.no_grad():
        for layer in model.hidden:
            layer.linear.bias.normal_(std=1e-3)  # as after a first step of training

    def gradient(inputs: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(model(inputs)[0], torch.zeros(20, dtype=torch.long))
        return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm())

    heard = torch.randn(1, 24, 8)
    assert gradient(torch.zeros(1, 24, 8)) < 5 * gradient(heard)
