"""Inner products that a long run of a Krylov method can trust."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = {"cpu": 1 << 17}
"""Elements that are converted at a time, by device: one megabyte of float64 on a CPU, which stays in its cache."""
CHUNK_ELSEWHERE = 1 << 22
"""An accelerator wants fewer, larger kernels: 32 megabytes."""


def dot(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """The inner product, accumulated in float64 whatever the vectors are.

    A product of two float32 numbers is exact in float64, and so are those of shorter formats. With u = 2^-53, chunks of
    c elements and k = ceil(n / c) of them (c = n for float64), in whatever order a chunk is summed,

        |dot(x, y) - x'y| <= (c + k) u / (1 - (c + k) u) sum_i |x_i y_i|        (Higham, 2002, section 3.1)

    plus, for float64 vectors, the rounding of each product. Temporaries are two chunks, never two copies of the
    vectors; one synchronisation with an accelerator.

    Raises:
        ValueError: the shapes differ, or are no vectors.

    >>> dot(torch.tensor([1e4, 1.0]), torch.tensor([1e4, 1.0]))
    100000001.0
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: give two vectors of one size")
    same, x, y = y is x, x.detach(), y.detach()
    if x.dtype == y.dtype == torch.float64:
        return float(torch.dot(x, y))
    chunk = CHUNK.get(x.device.type, CHUNK_ELSEWHERE)
    if len(x) <= chunk:
        return float(torch.dot(x.double(), y.double()))
    # Two buffers for all chunks: a fresh one for each costs more in page faults than the products do.
    u = torch.empty(chunk, dtype=torch.float64, device=x.device)
    v = u if same else torch.empty_like(u)
    parts = []
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        u[: len(a)].copy_(a)
        if not same:
            v[: len(b)].copy_(b)
        parts.append(torch.dot(u[: len(a)], v[: len(b)]))
    return float(torch.stack(parts).sum())
