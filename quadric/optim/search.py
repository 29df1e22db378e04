"""Searches: which point of a proposed path to step to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.solver import Iterate, Path
from quadric.linalg.vector import dot
from quadric.objective.objective import Data
from quadric.optim.descent import LocalModel
from quadric.options import check_whole

Value = Callable[[Float[Tensor, " n"]], float]
"""The objective's value at a parameter vector."""

Candidates = Literal["all", "backwards"]
"""Which points of a path are evaluated: each of them, or from the last backwards until the value rises."""


@dataclass(frozen=True)
class Step:
    """A chosen step.

    Attributes:
        direction: d, already scaled.
        value: f(theta + d).
        whole: f(theta + the path's point), before scaling; infinite where it is not finite.
        point: index of the path's point the step comes from.
        scale: what the line search multiplied the point by.
    """

    direction: Float[Tensor, " n"]
    value: float
    whole: float
    point: int
    scale: float


class Search(ABC):
    """Picks a step from a path, or none; ``on`` says on which of the objective's data it judges."""

    on: Data = Data.GRADIENT

    @abstractmethod
    def select(self, local: LocalModel, path: Path, value: Value) -> Step | None:
        """The step, or None when nothing on the path lowers the objective."""


@dataclass(frozen=True)
class Backtracking(Search):
    """From the path's last point backwards while the objective improves; then Armijo's rule on that point.

    Martens (2010), sections 4.6 and 4.7. His line search shortens by 0.8 up to 60 times; by halves it comes as far with
    a quarter of the evaluations, each of which costs a third of a gradient.

    Attributes:
        sufficient: Armijo's constant: f(theta + a d) <= f(theta) + sufficient * a * g'd.
        shrink: the factor of a.
        attempts: scales tried at most, the full step first, before the step is rejected.
        on: the data that candidates are judged on.
    """

    sufficient: float = 1e-2
    shrink: float = 0.5
    attempts: int = 16
    on: Data = Data.GRADIENT

    def __post_init__(self) -> None:
        _check(self.shrink, self.attempts, least=1)

    def select(self, local: LocalModel, path: Path, value: Value) -> Step | None:
        def at(step: Tensor) -> float:
            return _finite(value(local.theta + step))

        candidates = _candidates(path)
        if not candidates:
            return None
        index, point = candidates.pop()
        best = at(point.x)
        for earlier, candidate in reversed(candidates):
            found = at(candidate.x)
            if found >= best < math.inf:
                break
            index, point, best = earlier, candidate, found

        slope, scale, whole = dot(local.gradient, point.x), 1.0, best
        for attempt in range(self.attempts):
            if attempt:
                scale *= self.shrink
                best = at(scale * point.x)
            # The second: where the slope is not negative, the first allows a rise.
            if best <= local.value + self.sufficient * scale * slope and best < local.value:
                return Step(scale * point.x, best, whole, index, scale)
        return None


@dataclass(frozen=True)
class BestIterate(Search):
    """The point of the path with the lowest value, if it is lower than where we are (Haider et al., 2021, section 4.1).

    The paper takes no step otherwise. Here that point is then shortened until it is: far from a minimum the undamped
    model of a good direction is often wrong about its length.

    The paper evaluates every point, which is 73 % of the time of its solves, and says that it can be done less often.
    ``candidates="backwards"`` goes from the last point backwards and stops where the value rises, as Martens (2010,
    section 4.6) does: two evaluations where the last point is best. Where the values fall along the path and then rise,
    it chooses the same point as ``"all"``; of equal values both choose the earliest.

    Attributes:
        shrink: the factor by which it is shortened.
        attempts: how often at most, before the step is rejected; 0 is the paper's.
        on: the data that candidates are judged on; the paper's is the curvature's.
        candidates: the points that are evaluated; the paper's are all.
    """

    shrink: float = 0.5
    attempts: int = 8
    on: Data = Data.CURVATURE
    candidates: Candidates = "all"

    def __post_init__(self) -> None:
        _check(self.shrink, self.attempts, least=0)
        if self.candidates not in get_args(Candidates):
            raise ValueError(f"candidates={self.candidates!r}: give 'all' or 'backwards'")

    def select(self, local: LocalModel, path: Path, value: Value) -> Step | None:
        candidates = _candidates(path)
        if not candidates:
            return None
        whole, (index, point) = math.inf, candidates[-1]
        for earlier, candidate in reversed(candidates):
            found = _finite(value(local.theta + candidate.x))
            if found <= whole:
                whole, index, point = found, earlier, candidate
            elif self.candidates == "backwards":
                break
        best, scale = whole, 1.0
        for _ in range(self.attempts):
            if best < local.value:
                break
            scale *= self.shrink
            best = _finite(value(local.theta + scale * point.x))
        return Step(scale * point.x, best, whole, index, scale) if best < local.value else None


def _candidates(path: Path) -> list[tuple[int, Iterate]]:
    """The points of the path with their places, without a start at zero."""
    return [(i, p) for i, p in enumerate(path.points) if p.step > 0 or bool(p.x.any())]


def _check(shrink: float, attempts: int, least: int) -> None:
    if not 0 < shrink < 1:
        raise ValueError(f"shrink={shrink}: a factor between 0 and 1")
    check_whole(attempts=attempts)
    if attempts < least:
        raise ValueError(f"attempts={attempts}: give {least} at least")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
