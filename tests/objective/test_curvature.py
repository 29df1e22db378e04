"""The Gauss-Newton operator against the explicit Jacobian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import MicroBatch, draw, padded_classes
from quadric.loss.loss import CrossEntropy, Loss, SquaredError
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

    def __init__(self, layer: type[nn.RNN | nn.GRU | nn.LSTM], **options: Any) -> None:
        super().__init__()
        self.layer = layer(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


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
