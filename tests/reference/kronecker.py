"""Kronecker factors the slow way: one example at a time, one position after the other, and a dense inverse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 5, 3), (6, 5)),
    "linear without bias": (partial(nn.Linear, 5, 3, bias=False), (6, 5)),
    "positions": (partial(nn.Linear, 5, 3), (4, 2, 3, 5)),
    "conv1d": (partial(nn.Conv1d, 2, 3, 3, padding=1), (3, 2, 7)),
    "conv1d, dilated": (partial(nn.Conv1d, 2, 3, 3, dilation=2, bias=False), (3, 2, 9)),
    "conv1d, long": (partial(nn.Conv1d, 2, 3, 4, dilation=3), (3, 2, 30)),
    "conv1d, 1": (partial(nn.Conv1d, 2, 3, 1, stride=2, padding=1), (3, 2, 5)),
    "conv2d": (partial(nn.Conv2d, 2, 3, 3, padding=1), (3, 2, 5, 6)),
    "conv2d, strided": (partial(nn.Conv2d, 2, 3, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 2, 7, 8)),
    "conv2d, dilated": (partial(nn.Conv2d, 2, 3, (2, 3), dilation=(3, 2), padding="same"), (3, 2, 8, 7)),
    "conv2d, small": (partial(nn.Conv2d, 2, 3, 3), (3, 2, 3, 4)),
    "conv2d, circular": (partial(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 4, 5)),
    "conv2d, 1 x 1": (partial(nn.Conv2d, 2, 3, 1, stride=2), (3, 2, 4, 5)),
}
"""Layers, each with the shape of a batch for it."""


def wave(output: Tensor, target: Tensor) -> Tensor:
    """A loss that is not quadratic, the mean over the batch."""
    return (output * target).tanh().flatten(1).sum(1).mean()


Uses = list[tuple[Tensor, Tensor]]
"""Of one example, the inputs ``[entries]`` of a layer and the gradient ``[outputs]``, at every position."""


class Watched(nn.Module):
    """A layer whose inputs and outputs stay to be looked at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.seen = layer, list[tuple[Tensor, Tensor]]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + 0.0
        y.retain_grad()
        self.seen.append((x.detach(), y))
        return y


def uses(model: nn.Module, name: str, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Uses]:
    """What each example of a batch shows of the layer ``name``; ``loss`` is of a batch of one."""
    layer = model.get_submodule(name)
    watched = Watched(layer)
    model.set_submodule(name, watched)
    found = []
    for n in range(len(x)):
        watched.seen.clear()
        model.zero_grad()
        loss(model(x[n : n + 1]), y[n : n + 1]).backward()
        found.append([pair for a, out in watched.seen for pair in positions(layer, a[0], out.grad[0])])
    model.set_submodule(name, layer)
    model.zero_grad()
    return found


def positions(layer: nn.Module, a: Tensor, g: Tensor) -> Uses:
    """The positions of one call for one example, each with the inputs in the order of the layer's weight, and 1."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        one = isinstance(layer, nn.Conv1d)
        sides = [side for k in range(len(layer.kernel_size) - 1, -1, -1) for side in _sides(layer, k)]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        a = functional.pad(a.unsqueeze(0), sides, mode)
        kernel, stride, dilation = (
            (*of, *((1,) if one else ())) for of in (layer.kernel_size, layer.stride, layer.dilation)
        )
        a = functional.unfold(a.unsqueeze(3) if one else a, kernel, dilation, 0, stride)[0].T
        g = g.flatten(1).T
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    if layer.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    return list(zip(a, g, strict=True))


def _sides(layer: nn.Conv1d | nn.Conv2d, k: int) -> tuple[int, int]:
    if layer.padding == "same":
        total = layer.dilation[k] * (layer.kernel_size[k] - 1)
        return total // 2, total - total // 2
    side = 0 if layer.padding == "valid" else int(layer.padding[k])
    return side, side


def factors(found: list[Uses], sharing: str) -> tuple[Tensor, Tensor]:
    """A and G."""
    (a, g), N = found[0][0], len(found)
    A, G = torch.zeros(len(a), len(a), dtype=a.dtype), torch.zeros(len(g), len(g), dtype=a.dtype)
    for example in found:
        R = len(example)
        if sharing == "reduce":
            mean, total = sum(a for a, _ in example) / R, sum(g for _, g in example)
            A += torch.outer(mean, mean) / N
            G += torch.outer(total, total) / N
        else:
            for a, g in example:
                A += torch.outer(a, a) / (N * R)
                G += torch.outer(g, g) / N
    return A, G


def gradients(found: list[Uses]) -> Tensor:
    """Each example's gradient ``[N, outputs, entries]``."""
    return torch.stack([sum(torch.outer(g, a) for a, g in example) for example in found])


def direction(A: Tensor, G: Tensor, D: Tensor, damping: float, pi: str) -> Tensor:
    """vec^-1 of ((A + pi sqrt(lambda) I) x (G + sqrt(lambda) / pi I))^-1 vec(D), for D ``[outputs, entries]``."""
    of_A, of_G = A.trace() / len(A), G.trace() / len(G)
    root = (damping * of_A * of_G).sqrt()
    ratio = (of_A / of_G).sqrt() if pi == "trace" else 1.0
    A = A + root * ratio * torch.eye(len(A), dtype=A.dtype)
    G = G + root / ratio * torch.eye(len(G), dtype=G.dtype)
    return torch.linalg.solve(torch.kron(G, A), D.flatten()).view_as(D)
