"""Conjugate gradients, as an optimiser needs them: truncated, warm-started, with the path remembered.

The solver minimises the quadratic model q(x) = 1/2 x'Ax - b'x. Its iterates are candidates for a step, so a path
of them is kept, and whatever goes wrong is an `Outcome` beside the best iterate found until then.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import Identity, LinearOperator
from quadric.outcome import Outcome


def dot(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """The inner product, accumulated in float64 whatever the vectors are."""
    return float(torch.dot(x.double(), y.double()))


@dataclass(frozen=True)
class Iterate:
    """One point of a Krylov path.

    Attributes:
        step: how many products with A led here (0 is the start).
        x: the point.
        model: q(x).
        residual: ||b - A x||.
    """

    step: int
    x: Float[Tensor, " n"]
    model: float
    residual: float


@dataclass(frozen=True)
class Path:
    """What a solve leaves behind: stored iterates, the last of them the final one, and how it ended."""

    points: tuple[Iterate, ...]
    outcome: Outcome

    @property
    def last(self) -> Iterate:
        return self.points[-1]

    @property
    def steps(self) -> int:
        """Products with A that led to the last point."""
        return self.last.step


class Truncation(ABC):
    """When to stop, judged from the model values and residual norms so far (index = iteration)."""

    @abstractmethod
    def reached(self, models: Sequence[float], residuals: Sequence[float]) -> Outcome | None:
        """The outcome to stop with, or None to go on."""


@dataclass(frozen=True)
class RelativeProgress(Truncation):
    """Martens (2010), section 4.4: stop at iteration i when, with k = max(lag, ceil(share i)),

    i > k   and   q_i < 0   and   (q_i - q_{i-k}) / q_i < k * tolerance.
    """

    tolerance: float = 5e-4
    lag: int = 10
    share: float = 0.1

    def reached(self, models: Sequence[float], residuals: Sequence[float]) -> Outcome | None:
        i = len(models) - 1
        k = max(self.lag, math.ceil(self.share * i))
        if i > k and models[i] < 0 and (models[i] - models[i - k]) / models[i] < k * self.tolerance:
            return Outcome.TRUNCATED
        return None


@dataclass(frozen=True)
class Residual(Truncation):
    """Stop when ||b - A x|| <= tolerance * ||b - A x_0||."""

    tolerance: float = 1e-6

    def reached(self, models: Sequence[float], residuals: Sequence[float]) -> Outcome | None:
        return Outcome.CONVERGED if residuals[-1] <= self.tolerance * residuals[0] else None


@dataclass(frozen=True)
class ConjugateGradient:
    """Preconditioned conjugate gradients for a symmetric positive definite operator.

    Hestenes and Stiefel (1952); truncated and stored as in Martens (2010), section 4.

    Attributes:
        max_steps: products with A at most.
        stop: the truncation rule.
        storage_ratio: iterates are stored at steps ceil(ratio^j), and the final one always.

    >>> A = 2.0 * Identity(3)
    >>> ConjugateGradient().solve(A, torch.ones(3)).last.x
    tensor([0.5000, 0.5000, 0.5000])
    """

    max_steps: int = 250
    stop: Truncation = RelativeProgress()
    storage_ratio: float = 1.3

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: at least one step is needed")
        if self.storage_ratio <= 1:
            raise ValueError(f"storage_ratio={self.storage_ratio}: must be over 1, for example 1.3")

    def iterates(
        self,
        A: LinearOperator,
        b: Float[Tensor, " n"],
        *,
        x0: Float[Tensor, " n"] | None = None,
        M: LinearOperator | None = None,
    ) -> Iterator[Iterate | Outcome]:
        """Every iterate from the start on; ends with the `Outcome`.

        Args:
            A: symmetric positive definite.
            b: right-hand side.
            x0: start (default: zero).
            M: the action of the preconditioner's INVERSE, symmetric positive definite.

        Raises:
            ValueError: A or M is not declared symmetric, or shapes do not agree.
        """
        M = M or Identity(A.size)
        _check(A, b, M)
        if not bool(b.any()):
            yield Iterate(0, torch.zeros_like(b), 0.0, 0.0)
            yield Outcome.ZERO_RIGHT_HAND_SIDE
            return
        warm = x0 is not None and bool(x0.any())
        x = x0.clone() if warm and x0 is not None else torch.zeros_like(b)
        r = b - A @ x if warm else b.clone()
        z = M @ r
        p, rz = z, dot(r, z)
        models, residuals = [-0.5 * dot(x, b + r)], [math.sqrt(dot(r, r))]
        yield Iterate(0, x, models[0], residuals[0])
        for step in range(1, self.max_steps + 1):
            if residuals[-1] == 0:
                yield Outcome.CONVERGED
                return
            Ap = A @ p
            pAp = dot(p, Ap)
            if not math.isfinite(pAp) or not math.isfinite(rz):
                yield Outcome.NON_FINITE
                return
            if pAp <= 0 or rz <= 0:  # the second: of the preconditioner
                yield Outcome.NEGATIVE_CURVATURE
                return
            alpha = rz / pAp
            x = x + alpha * p
            r = r - alpha * Ap
            z = M @ r
            rz, previous = dot(r, z), rz
            p = z + (rz / previous) * p
            models.append(-0.5 * dot(x, b + r))
            residuals.append(math.sqrt(dot(r, r)))
            if not math.isfinite(models[-1]):
                yield Outcome.NON_FINITE
                return
            yield Iterate(step, x, models[-1], residuals[-1])
            if outcome := self.stop.reached(models, residuals):
                yield outcome
                return
        yield Outcome.STEP_LIMIT

    def solve(
        self,
        A: LinearOperator,
        b: Float[Tensor, " n"],
        *,
        x0: Float[Tensor, " n"] | None = None,
        M: LinearOperator | None = None,
    ) -> Path:
        """Runs `iterates` to its end and stores the iterates at geometrically spaced steps and the final one."""
        stored: list[Iterate] = []
        store_at, current = 1.0, None
        for item in self.iterates(A, b, x0=x0, M=M):
            if isinstance(item, Outcome):
                if current is not None and (not stored or stored[-1] is not current):
                    stored.append(current)
                return Path(tuple(stored), item)
            current = item
            if item.step >= math.ceil(store_at):
                stored.append(item)
                while math.ceil(store_at) <= item.step:
                    store_at *= self.storage_ratio
        raise AssertionError("iterates() ended without an outcome")


def _check(A: LinearOperator, b: Tensor, M: LinearOperator) -> None:
    for name, operator in (("A", A), ("M", M)):
        if not operator.symmetric:
            raise ValueError(
                f"{name} is not symmetric: conjugate gradients would not solve it; symmetrise {name} first"
            )
    if b.shape != (A.size,) or M.size != A.size:
        raise ValueError(
            f"b has shape {tuple(b.shape)} and M size {M.size}, A acts on ({A.size},): give all three one size"
        )
