"""Descents: from a local model of the objective to a path of candidate steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Identity, LinearOperator
from quadric.linalg.solver import Path


@dataclass(frozen=True)
class LocalModel:
    """The quadratic model f + g'd + 1/2 d'Bd of an objective around a point.

    Attributes:
        theta: the point.
        value: f.
        gradient: g.
        curvature: B, undamped.
    """

    theta: Float[Tensor, " n"]
    value: float
    gradient: Float[Tensor, " n"]
    curvature: LinearOperator


class Descent(ABC):
    """Proposes a path of candidate steps d from the local model."""

    @abstractmethod
    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | None = None,
    ) -> Path:
        """A path of steps d.

        Args:
            local: the model around the present point.
            damping: lambda, added to the curvature as lambda I.
            x0: the last proposal of the previous step, or None.
            M: the inverse of a preconditioner.
        """


@dataclass(frozen=True)
class NewtonCG(Descent):
    """Hessian-free: (B + lambda I) d = -g by truncated conjugate gradients (Martens, 2010).

    Attributes:
        solver: of the linear system.
        momentum: the share of the previous proposal that conjugate gradients start from.
    """

    solver: ConjugateGradient = field(default_factory=ConjugateGradient)
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum}: a share between 0 and 1")

    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | None = None,
    ) -> Path:
        A = local.curvature + damping * Identity(local.curvature.size)
        start = None if x0 is None or self.momentum == 0 else self.momentum * x0
        return self.solver.solve(A, -local.gradient, x0=start, M=M)
