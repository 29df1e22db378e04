"""Shampoo and TNT the slow way: the Kronecker product of the damped factors, as one dense matrix."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def factors(gradients: list[Tensor], widths: list[int]) -> list[Tensor]:
    """H_i of each axis, the mean over ``gradients``; zero but for blocks of the axis's width along the diagonal."""
    found = []
    for i, (n, width) in enumerate(zip(gradients[0].shape, widths, strict=True)):
        others = [j for j in range(gradients[0].ndim) if j != i]
        H = torch.stack([torch.tensordot(G, G, (others, others)) for G in gradients]).mean(0)
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
    """(M_1 x ... x M_k)^-1 vec(momentum), with M_i = H_i / (c^(k-1) prod_(j != i) n_j) + damping c I."""
    found, k = factors(gradients, widths), momentum.ndim
    c = (found[0].trace() / momentum.numel()) ** (1 / k)
    same = [H / (c ** (k - 1) * (momentum.numel() / len(H))) for H in found]
    damped = [H + damping * c * torch.eye(len(H)).to(H) for H in same]
    return torch.linalg.solve(kronecker(damped), momentum.flatten()).view(momentum.shape)
