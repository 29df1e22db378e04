"""Dense twins of the operators and solvers: explicit Jacobians, explicit Hessians, direct solves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jacrev

from quadric.linalg.operator import LinearOperator
from quadric.loss.loss import Loss
from quadric.space import ParameterSpace


def matrix_of(operator: LinearOperator, dtype: torch.dtype = torch.float64) -> Tensor:
    """The operator's matrix, column by column."""
    return torch.stack([operator @ unit for unit in torch.eye(operator.size, dtype=dtype)], dim=1)


def output_at(model: nn.Module, theta: Tensor, inputs: Tensor) -> Tensor:
    """The model's output with its parameters read from ``theta``."""
    return functional_call(model, dict(ParameterSpace(model).views(theta)), (inputs,))


def mean_loss(model: nn.Module, loss: Loss, data: Sequence[tuple[Tensor, Any]], theta: Tensor) -> Tensor:
    """The mean loss per frame, differentiable in ``theta``."""
    total = sum(loss(output_at(model, theta, x), y) for x, y in data)
    return total / sum(loss.weight(y) for _, y in data)


def output_hessian(loss: Loss, output: Tensor, target: Any) -> Tensor:
    """The Hessian [Z, Z] of the loss in the flattened output."""
    return hessian(lambda z: loss(z.view_as(output), target), output.reshape(-1))


def gauss_newton(model: nn.Module, loss: Loss, data: Sequence[tuple[Tensor, Any]], theta: Tensor) -> Tensor:
    """1/W sum_b J_b' H_b J_b as a matrix [n, n]."""
    total = theta.new_zeros(len(theta), len(theta))
    for x, y in data:
        output = output_at(model, theta, x).detach()
        J = jacrev(lambda t, x=x: output_at(model, t, x).reshape(-1))(theta)
        total += J.T @ output_hessian(loss, output, y) @ J
    return total / sum(loss.weight(y) for _, y in data)


def solve(A: Tensor, b: Tensor) -> Tensor:
    """The solution of A x = b by a factorisation."""
    return torch.linalg.solve(A, b)


def bfgs_inverse(H: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The BFGS update of the inverse, equation 6.17 of Nocedal and Wright (2006), pair by pair."""
    for s, y in pairs:
        V = torch.eye(len(s), dtype=s.dtype) - torch.outer(y, s) / (y @ s)
        H = V.T @ H @ V + torch.outer(s, s) / (y @ s)
    return H


def krylov_basis(A: Tensor, r: Tensor, M: Tensor, k: int) -> Tensor:
    """Columns that span K_k(MA, M r), each made orthonormal to those before it in the inner product of M^-1."""
    basis: list[Tensor] = []
    v, metric = M @ r, torch.linalg.inv(M)
    for _ in range(k):
        for _ in range(2):
            for u in basis:
                v = v - (u @ metric @ v) * u
        basis.append(v / (v @ metric @ v).sqrt())
        v = M @ (A @ basis[-1])
    return torch.stack(basis, dim=1)


def least_model(A: Tensor, b: Tensor, x0: Tensor, basis: Tensor) -> Tensor:
    """The minimiser of 1/2 x'Ax - b'x over x0 + span(basis), by normal equations in the span."""
    basis, _ = torch.linalg.qr(basis)
    return x0 + basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ (b - A @ x0))


def least_residual(A: Tensor, b: Tensor, x0: Tensor, basis: Tensor, M: Tensor) -> Tensor:
    """The minimiser of r'Mr, r = b - A x, over x0 + span(basis), by least squares."""
    L = torch.linalg.cholesky(M).T
    return x0 + basis @ torch.linalg.lstsq(L @ A @ basis, L @ (b - A @ x0)).solution


def random_spd(n: int, *, condition: float = 100.0, seed: int = 0) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues spread geometrically over 1 .. ``condition``."""
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (basis * torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=torch.float64)) @ basis.T


class Failing(LinearOperator):
    """The matrix until the n-th product, then ``value`` everywhere."""

    symmetric = True

    def __init__(self, matrix: Tensor, products: int, value: float) -> None:
        self.matrix, self.size, self.left, self.value = matrix, len(matrix), products, value

    def apply(self, v: Tensor) -> Tensor:
        self.left -= 1
        return self.matrix @ v if self.left >= 0 else torch.full_like(v, self.value)
