"""Shampoo and TNT the slow way: the Kronecker product of the damped factors, as one dense matrix."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def factors(gradients: list[Tensor], widths: list[int]) -> list[Tensor]:
    """H_i of each axis, a mean over ``gradients`` and all other axes; zero outside of blocks of the axis's width."""
    found = []
    for i, (n, width) in enumerate(zip(gradients[0].shape, widths, strict=True)):
        others = [j for j in range(gradients[0].ndim) if j != i]
        H = torch.stack([torch.tensordot(G, G, (others, others)) for G in gradients]).mean(0)
        H *= n / gradients[0].numel()
        block = torch.arange(n) // width
        found.append(H * (block[:, None] == block))
    return found


def kronecker(matrices: list[Tensor]) -> Tensor:
    """M_1 x ... x M_k, of the entries of a tensor in row-major order."""
    return reduce(torch.kron, matrices)


def shampoo(gradients: list[Tensor], momentum: Tensor, widths: list[int], damping: float, exponent: float) -> Tensor:
    """(M_1 x ... x M_k)^(exponent / k) vec(momentum), with M_i = H_i + damping tr(H_i) / n_i I."""
    damped = [H + damping * H.trace() / len(H) * torch.eye(len(H)).to(H) for H in factors(gradients, widths)]
    values, vectors = torch.linalg.eigh(kronecker(damped))
    return (vectors @ (values ** (exponent / momentum.ndim) * (vectors.T @ momentum.flatten()))).view(momentum.shape)


def tnt(gradients: list[Tensor], momentum: Tensor, widths: list[int], damping: float) -> Tensor:
    """(M_1 x ... x M_k)^-1 vec(momentum), with M_i = H_i / c^(k-1) + damping c I, c^k the mean square of a gradient."""
    k = momentum.ndim
    c = torch.stack(gradients).square().mean() ** (1 / k)
    same = [H / c ** (k - 1) for H in factors(gradients, widths)]
    damped = [H + damping * c * torch.eye(len(H)).to(H) for H in same]
    return torch.linalg.solve(kronecker(damped), momentum.flatten()).view(momentum.shape)
