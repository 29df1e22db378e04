"""Compressors and combiners entry by entry, in Python's floats: what the fast ones must do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Vector = list[float]


def dot(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def adacomp(residue: Vector, gradient: Vector, sizes: Sequence[int], bins: Sequence[int]) -> tuple[Vector, Vector]:
    """What is sent, and the new residue."""
    sent, first = [0.0] * len(residue), 0
    for size, length in zip(sizes, bins, strict=True):
        layer = range(first, first + size)
        highest = {}
        for i in layer:
            bin = (i - first) // length
            highest[bin] = max(highest.get(bin, 0.0), abs(residue[i] + gradient[i]))
        scale = sum(highest.values()) / len(highest)
        for i in layer:
            G = residue[i] + gradient[i]
            if G != 0 and abs(G + gradient[i]) >= highest[(i - first) // length]:
                sent[i] = math.copysign(scale, G)
        first += size
    return sent, [r + g - s for r, g, s in zip(residue, gradient, sent, strict=True)]


def cltk(residue: Vector, gradient: Vector, chosen: Sequence[int], memory: float) -> tuple[Vector, Vector]:
    """What is sent of the chosen entries, and the new memory."""
    total = [r + g for r, g in zip(residue, gradient, strict=True)]
    sent = [t if i in set(chosen) else 0.0 for i, t in enumerate(total)]
    return sent, [(1 - memory) * r + memory * (t - s) for r, t, s in zip(residue, total, sent, strict=True)]


def largest(x: Vector, k: int) -> list[int]:
    return sorted(sorted(range(len(x)), key=lambda i: -abs(x[i]))[:k])


def low_rank(M: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The projection of M on the span of M Q, by the normal equations, and the next Q up to a rotation."""
    X = M @ Q
    basis = X @ torch.linalg.inv(torch.linalg.cholesky(X.T @ X)).T
    return X @ torch.linalg.solve(X.T @ X, X.T @ M), M.T @ basis


def adasum(gradients: Sequence[Vector]) -> Vector:
    if len(gradients) == 1:
        return list(gradients[0])
    half = (len(gradients) + 1) // 2
    left, right = adasum(gradients[:half]), adasum(gradients[half:])
    product = dot(left, right)
    a = 1 - product / (2 * dot(left, left)) if any(left) else 1.0
    b = 1 - product / (2 * dot(right, right)) if any(right) else 1.0
    return [a * x + b * y for x, y in zip(left, right, strict=True)]


def graph_any2vec(gradients: Sequence[Vector]) -> Vector:
    combined = list(gradients[0])
    for gradient in gradients[1:]:
        share = dot(combined, gradient) / dot(combined, combined) if any(combined) else 0.0
        combined = [c + g - share * c for c, g in zip(combined, gradient, strict=True)]
    return combined
