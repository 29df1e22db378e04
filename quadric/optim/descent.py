"""Descents: from a local model of the objective to a path of candidate steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import LinearOperator, Shifted
from quadric.linalg.solver import ChangingInverse, Iterate, KrylovSolver, Path
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

    @cached_property
    def curvature_scale(self) -> float:
        """The curvature along the gradient, as `scale_along` says, for one product."""
        return scale_along(self.curvature, self.gradient)

    @cached_property
    def metric_scale(self) -> float:
        """The same of the metric."""
        return scale_along(self.known_metric, self.gradient)

    @property
    def known_metric(self) -> LinearOperator:
        if self.metric is None:
            raise ValueError("metric is None: natural gradient and NGHF need a Fisher matrix in the local model")
        return self.metric


def scale_along(A: LinearOperator, g: Float[Tensor, " n"]) -> float:
    """g'Ag / g'g, or ||Ag|| / ||g|| where that is not positive: a length for damping to be a share of."""
    Ag, square = A @ g, dot(g, g)
    along = dot(g, Ag) / square
    return along if along > 0 else math.sqrt(dot(Ag, Ag) / square)


class Descent(ABC):
    """Proposes a path of candidate steps d from the local model.

    ``kind`` is the curvature of its quadratic model, ``metric`` the second matrix that it needs, or None.
    """

    kind: Curvature = Curvature.GAUSS_NEWTON
    metric: Curvature | None = None

    def shift(self, local: LocalModel, damping: float) -> float:
        """What is added to the diagonal of the first matrix it solves with, for whoever preconditions it."""
        return damping

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
            damping: lambda, added to the curvature as lambda I, or as a share of the curvature (see the descent).
            x0: the last proposal of the previous step, or None.
            M: the inverse of a preconditioner.
        """


@dataclass(frozen=True)
class NewtonCG(Descent):
    """(B + lambda I) d = -g by a truncated Krylov solve: Hessian-free with the Gauss-Newton matrix (Martens, 2010).

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
        return self.solver.solve(Shifted(local.curvature, damping), -local.gradient, x0=start, M=M)


def _short_run() -> KrylovSolver:
    """Eight iterations, of which the search sees all."""
    return ConjugateGradient(8, FixedIterations(8), storage_ratio=EVERY_ITERATE)


class _ByMetric(Descent):
    """Solves with the metric first; lambda is a share of that along the gradient."""

    def shift(self, local: LocalModel, damping: float) -> float:
        return damping * local.metric_scale if damping else 0.0


@dataclass(frozen=True)
class NaturalGradient(_ByMetric):
    """F x = -g by a truncated Krylov solve, mu x by the quadratic model (Haider and Woodland, 2017).

    The empirical Fisher matrix is of another scale than the objective's curvature (it grows with the square of the
    loss), and the papers leave mu, the inverse of their Lagrange multiplier, open. Here one mu for the path minimises
    the quadratic model along its last point, -g'x / x'Bx, for one product with B.

    The paper's lambda is 0. Otherwise it is a share of the curvature along the gradient (`scale_along`), for one
    product more: no number would do for every F.

    Attributes:
        solver: of the linear system; it starts from zero.
        metric: F.
        kind: B.
    """

    solver: KrylovSolver = field(default_factory=_short_run)
    metric: Curvature = Curvature.EMPIRICAL_FISHER
    kind: Curvature = Curvature.GAUSS_NEWTON

    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | ChangingInverse | None = None,
    ) -> Path:
        F = Shifted(local.known_metric, self.shift(local, damping))
        path = self.solver.solve(F, -local.gradient, M=M)
        x = path.last.x
        curved = abs(dot(x, local.curvature @ x))
        mu = -dot(local.gradient, x) / curved if curved > 0 else 1.0
        return replace(path, points=tuple(replace(p, x=mu * p.x, model=mu * p.model) for p in path.points))


@dataclass(frozen=True)
class NGHF(_ByMetric):
    """Natural gradient, then Hessian-free from it, by two short runs (Haider et al., 2021, section 6).

    Run 1 solves F x = -g for the natural gradient x, run 2 B d = x; both start from zero. The path is that of run 2.

    The papers leave the scale of x open, and a step B^-1 F^-1 g is not free of it. Here x has the length of g, and
    every point d of the path is then multiplied by what minimises the quadratic model along it, -g'd / d'Bd. Conjugate
    gradients know d'Bd: no product is needed.

    The paper's lambda is 0. Otherwise it is a share of either matrix along the gradient, as in `NaturalGradient`; with
    much of it d turns towards the gradient.

    The pairs of the path are those of run 1, for its next preconditioner. By pairs of its own, run 2 would come to its
    solution in a few iterates, none of them short: without damping that solution is often too far, and the search
    lives on the iterates before it.

    Attributes:
        natural: solver of run 1, whose last iterate is handed on.
        solver: solver of run 2.
        kind: B.
        metric: F.
        preconditions: whether M is for run 2 as well.
    """

    natural: KrylovSolver = field(default_factory=lambda: ConjugateGradient(8, FixedIterations(8)))
    solver: KrylovSolver = field(default_factory=_short_run)
    kind: Curvature = Curvature.GAUSS_NEWTON
    metric: Curvature = Curvature.EMPIRICAL_FISHER
    preconditions: bool = True

    def propose(
        self,
        local: LocalModel,
        *,
        damping: float,
        x0: Float[Tensor, " n"] | None,
        M: LinearOperator | ChangingInverse | None = None,
    ) -> Path:
        g = local.gradient
        first = self.natural.solve(Shifted(local.known_metric, self.shift(local, damping)), -g, M=M)
        natural = first.last.x
        size = math.sqrt(dot(natural, natural))
        if not 0 < size < math.inf:
            return replace(first, points=())
        natural = natural * (math.sqrt(dot(g, g)) / size)
        B = Shifted(local.curvature, damping * local.curvature_scale if damping else 0.0)
        path = self.solver.solve(B, natural, M=M if self.preconditions else None)
        points = tuple(_of_best_length(point, natural, g) for point in path.points)
        return replace(path, points=points, pairs=first.pairs)


def _of_best_length(point: Iterate, b: Float[Tensor, " n"], g: Float[Tensor, " n"]) -> Iterate:
    """The minimiser of g'd + 1/2 d'Ad along a point of a path to A x = b; ``model`` is then that of this minimum.

    A point along which the model does not fall stays as it is.
    """
    slope, curved = dot(g, point.x), 2 * (point.model + dot(b, point.x))
    if not (slope < 0 < curved):
        return point
    return replace(point, x=point.x * (-slope / curved), model=-(slope**2) / (2 * curved))
