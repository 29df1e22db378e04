"""Mini-block Fisher the slow way: a dense matrix for each layer, of which blocks are cut out."""

from __future__ import annotations

import torch
from torch import Tensor


def groups(kind: str, shape: tuple[int, ...], bias: bool, widths: list[int]) -> list[list[int]]:
    """The entries of the flat vector (weight, bias) that make each block, in its order."""
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    biases = weight.numel() + torch.arange(shape[0] if bias else 0)
    if kind == "entries":
        return [[int(i)] for i in (*weight.flatten(), *biases)]
    if kind == "kernels":
        kernels = [kernel.flatten().tolist() for channel in weight for kernel in channel]
        return [*kernels, *([int(i)] for i in biases)]
    rows = [[*row.flatten().tolist(), *([int(biases[o])] if bias else [])] for o, row in enumerate(weight)]
    return [part.tolist() for row in rows for part in torch.tensor(row).split(widths)]


def direction(
    gradients: list[Tensor], momentum: Tensor, blocks: list[list[int]], averaged: int, damping: float, power: float
) -> Tensor:
    """(S + damping I)^power momentum, with S the mean of g g' over ``gradients``, but for what is between blocks.

    ``averaged``: every so many blocks are one and the same kind, and have the mean of these; 0: each has its own.
    """
    S = torch.stack([torch.outer(g, g) for g in gradients]).mean(0)
    own = [S[block][:, block] for block in blocks]
    if averaged:
        own = [torch.stack(own[k % averaged :: averaged]).mean(0) for k in range(len(own))]
    out = torch.empty_like(momentum)
    for block, matrix in zip(blocks, own, strict=True):
        values, vectors = torch.linalg.eigh(matrix + damping * torch.eye(len(block), dtype=matrix.dtype))
        out[block] = vectors @ (values**power * (vectors.T @ momentum[block]))
    return out
