"""Networks of images: deep autoencoders, and for images of 32 by 32 pixels VGG16 and residual networks.

Weights start by He's normal distribution, variance 2 / inputs, and biases at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

MNIST = (784, 1000, 500, 250, 30)
CURVES = (784, 400, 200, 100, 50, 25, 6)
FACES = (625, 2000, 1000, 500, 30)
"""Sizes of the autoencoders of Hinton and Salakhutdinov (2006), from the pixels to the code."""

_VGG16 = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
_SIDE = 32

Model = TypeVar("Model", bound=nn.Module)


def autoencoder(sizes: Sequence[int], *, divide: int = 1) -> nn.Sequential:
    """An encoder and its mirror image, of rectified linear units; the code and the output are linear.

    The networks of Hinton and Salakhutdinov (2006) with the units that Goldfarb, Ren and Bahamou (2020) train them
    with. The output is of real values or of logits, as its loss takes it.

    Args:
        sizes: pixels, units of the encoder's hidden layers, units of the code: `MNIST`, `CURVES` or `FACES`.
        divide: the hidden layers' units by this, the code's not.

    >>> model = autoencoder(MNIST, divide=10)
    >>> [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    [100, 50, 25, 30, 25, 50, 100, 784]
    >>> model(torch.zeros(2, 784)).shape
    torch.Size([2, 784])

    Raises:
        ValueError: there is no code, or a layer has no unit.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes is {list(sizes)}; give pixels, hidden layers and the code, each of at least one unit")
    pixels, *hidden, code = sizes
    if divide < 1 or (hidden and min(hidden) < divide):
        raise ValueError(
            f"divide is {divide}; give at least 1 and at most {min(hidden, default=1)}, the narrowest layer"
        )
    widths = [size // divide for size in hidden]
    layers: list[nn.Module] = []
    for low, high in pairwise([pixels, *widths, code, *widths[::-1], pixels]):
        layers += [nn.Linear(low, high), nn.ReLU()]
    linear = (len(layers) // 2 - 1, len(layers) - 1)
    return _started(nn.Sequential(*(layer for place, layer in enumerate(layers) if place not in linear)))


class VGG16(nn.Module):
    """VGG16 for 32 by 32 pixels: network D of Simonyan and Zisserman (2015) with batch normalisation, without dropout.

    Thirteen convolutions of 3 by 3 with biases in five groups, each ended by a maximum over 2 by 2, and three fully
    connected layers on the one pixel that is left.

    Args:
        classes: C.
        width: of the first convolutions; the others have 2, 4 and 8 times as many channels, the fully connected layers
            64 times as many units.

    >>> VGG16(10, width=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, *, width: int = 64) -> None:
        super().__init__()
        _check_sizes(classes, width)
        layers: list[nn.Module] = []
        below = 3
        for group in _VGG16:
            for times in group:
                layers += [nn.Conv2d(below, times * width, 3, padding=1), nn.BatchNorm2d(times * width), nn.ReLU()]
                below = times * width
            layers.append(nn.MaxPool2d(2))
        units = 64 * width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(below, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, classes)
        )
        _started(self)

    def forward(self, images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, "B C"]:
        """Logits.

        Raises:
            ValueError: images of another size.
        """
        _check_images(images)
        return self.classifier(self.features(images))


class ResNet(nn.Module):
    """The residual network of He et al. (2016, Section 4.2) for 32 by 32 pixels, with shortcuts of their option A.

    A convolution, three stages of (depth - 2) / 6 blocks with 1, 2 and 4 times as many channels on images of 32, 16 and
    8 pixels, the mean over the pixels, and one fully connected layer.

    Args:
        classes: C.
        depth: layers with weights: 20, 32, 44, 56, 110.
        width: channels of the first stage.

    >>> ResNet(10, depth=8, width=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, *, depth: int = 32, width: int = 16) -> None:
        super().__init__()
        _check_sizes(classes, width)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(
                f"depth is {depth}; three stages of n blocks make 6n + 2 layers: give 8, 14, 20, 26, 32, ..."
            )
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        channels = [times * width for times in (1, 2, 4) for _ in range((depth - 2) // 6)]
        self.blocks = nn.Sequential(*(ResidualBlock(low, high) for low, high in pairwise([width, *channels])))
        self.output = nn.Linear(4 * width, classes)
        _started(self)

    def forward(self, images: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, "B C"]:
        """Logits.

        Raises:
            ValueError: images of another size.
        """
        _check_images(images)
        return self.output(self.blocks(torch.relu(self.norm(self.first(images)))).mean((2, 3)))


class ResidualBlock(nn.Module):
    """relu(x' + F(x)): F two convolutions of 3 by 3, each normalised over the batch, with a rectifier between.

    x' is x or, where channels are more, every second pixel of every second row of x, with channels of zeros after its
    own: a shortcut without parameters (option A of He et al., 2016).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.added = (1, 0) if inputs == outputs else (2, outputs - inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        residual = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return torch.relu(self.shortcut(x) + residual)

    def shortcut(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        """x'."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, added={self.added}"


def _started(model: Model) -> Model:
    """The model, with weights and biases as they start; norms start as torch starts them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _check_sizes(classes: int, width: int) -> None:
    if classes < 1 or width < 1:
        raise ValueError(f"classes is {classes} and width is {width}; both must be at least 1")


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1:] != (3, _SIDE, _SIDE):
        raise ValueError(f"images has shape {tuple(images.shape)}; give [B, 3, {_SIDE}, {_SIDE}]")
