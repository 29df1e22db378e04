"""Shampoo (Gupta, Koren and Singer, 2018): a root of a factor for each axis of each tensor of parameters.

With the batch's mean gradient G of a tensor of k axes and H_i <- decay H_i + (1 - decay) G_(i) G_(i)' / prod_(j != i)
n_j, the direction is G x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k). The original sums H_i over the steps; averages that move
are those of Ren and Goldfarb (2021) and of most implementations. Neither divides by the n_j: see `contraction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import power
from quadric.optim.contraction import Axis, Contracted, Tensors, shifts, tensor_block
from quadric.optim.layers import Layer


def shampoo(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    tensors: Tensors = Tensors(),
    exponent: float = -0.5,
    **options: Any,
) -> BlockDiagonal:
    """Shampoo (Gupta, Koren and Singer, 2018, Algorithm 2), in the place of Adam.

    Args:
        model, params, lr, options: as in `mini_block_fisher`. Damping is a share of each factor's mean diagonal: of the
            H_i of Ren and Goldfarb (2021), without prod n_j, their epsilon is damping tr(H_i) / n_i.
        tensors: which tensors the parameters are taken as, and how large their factors are.
        exponent: of the Kronecker product of the k factors, each of which has the k-th part of it: the paper's -1/2,
            or -1.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> optimizer = shampoo(model)
    >>> for layer in optimizer.coverage:
    ...     print(layer)
    0.weight, 0.bias: Shampoo, 1 of 2 x 2 by 1 of 9 x 9 and 1 of 2 x 2 (Conv2d: kernels)
    2.weight, 2.bias: Shampoo, 1 of 1 x 1 by 1 of 8 x 8 and 1 of 1 x 1 (Linear: a matrix)
    >>> model(torch.randn(5, 1, 4, 4)).square().mean().backward()
    >>> optimizer.step()
    """
    if exponent not in (-0.5, -1.0):
        raise ValueError(f"exponent={exponent}: give -0.5 for the paper's roots, or -1")
    method = partial(Shampoo, options=tensors, exponent=exponent)
    return BlockDiagonal(model, partial(tensor_block, method=method, exponent=exponent), params, lr=lr, **options)


class Shampoo(Contracted):
    """P_i = (H_i + epsilon_i I)^(exponent / k)."""

    def __init__(self, layer: Layer, options: Tensors, exponent: float = -0.5) -> None:
        super().__init__(layer, options)
        self.exponent = exponent

    def inverted(self, statistics: Sequence[Tensor], axes: Sequence[Axis], damping: float) -> list[Tensor]:
        return [
            power(H, shifts(H, axis, damping), self.exponent / len(axes))
            for H, axis in zip(statistics, axes, strict=True)
        ]
