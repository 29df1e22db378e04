"""The Gauss-Newton operator against the explicit Jacobian."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cases import MicroBatch, draw, padded_classes
from quadric.loss.loss import CrossEntropy, Loss, SquaredError
from quadric.objective.curvature import Curvature
from quadric.objective.layers import linearisable
from quadric.objective.linear_layer import Layer
from quadric.objective.objective import Objective
from quadric.space import ParameterSpace
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
    operator = objective.curvature(theta)
    expected = dense.gauss_newton(model, loss, data, theta)
    assert float(expected.norm()) > 0.01
    torch.testing.assert_close(dense.matrix_of(operator), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["relu", "layer norm", "convolution"])
def test_is_positive_semi_definite(name: str) -> None:
    objective = Objective(NETS[name]().double(), CrossEntropy(), batches(CrossEntropy()))
    matrix = dense.matrix_of(objective.curvature(objective.space.point()))
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
    torch.testing.assert_close(dense.matrix_of(objective.curvature(theta)), expected, rtol=1e-10, atol=1e-13)


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
    expected, product = exact.curvature(theta) @ v, rough.curvature(theta) @ v
    assert product.dtype == torch.float32
    assert float((product - expected).norm()) < 0.05 * float(expected.norm())


def test_is_the_hessian_where_the_model_is_linear() -> None:
    model, loss = nn.Linear(3, 4).double(), CrossEntropy()
    data = batches(loss)
    objective = Objective(model, loss, data)
    theta = objective.space.point()
    hessian = torch.func.hessian(lambda t: dense.mean_loss(model, loss, data, t))(theta)
    torch.testing.assert_close(dense.matrix_of(objective.curvature(theta)), hessian, rtol=1e-10, atol=1e-13)


def test_is_linearised_where_it_was_built_and_stays_there() -> None:
    model, loss = NETS["tanh"]().double(), CrossEntropy()
    objective = Objective(model, loss, batches(loss))
    theta, v = objective.space.point(), draw(objective.space.size)
    operator = objective.curvature(theta)
    before = operator @ v
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(operator @ v, before)
    assert not torch.allclose(objective.curvature(objective.space.point()) @ v, before)


def test_products_need_no_gradient_mode() -> None:
    objective = Objective(NETS["relu"]().double(), CrossEntropy(), batches(CrossEntropy()))
    operator, v = objective.curvature(objective.space.point()), draw(objective.space.size)
    with torch.no_grad():
        product = operator @ v
    assert torch.equal(operator @ v, product)
    assert not product.requires_grad


@pytest.mark.parametrize("device", [CUDA])
def test_the_accelerator_agrees(device: str) -> None:
    model, loss = NETS["layer norm"]().double(), CrossEntropy()
    here = Objective(model, loss, batches(loss))
    theta, v = here.space.point(), draw(here.space.size)
    product = here.curvature(theta) @ v
    there = Objective(model.to(device), loss, batches(loss)).curvature(theta.to(device)) @ v.to(device)
    torch.testing.assert_close(there.cpu(), product, rtol=1e-9, atol=1e-12)


def explicit(model: nn.Module, loss: Loss, data: list[MicroBatch], theta: Tensor) -> Tensor:
    """The empirical Fisher matrix, frame by frame, by explicit Jacobians."""
    total = theta.new_zeros(len(theta), len(theta))
    for x, y in data:
        output = dense.output_at(model, theta, x).detach().requires_grad_()
        (u,) = torch.autograd.grad(loss(output, y), output)
        J = torch.func.jacrev(lambda t, x=x: dense.output_at(model, t, x))(theta)
        per_frame = torch.einsum("btc,btcn->btn", u, J).flatten(0, 1)
        total += per_frame.T @ per_frame
    return total / sum(loss.weight(y) for _, y in data)


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("name", ["tanh", "layer norm", "lstm", "image"])
def test_empirical_fisher_is_the_outer_product_of_each_frames_gradient(name: str, loss: Loss) -> None:
    model, data = NETS[name]().double(), batches(loss)
    objective = Objective(model, loss, data)
    theta = 0.7 * draw(objective.space.size, seed=3)
    found = dense.matrix_of(objective.curvature(theta, Curvature.EMPIRICAL_FISHER))
    torch.testing.assert_close(found, explicit(model, loss, data, theta), rtol=1e-9, atol=1e-13)
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=lambda loss: type(loss).__name__)
def test_fisher_is_gauss_newton_in_expectation(loss: Loss) -> None:
    """The losses are negative log-likelihoods of exponential families in their natural parameters."""
    model, data = NETS["tanh"]().double(), batches(loss)
    theta = 0.7 * draw(ParameterSpace(model).size, seed=3)
    gauss_newton = dense.gauss_newton(model, loss, data, theta)
    v = draw(len(theta), seed=4)
    products = []
    for seed in range(300):
        objective = Objective(model, loss, data, seed=1000 * seed)
        operator = objective.curvature(theta, Curvature.FISHER)
        assert torch.equal(operator @ v, operator @ v)
        products.append(operator @ v)
    drawn = torch.stack(products)
    deviation = (drawn.mean(0) - gauss_newton @ v) / (drawn.std(0) / len(drawn) ** 0.5)
    assert float(deviation.square().mean()) < 1.6  # the square of a standard normal number, over all parameters
    assert float(drawn.std(0).max()) > 0


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("name", ["linear", "tanh", "layer norm", "lstm", "image", "attention", "tied"])
def test_hessian_is_the_hessian(name: str, loss: Loss) -> None:
    model, data = NETS[name]().double(), batches(loss)
    objective = Objective(model, loss, data)
    theta, v = 0.7 * draw(objective.space.size, seed=3), draw(objective.space.size, seed=4)

    def gradient(t: Tensor) -> Tensor:
        return objective.value_and_grad(t)[1]

    step = 1e-5
    central = (gradient(theta + step * v) - gradient(theta - step * v)) / (2 * step)
    torch.testing.assert_close(objective.curvature(theta, Curvature.HESSIAN) @ v, central, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", Curvature)
def test_a_memory_budget_changes_the_price_alone(kind: Curvature) -> None:
    model, loss = NETS["lstm"]().double(), CrossEntropy()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    data = batches(loss)
    products, forwards = [], []
    for memory in (None, 0, 6_000):
        objective = Objective(model, loss, data, memory=memory)
        theta = 0.7 * draw(objective.space.size, seed=3)
        operator = objective.curvature(theta, kind)
        calls = 0
        products.append(operator @ draw(objective.space.size))
        forwards.append(calls)
    assert torch.equal(products[0], products[1]) and torch.equal(products[0], products[2])
    assert forwards[0] == 0 and forwards[1] == 2  # the first micro-batch always stays
    assert 0 < forwards[2] < 2 or kind is not Curvature.GAUSS_NEWTON


def test_running_statistics_move_with_the_gradient_alone() -> None:
    def build(*, tracking: bool) -> nn.Sequential:
        norm = nn.BatchNorm1d(5, track_running_stats=tracking)
        return nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 4)).double()

    model = build(tracking=True)
    loss, data = CrossEntropy(), [(draw(7, 3), torch.arange(7) % 4), (draw(9, 3, seed=1), torch.arange(9) % 4)]
    objective = Objective(model, loss, data)
    theta, before = objective.space.point(), model[1].running_mean.clone()
    operator = objective.curvature(theta)
    _ = operator @ theta, objective.value(theta)
    assert torch.equal(model[1].running_mean, before) and int(model[1].num_batches_tracked) == 0
    objective.value_and_grad(theta)
    assert not torch.equal(model[1].running_mean, before) and int(model[1].num_batches_tracked) == 2
    expected = dense.gauss_newton(build(tracking=False), loss, data, theta)
    torch.testing.assert_close(dense.matrix_of(operator), expected, rtol=1e-9, atol=1e-12)


def test_tiny_and_huge_directions_lose_nothing() -> None:
    objective = Objective(NETS["tanh"]().float(), CrossEntropy(), [(x.float(), y) for x, y in batches(CrossEntropy())])
    operator, v = objective.curvature(objective.space.point()), draw(objective.space.size).float()
    for factor in (2.0**-100, 2.0**100):
        torch.testing.assert_close((operator @ (v * factor)) / factor, operator @ v, rtol=1e-6, atol=0)
    assert not (operator @ torch.zeros_like(v)).any()


def test_without_a_scale_directions_are_taken_as_they_are() -> None:
    objective = Objective(NETS["tanh"]().float(), CrossEntropy(), [(x.float(), y) for x, y in batches(CrossEntropy())])
    operator = objective.curvature(objective.space.point())
    v, huge = draw(objective.space.size).sign().float(), 2.0**126
    product = operator @ v
    torch.testing.assert_close((operator @ (v * huge)) / huge, product, rtol=1e-5, atol=1e-7)
    operator.scale = 0.0
    torch.testing.assert_close(operator @ v, product, rtol=1e-5, atol=1e-7)
    assert not (operator @ (v * huge)).isfinite().any()


def test_curvature_that_a_loss_lacks_is_refused() -> None:
    class Bare(SquaredError):
        curvature, sample = Loss.curvature, Loss.sample

    objective = Objective(NETS["tanh"]().double(), Bare(), batches(SquaredError()))
    v = draw(objective.space.size)
    with pytest.raises(NotImplementedError, match="Bare has no curvature in output space"):
        _ = objective.curvature(v) @ v
    with pytest.raises(NotImplementedError, match="Bare is no distribution of targets"):
        objective.curvature(v, Curvature.FISHER)


@pytest.mark.parametrize("name", ["image", "wide norm", "lstm, two directions", "gru, two layers, two directions"])
def test_what_was_retained_is_freed(name: str) -> None:
    model, loss = NETS[name]().double(), CrossEntropy()
    alive = []
    for _ in range(3):
        objective = Objective(model, loss, batches(loss))
        operator = objective.curvature(objective.space.point())
        _ = operator @ objective.space.point()
        del operator, objective
        gc.collect()
        alive.append(sum(isinstance(thing, (Tensor, Layer)) for thing in gc.get_objects()))
    assert alive[0] == alive[1] == alive[2]


def test_outputs_that_no_parameter_reaches_curve_nothing() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if len(x) > 1 else x.new_ones(*x.shape[:-1], 4)

    model, loss = Switched().double(), CrossEntropy()
    one, other = (draw(2, 3), torch.tensor([0, 1])), (draw(1, 3), torch.tensor([2]))
    theta = ParameterSpace(model).point()
    both = dense.matrix_of(Objective(model, loss, [one, other]).curvature(theta))
    torch.testing.assert_close(both, dense.gauss_newton(model, loss, [one], theta) * 2 / 3)


def test_curvatures_asked_for_together_share_one_record_of_the_model() -> None:
    calls = 0

    class Counting(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().forward(input)

    torch.manual_seed(0)
    model = Counting(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    batches = [(draw(4, 9, 3, seed=s), padded_classes(9, 4, [9, 7, 8, 9])) for s in range(3)]
    objective, kinds = Objective(model, CrossEntropy(), batches), list(Curvature)
    theta = objective.space.point()
    singly = [dense.matrix_of(objective.curvature(theta, kind)) for kind in kinds]
    calls = 0
    together = objective.curvatures(theta, kinds[:3])
    assert calls == 3
    together += objective.curvatures(theta, kinds[3:])
    for operator, expected in zip(together, singly, strict=True):
        torch.testing.assert_close(dense.matrix_of(operator), expected, rtol=1e-12, atol=1e-14)
    calls = 0
    dense.matrix_of(Objective(model, CrossEntropy(), batches, memory=0).curvatures(theta, kinds)[0])
    assert calls == 2 * (1 + 2 * len(theta))  # the first is retained, the others are recorded for every product


class Skewed(SquaredError):
    """A curvature that is not symmetric."""

    def curvature(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: v + v.roll(1, -1)


def test_a_curvature_that_is_not_symmetric_is_refused() -> None:
    objective = Objective(nn.Linear(3, 4).double(), Skewed(), [(draw(6, 3), draw(6, 4, seed=1))])
    with pytest.raises(ValueError, match=r"loss=Skewed\(\): its GAUSS_NEWTON curvature is not symm.*symmetric part"):
        objective.curvature(objective.space.point())


def test_a_kind_of_curvature_that_is_none_is_refused() -> None:
    objective = Objective(nn.Linear(3, 4).double(), SquaredError(), [(draw(6, 3), draw(6, 4, seed=1))])
    with pytest.raises(ValueError, match="kind='fisher': give a Curvature"):
        objective.curvature(objective.space.point(), "fisher")  # type: ignore[arg-type]
