"""The Gauss-Newton operator against the explicit Jacobian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cases import MicroBatch, draw, padded_classes
from quadric.loss.loss import CrossEntropy, Loss, SquaredError
from quadric.objective.layers import linearisable
from quadric.objective.objective import Objective
from reference import dense

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


class OverTime(nn.Module):
    """A convolution over the frames of [B, T, D]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


class Tied(nn.Module):
    """The same layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    """The outputs of a recurrent layer of torch at every frame, without its state."""

    def __init__(self, layer: type[nn.RNN | nn.GRU | nn.LSTM], size: int = 4, **options: Any) -> None:
        super().__init__()
        self.layer = layer(3, size, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.batch_first:
            return self.layer(x)[0]
        return self.layer(x.transpose(0, 1))[0].transpose(0, 1)


class LastState(nn.Module):
    """Outputs from the last state of a recurrent layer, at every frame, and a learnt first state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, batch_first=True)
        self.h, self.c = (nn.Parameter(torch.randn(1, 1, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.layer(x, tuple(s.expand(1, len(x), 4).contiguous() for s in (self.h, self.c)))
        return (h * torch.tanh(c)).transpose(0, 1) * x.sum(-1, keepdim=True)


class Image(nn.Module):
    """Two-dimensional convolutions with every option, and pooling, on frames taken as images of one row more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 4, (2, 3), padding=(2, 1), dilation=(2, 1), groups=2)
        self.third = nn.Conv2d(4, 1, 1, stride=(1, 1), padding="same")
        self.up = nn.ConvTranspose2d(1, 4, (1, 3), stride=(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.relu(self.first(x.unsqueeze(1)))))[:, :, : x.shape[1]]
        return self.up(functional.max_pool2d(self.third(y), (1, 3))).mean(-1).transpose(1, 2)


class Attention(nn.Module):
    """Learnt places and self-attention."""

    def __init__(self, *, layer: bool) -> None:
        super().__init__()
        self.places, self.lift, self.out = nn.Embedding(8, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) if layer else None
        self.attention = None if layer else nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x) + self.places(torch.arange(x.shape[1]))
        return self.out(self.layer(y) if self.layer else self.attention(y, y, y, need_weights=False)[0])


class WideNorm(nn.Module):
    """Layer normalisation over two dimensions, and one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.wide, self.bare = nn.LayerNorm((2, 2)), nn.LayerNorm(4, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(self.bare(self.wide(y.unflatten(-1, (2, 2))).flatten(-2)))


NETS = {
    "linear": lambda: nn.Linear(3, 4),
    "tanh": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)),
    "relu": lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4)),
    "convolution": lambda: nn.Sequential(OverTime(3, 4), nn.Tanh(), OverTime(4, 4)),
    "tied": Tied,
    "rnn": lambda: Recurrent(nn.RNN),
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "rnn, relu, two directions": lambda: Recurrent(nn.RNN, 2, nonlinearity="relu", bidirectional=True),
    "gru, two layers, two directions": lambda: Recurrent(nn.GRU, 2, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, two layers, no bias": lambda: Recurrent(nn.LSTM, num_layers=2, bias=False),
    "lstm, two directions": lambda: Recurrent(nn.LSTM, 2, bidirectional=True),
    "lstm, projected": lambda: Recurrent(nn.LSTM, 5, proj_size=4),
    "last state": LastState,
    "image": Image,
    "attention": lambda: Attention(layer=False),
    "transformer": lambda: Attention(layer=True),
    "wide norm": WideNorm,
}


def batches(loss: Loss) -> list[MicroBatch]:
    """Three micro-batches of different shapes; classes are padded."""
    shapes = [(2, 4), (1, 6), (3, 2)]
    if isinstance(loss, SquaredError):
        return [(draw(*s, 3, seed=i), draw(*s, 4, seed=10 + i)) for i, s in enumerate(shapes)]
    return [
        (draw(b, t, 3, seed=i), padded_classes(t, 4, [max(1, t - j) for j in range(b)]))
        for i, (b, t) in enumerate(shapes)
    ]


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("name", NETS)
def test_equals_the_explicit_jacobian(name: str, loss: Loss) -> None:
    model, data = NETS[name]().double(), batches(loss)
    objective = Objective(model, loss, data)
    theta = 0.7 * draw(objective.space.size, seed=3)
    operator = objective.gauss_newton(theta)
    expected = dense.gauss_newton(model, loss, data, theta)
    assert float(expected.norm()) > 0.01
    torch.testing.assert_close(dense.matrix_of(operator), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["relu", "layer norm", "convolution"])
def test_is_positive_semi_definite(name: str) -> None:
    objective = Objective(NETS[name]().double(), CrossEntropy(), batches(CrossEntropy()))
    matrix = dense.matrix_of(objective.gauss_newton(objective.space.point()))
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-12


@pytest.mark.parametrize("name", NETS)
def test_what_is_linearised_is_the_model(name: str) -> None:
    model = NETS[name]().double()
    x = draw(2, 5, 3)
    with linearisable():
        recorded = model(x)
    torch.testing.assert_close(recorded, model(x), rtol=1e-12, atol=1e-14)
    assert recorded.shape == model(x).shape


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_frozen_weights_and_inputs_are_left_out(layer: type[nn.LSTM | nn.GRU]) -> None:
    model, loss = Recurrent(layer).double(), CrossEntropy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("hh" in name)
    data = batches(loss)
    objective = Objective(model, loss, data)
    theta = objective.space.point()
    expected = dense.gauss_newton(model, loss, data, theta)
    torch.testing.assert_close(dense.matrix_of(objective.gauss_newton(theta)), expected, rtol=1e-10, atol=1e-13)


def test_dropout_between_recurrent_layers_is_that_of_the_value() -> None:
    model = Recurrent(nn.LSTM, num_layers=2, dropout=0.5).double().train()
    x = draw(2, 50, 3)
    torch.manual_seed(0)
    plain = model(x)
    torch.manual_seed(0)
    with linearisable():
        recorded = model(x)
    torch.testing.assert_close(recorded, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["convolution", "layer norm", "lstm", "image", "attention"])
def test_low_precision_products_are_close(name: str) -> None:
    model = NETS[name]().float()
    data = [(x.float(), y) for x, y in batches(CrossEntropy())]
    exact, rough = (Objective(model, CrossEntropy(), data, autocast=kind) for kind in (None, torch.bfloat16))
    theta, v = exact.space.point(), draw(exact.space.size).float()
    expected, product = exact.gauss_newton(theta) @ v, rough.gauss_newton(theta) @ v
    assert product.dtype == torch.float32
    assert float((product - expected).norm()) < 0.05 * float(expected.norm())


def test_is_the_hessian_where_the_model_is_linear() -> None:
    model, loss = nn.Linear(3, 4).double(), CrossEntropy()
    data = batches(loss)
    objective = Objective(model, loss, data)
    theta = objective.space.point()
    hessian = torch.func.hessian(lambda t: dense.mean_loss(model, loss, data, t))(theta)
    torch.testing.assert_close(dense.matrix_of(objective.gauss_newton(theta)), hessian, rtol=1e-10, atol=1e-13)


def test_is_linearised_where_it_was_built_and_stays_there() -> None:
    model, loss = NETS["tanh"]().double(), CrossEntropy()
    objective = Objective(model, loss, batches(loss))
    theta, v = objective.space.point(), draw(objective.space.size)
    operator = objective.gauss_newton(theta)
    before = operator @ v
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(operator @ v, before)
    assert not torch.allclose(objective.gauss_newton(objective.space.point()) @ v, before)


def test_products_need_no_gradient_mode() -> None:
    objective = Objective(NETS["relu"]().double(), CrossEntropy(), batches(CrossEntropy()))
    operator, v = objective.gauss_newton(objective.space.point()), draw(objective.space.size)
    with torch.no_grad():
        product = operator @ v
    assert torch.equal(operator @ v, product)
    assert not product.requires_grad


@pytest.mark.parametrize("device", [CUDA])
def test_the_accelerator_agrees(device: str) -> None:
    model, loss = NETS["layer norm"]().double(), CrossEntropy()
    here = Objective(model, loss, batches(loss))
    theta, v = here.space.point(), draw(here.space.size)
    product = here.gauss_newton(theta) @ v
    there = Objective(model.to(device), loss, batches(loss)).gauss_newton(theta.to(device)) @ v.to(device)
    torch.testing.assert_close(there.cpu(), product, rtol=1e-9, atol=1e-12)
