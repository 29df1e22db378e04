"""Networks of images and graphs, written out: what `quadric.model.vision` and `quadric.model.graph` must compute."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from quadric.model.graph import GCN
from quadric.model.vision import VGG16, ResidualBlock, ResNet


def padding_shortcut(x: Tensor, outputs: int) -> Tensor:
    """Option A of He et al. (2016), pixel by pixel."""
    batch, inputs, height, width = x.shape
    if inputs == outputs:
        return x
    small = torch.zeros(batch, outputs, (height + 1) // 2, (width + 1) // 2, dtype=x.dtype)
    for channel in range(inputs):
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                small[:, channel, row // 2, column // 2] = x[:, channel, row, column]
    return small


def convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """3 by 3, padded by one pixel of zeros, as a sum of nine products."""
    batch, _, height, width = x.shape
    padded = torch.zeros(batch, x.shape[1], height + 2, width + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    total = 0.0
    for i in range(3):
        for j in range(3):
            view = padded[:, :, i : i + height : stride, j : j + width : stride]
            total = total + torch.einsum("oi,bihw->bohw", weight[:, :, i, j], view)
    return total


def normalised(x: Tensor, norm: torch.nn.BatchNorm2d) -> Tensor:
    """By the mean and the variance of the batch."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = norm.weight[:, None, None], norm.bias[:, None, None]
    return (x - mean) / (variance + norm.eps).sqrt() * scale + shift


def residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    outputs = block.second.out_channels
    stride = 1 if x.shape[1] == outputs else 2
    inner = normalised(convolution(x, block.first.weight, stride), block.first_norm).clamp(min=0)
    inner = normalised(convolution(inner, block.second.weight, 1), block.second_norm)
    return (padding_shortcut(x, outputs) + inner).clamp(min=0)


def residual_network(model: ResNet, images: Tensor) -> Tensor:
    x = normalised(convolution(images, model.first.weight, 1), model.norm).clamp(min=0)
    for block in model.blocks:
        x = residual_block(block, x)
    return x.mean((2, 3)) @ model.output.weight.T + model.output.bias


def vgg16(model: VGG16, images: Tensor) -> Tensor:
    """Network D of Simonyan and Zisserman (2015), with norms."""
    convolutions = iter([m for m in model.modules() if isinstance(m, torch.nn.Conv2d)])
    norms = iter([m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    x = images
    for layers in (2, 2, 3, 3, 3):
        for _ in range(layers):
            layer = next(convolutions)
            x = convolution(x, layer.weight, 1) + layer.bias[:, None, None]
            x = normalised(x, next(norms)).clamp(min=0)
        quarters = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = torch.stack(quarters).amax(0)
    first, second, last = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    x = (x[:, :, 0, 0] @ first.weight.T + first.bias).clamp(min=0)
    x = (x @ second.weight.T + second.bias).clamp(min=0)
    return x @ last.weight.T + last.bias


def adjacency(edges: Iterable[tuple[int, int]], nodes: int) -> Tensor:
    """The normalised adjacency of a graph with self loops, entry by entry."""
    plain = [[1.0 if i == j else 0.0 for j in range(nodes)] for i in range(nodes)]
    for i, j in edges:
        plain[i][j] = plain[j][i] = 1.0
    degree = [sum(row) for row in plain]
    return torch.tensor(
        [[plain[i][j] / math.sqrt(degree[i] * degree[j]) for j in range(nodes)] for i in range(nodes)],
        dtype=torch.float64,
    ).reshape(nodes, nodes)


def graph_convolutions(model: GCN, A: Tensor, X: Tensor) -> Tensor:
    """A relu(A X W0) W1."""
    return A @ (A @ X @ model.first.weight.T).clamp(min=0) @ model.second.weight.T
