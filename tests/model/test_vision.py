from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from quadric.model.vision import CURVES, FACES, MNIST, VGG16, ResNet, autoencoder
from reference import networks

Model = TypeVar("Model", bound=nn.Module)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64)


def shaken(model: Model) -> Model:
    """In float64, with biases that are not zero and norms that do something."""
    with torch.no_grad():
        for p in model.double().parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def gradients_are_right(model: nn.Module, inputs: Tensor) -> bool:
    """With respect to the inputs and all parameters, against finite differences along a random direction."""
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in model.named_parameters()), strict=True)
    return torch.autograd.gradcheck(
        lambda x, *parameters: functional_call(model, dict(zip(names, parameters, strict=True)), (x,)).square().sum(),
        (inputs.requires_grad_(), *values),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [(MNIST, 2_837_314), (CURVES, 842_340), (FACES, 7_537_655)],
    ids=["MNIST", "CURVES", "FACES"],
)
def test_autoencoders_are_those_of_the_paper(sizes: tuple[int, ...], parameters: int) -> None:
    model = autoencoder(sizes)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in layers] == [*sizes, *sizes[-2:0:-1]]
    assert layers[-1].out_features == sizes[0]
    weights, biases = 2 * sum(a * b for a, b in pairwise(sizes)), 2 * sum(sizes[1:-1]) + sizes[0] + sizes[-1]
    assert weights + biases == parameters
    assert count(model) == parameters


def test_an_autoencoder_is_linear_at_its_code_and_its_output_alone() -> None:
    kinds = [type(layer).__name__ for layer in autoencoder((6, 5, 4, 2))]
    hidden = ["Linear", "ReLU"]
    assert kinds == [*hidden, *hidden, "Linear", *hidden, *hidden, "Linear"]
    assert [type(layer).__name__ for layer in autoencoder((6, 2))] == ["Linear", "Linear"]


def test_an_autoencoder_equals_its_products() -> None:
    model, x = shaken(autoencoder((6, 5, 4, 2))), torch.randn(3, 6, dtype=torch.float64)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    h = x
    for place, layer in enumerate(layers):
        h = h @ layer.weight.T + layer.bias
        h = h if place in (2, 5) else h.clamp(min=0)
    torch.testing.assert_close(model(x), h)
    assert gradients_are_right(model, x)


def test_narrowing_leaves_the_pixels_and_the_code() -> None:
    layers = [layer for layer in autoencoder(CURVES, divide=25) if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [16, 8, 4, 2, 1, 6, 1, 2, 4, 8, 16, 784]


@pytest.mark.parametrize("model", [lambda: autoencoder(MNIST), lambda: VGG16(), lambda: ResNet()])
def test_weights_start_by_he_and_biases_at_zero(model: object) -> None:
    layers = [m for m in model().modules() if isinstance(m, nn.Linear | nn.Conv2d)]  # type: ignore[operator]
    for layer in layers:
        weight, entries = layer.weight.detach(), layer.weight.numel()
        assert float(weight.var()) == pytest.approx(2 / weight[0].numel(), rel=6 * math.sqrt(2 / entries))
        kurtosis = float((weight / weight.std()).pow(4).mean())
        assert kurtosis == pytest.approx(3, abs=6 * math.sqrt(24 / entries)) or entries < 1000
        assert layer.bias is None or not layer.bias.any()


def test_vgg16_is_the_network_of_the_paper() -> None:
    """Without the norms, and with the paper's connection to 224 by 224 pixels and 1000 classes, 138 million weights."""
    model = VGG16(1000)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(layers), len(norms)) == (16, 13)
    own = count(model) - sum(map(count, norms))
    assert own + (7 * 7 - 1) * 512 * 4096 == 138_357_544
    assert not any(isinstance(m, nn.Dropout | nn.AdaptiveAvgPool2d) for m in model.modules())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_vgg16_narrows() -> None:
    wide, narrow = ([m for m in VGG16(7, width=w).modules() if isinstance(m, nn.Linear | nn.Conv2d)] for w in (64, 16))
    assert [m.weight.shape[0] for m in narrow[:-1]] == [m.weight.shape[0] // 4 for m in wide[:-1]]
    assert narrow[-1].weight.shape == (7, 1024)


def test_vgg16_equals_the_one_written_out() -> None:
    model, x = shaken(VGG16(2, width=1)), images(3)
    torch.testing.assert_close(model(x), networks.vgg16(model, x))
    assert gradients_are_right(model, x)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_residual_networks_have_the_parameters_of_the_paper(depth: int, parameters: float) -> None:
    """He et al. (2016), Table 6, in millions."""
    millions = count(ResNet(depth=depth)) / 1e6
    assert round(millions, 1 if depth == 110 else 2) == parameters
    layers = [m for m in ResNet(depth=depth).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == depth


def test_resnet32_has_three_stages() -> None:
    model = ResNet()
    assert count(model) == 464_154
    x, shapes = torch.zeros(1, 16, 32, 32), []
    for block in model.blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32)] * 5 + [(32, 16, 16)] * 5 + [(64, 8, 8)] * 5


def test_a_residual_network_equals_the_one_written_out() -> None:
    model, x = shaken(ResNet(3, depth=8, width=2)), images(2)
    torch.testing.assert_close(model(x), networks.residual_network(model, x))
    assert gradients_are_right(model, x)


def test_in_evaluation_images_are_strangers() -> None:
    x = images(3)
    for model in (VGG16(2, width=1).double().eval(), ResNet(2, depth=8, width=2).double().eval()):
        torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: autoencoder((3,)), "sizes is"),
        (lambda: autoencoder((3, 0, 2)), "sizes is"),
        (lambda: autoencoder((9, 4, 2), divide=5), "divide is 5; give at least 1 and at most 4"),
        (lambda: autoencoder((9, 4, 2), divide=0), "divide is 0"),
        (lambda: VGG16(0), "classes is 0"),
        (lambda: VGG16(width=0), "width is 0"),
        (lambda: ResNet(width=0), "width is 0"),
        (lambda: ResNet(depth=34), "depth is 34"),
        (lambda: ResNet(depth=2), "depth is 2"),
        (lambda: VGG16(2, width=1)(torch.zeros(2, 3, 64, 64)), r"\(2, 3, 64, 64\); give \[B, 3, 32, 32\]"),
        (lambda: ResNet(2, depth=8, width=1)(torch.zeros(3, 32, 32)), r"\(3, 32, 32\)"),
    ],
)
def test_misuse_is_named(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
