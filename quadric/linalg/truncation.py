"""Truncation rules: when a Krylov solver has done enough for an optimiser."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from quadric.options import check_whole
from quadric.outcome import Outcome


class Truncation(ABC):
    """When to stop, judged from the model values and residual norms so far (index = iteration)."""

    @abstractmethod
    def reached(self, models: Sequence[float], residuals: Sequence[float]) -> Outcome | None:
        """The outcome to stop with, or None to go on."""


@dataclass(frozen=True)
class RelativeProgress(Truncation):
    """Martens (2010), section 4.4: stop at iteration i when, with k = max(lag, ceil(share i)),

    i > k   and   q_i < 0   and   (q_i - q_{i-k}) / q_i < k * tolerance.

    The tolerance is per iteration, hence its factor k.
    """

    tolerance: float = 5e-4
    lag: int = 10
    share: float = 0.1

    def __post_init__(self) -> None:
        check_whole(lag=self.lag)
        if self.lag < 1:
            raise ValueError(f"lag={self.lag}: progress is over one iteration at least")

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
class FixedIterations(Truncation):
    """Stop after so many iterations, whatever they achieved (NGHF, arXiv 2103.07554: 5 to 8).

    Args:
        iterations: products with A; the start is none.

    >>> FixedIterations(2).reached([0.0, -1.0], [1.0, 0.5]), FixedIterations(1).reached([0.0, -1.0], [1.0, 0.5]).name
    (None, 'STEP_LIMIT')
    """

    iterations: int = 8

    def __post_init__(self) -> None:
        check_whole(iterations=self.iterations)
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: at least one is needed, for example 8")

    def reached(self, models: Sequence[float], residuals: Sequence[float]) -> Outcome | None:
        return Outcome.STEP_LIMIT if len(models) > self.iterations else None
