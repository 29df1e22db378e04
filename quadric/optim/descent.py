"""Descents: from a local model of the objective to a path of candidate steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Identity, LinearOperator
from quadric.linalg.solver import ChangingInverse, KrylovSolver, Path
from quadric.linalg.truncation import FixedIterations
from quadric.linalg.vector import dot
from quadric.objective.curvature import Curvature

EVERY_ITERATE = 1.0001
"""A solver's ``storage_ratio`` that keeps all iterates."""


@dataclass(frozen=True)
class LocalModel:
    """The quadratic model f + g'd + 1/2 d'Bd of an objective around a point.

    Attributes:
        theta: the point.
        value: f, on the data the search looks at.
        gradient: g.
        curvature: B, undamped.
        metric: F of a descent that asks for it.
    """

    theta: Float[Tensor, " n"]
    value: float
    gradient: Float[Tensor, " n"]
    curvature: LinearOperator
    metric: LinearOperator | None = None


class Descent(ABC):
    """Proposes a path of candidate steps d from the local model.

    ``kind`` is the curvature of its quadratic model, ``metric`` the second matrix that it needs, or None.
    """

    kind: Curvature = Curvature.GAUSS_NEWTON
    metric: Curvature | None = None

    @abstractmethod
    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | ChangingInverse | None = None,
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
    """(B + lambda I) d = -g by a truncated Krylov solve (Martens, 2010).

    Hessian-free with the Gauss-Newton matrix as B, natural gradient with a Fisher matrix.

    Attributes:
        solver: of the linear system.
        momentum: the share of the previous proposal that it starts from.
        kind: B.
    """

    solver: KrylovSolver = field(default_factory=ConjugateGradient)
    momentum: float = 0.95
    kind: Curvature = Curvature.GAUSS_NEWTON

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum}: a share between 0 and 1")

    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | ChangingInverse | None = None,
    ) -> Path:
        start = None if x0 is None or self.momentum == 0 else self.momentum * x0
        return self.solver.solve(_damped(local.curvature, damping), -local.gradient, x0=start, M=M)


@dataclass(frozen=True)
class NGHF(Descent):
    """Natural gradient, then Hessian-free from it, by two short runs (Haider et al., 2021, section 6).

    Run 1 solves (F + lambda I) x = -g for the natural gradient, run 2 (B + lambda I) d = x; the path is that of run 2.
    The paper's lambda is 0; with much of it d turns towards the gradient. The papers leave the scale of x open, and a
    step G^-1 F^-1 g is not free of it: x is rescaled to ||g||, so that the steps are of the size of Hessian-free ones.
    Both runs start from zero.

    Attributes:
        natural: solver of run 1, whose last iterate is handed on.
        solver: solver of run 2.
        kind: B.
        metric: F.
    """

    natural: KrylovSolver = field(default_factory=lambda: ConjugateGradient(8, FixedIterations(8)))
    solver: KrylovSolver = field(
        default_factory=lambda: ConjugateGradient(8, FixedIterations(8), storage_ratio=EVERY_ITERATE)
    )
    kind: Curvature = Curvature.GAUSS_NEWTON
    metric: Curvature = Curvature.EMPIRICAL_FISHER

    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | ChangingInverse | None = None,
    ) -> Path:
        if local.metric is None:
            raise ValueError(f"local.metric is None: NGHF needs the {self.metric.name} operator in the local model")
        first = self.natural.solve(_damped(local.metric, damping), -local.gradient, M=M)
        natural = first.last.x
        size = math.sqrt(dot(natural, natural))
        if not 0 < size < math.inf:
            return replace(first, points=())
        natural = natural * (math.sqrt(dot(local.gradient, local.gradient)) / size)
        return self.solver.solve(_damped(local.curvature, damping), natural, M=M)


def _damped(B: LinearOperator, damping: float) -> LinearOperator:
    return B + damping * Identity(B.size) if damping else B
