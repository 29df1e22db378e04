"""Damping: how far the quadratic model is trusted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Damping(ABC):
    """The rule by which lambda follows the model's success.

    ``initial`` is the lambda of the first step.
    """

    initial: float

    @abstractmethod
    def update(self, value: float, ratio: float, *, whole: bool = True) -> float:
        """The next lambda.

        Args:
            value: the present lambda.
            ratio: actual over predicted reduction, (f(theta + d) - f(theta)) / q(d); positive when both fell. NaN or
                minus infinity for a rejected step.
            whole: whether the step was taken in its full length.
        """


@dataclass(frozen=True)
class LevenbergMarquardt(Damping):
    """Martens (2010), section 4.1: lambda grows by ``boost`` where ratio < ``low``, shrinks by ``drop`` above ``high``.

    The listing of Kingsbury et al. (2012) has the two factors the other way round, with a ratio of the opposite sign.
    """

    initial: float = 1.0
    boost: float = 3 / 2
    drop: float = 2 / 3
    low: float = 1 / 4
    high: float = 3 / 4
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        if not self.initial > 0:
            raise ValueError(f"initial={self.initial}: damping must be positive; for none, use Fixed(0.0)")
        if not self.boost > 1 > self.drop > 0:
            raise ValueError(f"boost={self.boost}, drop={self.drop}: need boost > 1 > drop > 0")
        if not self.low < self.high or not self.minimum < self.maximum:
            raise ValueError(
                f"low={self.low}, high={self.high}, minimum={self.minimum}, maximum={self.maximum}: need low < high "
                "and minimum < maximum"
            )

    def update(self, value: float, ratio: float, *, whole: bool = True) -> float:
        if not ratio >= self.low or math.isnan(ratio):
            return min(value * self.boost, self.maximum)
        return max(value * self.drop, self.minimum) if ratio > self.high else value


@dataclass(frozen=True)
class Fixed(Damping):
    """Always the same lambda."""

    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial < math.inf:
            raise ValueError(f"initial={self.initial}: give 0 for no damping, or a positive lambda")

    def update(self, value: float, ratio: float, *, whole: bool = True) -> float:
        return value


@dataclass(frozen=True)
class AfterRejection(Damping):
    """``initial`` until a step fails; then from ``start`` up by ``boost`` while steps do, and down by ``drop`` again.

    A step fails that is rejected, or taken only in part. For methods that are undamped in their papers: on new data a
    rejected step may be left at that, on the same data it would be proposed for ever.

    Where the value that steps are judged by is mostly noise, half of them are shortened however short they are, and
    more damping is no remedy: after these it stops at ``most``, a share of the curvature where the method so takes it.
    """

    start: float = 1e-2
    boost: float = 4.0
    drop: float = 1 / 2
    initial: float = 0.0
    most: float = 0.32

    def __post_init__(self) -> None:
        if not 0 <= self.initial < math.inf:
            raise ValueError(f"initial={self.initial}: give 0 for no damping, or a positive lambda")
        if not self.start > 0 or not self.boost > 1 > self.drop > 0:
            raise ValueError(
                f"start={self.start}, boost={self.boost}, drop={self.drop}: need start > 0 and boost > 1 > drop > 0"
            )
        if not self.most >= self.start:
            raise ValueError(f"most={self.most}: must be at least start={self.start}")

    def update(self, value: float, ratio: float, *, whole: bool = True) -> float:
        if math.isnan(ratio) or ratio == -math.inf:
            return max(value * self.boost, self.start)
        if not whole:
            return max(value, min(value * self.boost, self.most), self.start)
        return value * self.drop if value * self.drop >= max(self.start, self.initial) else self.initial
