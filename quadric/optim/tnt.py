"""Tensor normal training (Ren and Goldfarb, 2021): the Fisher matrix of a tensor-normal distribution of gradients.

A tensor of parameters ``[n_1, ..., n_k]`` has a gradient G whose covariance is taken as a Kronecker product of a factor
for each axis. With H_i = E[G_(i) G_(i)'], the factors are H_i over the number that makes the mean diagonal of all of
them the same, c, and that of their product the mean square of G, c^k = tr(H_1) / (n_1 ... n_k).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import Block, inverse
from quadric.optim.contraction import Axis, Contracted, Tensors, shifts
from quadric.optim.layers import Kind, Layer
from quadric.optim.mini_block import Entries, MiniBlocks


def tnt(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    tensors: Tensors = Tensors(),
    **options: Any,
) -> BlockDiagonal:
    """Tensor normal training (Ren and Goldfarb, 2021), in the place of Adam.

    Tables of embeddings have a diagonal factor for all entries, as in mini-block Fisher.

    Args:
        model: whose tensors have the factors.
        params: parameters or groups of it; None: all that are trainable.
        lr: with the default lengths, what it is in Adam.
        tensors: which tensors the parameters are taken as, and how large their factors are.
        options: momentum, weight decay, damping, schedule, length and fisher, as in `BlockDiagonal`; the paper's length
            is `quadric.optim.length.Natural` and its fisher ``"sampled"``. Damping is a share of the mean diagonal c:
            the authors' epsilon is damping c.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> optimizer = tnt(model)
    >>> for layer in optimizer.coverage:
    ...     print(layer)
    0.weight, 0.bias: TNT, 1 of 2 x 2 by 1 of 9 x 9 and 1 of 2 x 2 (Conv2d: kernels)
    2.weight, 2.bias: TNT, 1 of 1 x 1 by 1 of 8 x 8 and 1 of 1 x 1 (Linear: a matrix)
    >>> model(torch.randn(5, 1, 4, 4)).square().mean().backward()
    >>> optimizer.step()
    """
    return BlockDiagonal(
        model,
        partial(_block, options=tensors),
        params,
        lr=lr,
        **options,
    )


class TNT(Contracted):
    """P_i = (H_i / s_i + epsilon I)^-1 with s_i = c^(k-1) prod_(j != i) n_j; here s_i (H_i + s_i epsilon I)^-1.

    Where there was no gradient at all, c is taken as one.
    """

    def inverted(self, statistics: Sequence[Tensor], axes: Sequence[Axis], damping: float) -> list[Tensor]:
        size = math.prod(axis.length for axis in axes)
        square = statistics[0].diagonal(dim1=1, dim2=2).sum(dtype=torch.float64) / size
        c = torch.where(square > 0, square, torch.ones_like(square)).pow(1 / len(axes))
        found = []
        for H, axis in zip(statistics, axes, strict=True):
            s = c ** (len(axes) - 1) * (size // axis.length)
            found.append(inverse(H, shifts(H, axis, damping)).mul_(s))
        return found


def _block(layer: Layer, options: Tensors) -> Block:
    return Entries(layer, MiniBlocks()) if layer.kind is Kind.TABLE else TNT(layer, options)
