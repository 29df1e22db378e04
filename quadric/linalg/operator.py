"""Linear operators: known by their action, combined by a small closed algebra.

Curvature, damping, preconditioner and inverse are the same noun.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor


class LinearOperator(ABC):
    """A square linear map on R^n, known by its action ``A @ v``.

    Attributes:
        size: n.
        symmetric: declared by whoever builds the operator; a solver refuses what it cannot solve.

    >>> A = Matrix(torch.diag(torch.tensor([1.0, 2.0]))) + 3.0 * Identity(2)
    >>> A @ torch.ones(2)
    tensor([4., 5.])
    """

    size: int
    symmetric: bool

    @abstractmethod
    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The action on a vector of the right size."""

    def __matmul__(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        if v.shape != (self.size,):
            raise ValueError(f"v has shape {tuple(v.shape)}, this {type(self).__name__} acts on ({self.size},)")
        return self.apply(v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        return Scaled(self, factor)

    __rmul__ = __mul__


class Identity(LinearOperator):
    """v -> v."""

    symmetric = True

    def __init__(self, size: int) -> None:
        self.size = size

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return v


class Diagonal(LinearOperator):
    """v -> d * v."""

    symmetric = True

    def __init__(self, diagonal: Float[Tensor, " n"]) -> None:
        self.diagonal = diagonal
        self.size = len(diagonal)

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.diagonal * v


class Matrix(LinearOperator):
    """v -> M v for a dense matrix, declared symmetric when it is."""

    def __init__(self, matrix: Float[Tensor, "n n"]) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}: a LinearOperator is square")
        self.matrix = matrix
        self.size = len(matrix)
        self.symmetric = bool(torch.allclose(matrix, matrix.T))

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.matrix @ v


class Scaled(LinearOperator):
    """v -> c (A v)."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        self.operator, self.factor = operator, factor
        self.size, self.symmetric = operator.size, operator.symmetric

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.factor * (self.operator @ v)


class Shifted(LinearOperator):
    """v -> A v + c v."""

    def __init__(self, operator: LinearOperator, shift: float) -> None:
        self.operator, self.shift = operator, shift
        self.size, self.symmetric = operator.size, operator.symmetric

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        product = self.operator @ v
        return torch.add(product, v, alpha=self.shift) if self.shift else product


class Sum(LinearOperator):
    """v -> A v + B v."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.size != right.size:
            raise ValueError(f"cannot add operators of sizes {left.size} and {right.size}")
        self.left, self.right = left, right
        self.size, self.symmetric = left.size, left.symmetric and right.symmetric

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.left @ v + self.right @ v
