"""Dense twins of the operators and solvers: explicit Jacobians, explicit Hessians, direct solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

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
    return hessian(lambda z: loss(z.view_as(output), target))(output.reshape(-1))


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


def random_spd(n: int, *, condition: float = 100.0, seed: int = 0) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues spread geometrically over 1 .. ``condition``."""
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (basis * torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=torch.float64)) @ basis.T
