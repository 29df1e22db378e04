"""Tensor normal training (Ren and Goldfarb, 2021): the Fisher matrix of a tensor-normal distribution of gradients.

The gradient G ``[n_1, ..., n_k]`` of a tensor is taken as normal, with a covariance that is a Kronecker product of one
factor for each axis. The factors are H_i / c^(k-1), with H_i = E[G_(i) G_(i)'] / prod_(j != i) n_j and c^k the mean
square of G: all have the mean diagonal c, and their product that of the covariance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import inverse
from quadric.optim.contraction import Axis, Contracted, Tensors, shifts, tensor_block
from quadric.optim.damping import Damping


def tnt(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    damping: float | Damping = 1.0,
    tensors: Tensors = Tensors(),
    **options: Any,
) -> BlockDiagonal:
    """Tensor normal training (Ren and Goldfarb, 2021), in the place of Adam.

    Args:
        model, params, lr, options: as in `mini_block_fisher`; the paper's fisher is ``"sampled"``.
        damping: as a share of the mean diagonal c of the factors; the paper's epsilon is damping c. It acts on every
            factor: 0.03 makes a direction of little gradient in k axes 33^k times as long as it was.
        tensors: which tensors the parameters are taken as, and how large their factors are.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> optimizer = tnt(model)
    >>> for layer in optimizer.coverage:
    ...     print(layer)
    0.weight, 0.bias: TNT, 1 of 2 x 2 by 1 of 9 x 9 and 1 of 2 x 2 (Conv2d: kernels)
    2.weight, 2.bias: TNT, 1 of 1 x 1 by 1 of 8 x 8 and 1 of 1 x 1 (Linear: a matrix)
    >>> model(torch.randn(5, 1, 4, 4)).square().mean().backward()
    >>> optimizer.step()
    """
    block = partial(tensor_block, method=partial(TNT, options=tensors))
    return BlockDiagonal(model, block, params, lr=lr, damping=damping, **options)


class TNT(Contracted):
    """P_i = (H_i / c^(k-1) + epsilon I)^-1; where there was no gradient at all, c is taken as one."""

    def inverted(self, statistics: Sequence[Tensor], axes: Sequence[Axis], damping: float) -> list[Tensor]:
        square = statistics[0].diagonal(dim1=1, dim2=2).sum(dtype=torch.float64) / axes[0].length
        scale = torch.where(square > 0, square, torch.ones_like(square)) ** (1 - 1 / len(axes))
        return [inverse(H, shifts(H, axis, damping)).mul_(scale) for H, axis in zip(statistics, axes, strict=True)]
