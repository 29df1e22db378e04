"""Samplers: how much data the gradient and the curvature of the next step see."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from quadric.options import check_whole


class Sizes(NamedTuple):
    """Frames of the gradient's and of the curvature's sample; the latter is 0 where there is no curvature."""

    gradient: int
    curvature: int


class Seen(NamedTuple):
    """What a sampler may look at before a step.

    Attributes:
        updates: steps done.
        total: frames of the training set.
        last: the sizes of the last step; None before the first.
        noise: the standard error of the last gradient over its norm, sqrt(E||g_S - g||^2) / ||g_S||, as the gradient's
            own micro-batches tell it; NaN where it is not known, as from one micro-batch.
    """

    updates: int
    total: int
    last: Sizes | None = None
    noise: float = math.nan


class Sampler(ABC):
    """The rule by which samples grow; none grows beyond the training set.

    ``parts`` is how many micro-batches it wants the gradient's sample in, at least.
    """

    parts: int = 1

    @abstractmethod
    def sizes(self, seen: Seen) -> Sizes:
        """How much data the next step sees."""


@dataclass(frozen=True)
class FixedSizes(Sampler):
    """The same in every step. First-order optimisers have no curvature's sample.

    >>> FixedSizes(1000, 50).sizes(Seen(updates=7, total=800))
    Sizes(gradient=800, curvature=50)
    """

    gradient: int
    curvature: int = 0

    def __post_init__(self) -> None:
        _positive(gradient=self.gradient)
        check_whole(curvature=self.curvature)
        if self.curvature < 0:
            raise ValueError(f"curvature={self.curvature}: frames of the curvature's sample, or 0 for none")

    def sizes(self, seen: Seen) -> Sizes:
        return _at_most(self.gradient, self.curvature, seen.total)


@dataclass(frozen=True)
class GeometricSizes(Sampler):
    """b_k = b_0 a^k for the gradient and for the Krylov iterations separately (Sainath et al., 2013).

    The paper says that both grow geometrically; 1.2 and 1.3 are recalled of it, not read.

    Attributes:
        gradient, curvature: frames in the first step.
        gradient_growth, curvature_growth: the factors.
        most: frames of the curvature's sample at most, or None.

    >>> [GeometricSizes(100, 10).sizes(Seen(k, total=150)) for k in (0, 1, 3)]
    [Sizes(gradient=100, curvature=10), Sizes(gradient=120, curvature=13), Sizes(gradient=150, curvature=22)]
    """

    gradient: int
    curvature: int
    gradient_growth: float = 1.2
    curvature_growth: float = 1.3
    most: int | None = None

    def __post_init__(self) -> None:
        _positive(gradient=self.gradient, curvature=self.curvature)
        for name in ("gradient_growth", "curvature_growth"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a factor of at least 1; 1 keeps the size")
        if self.most is not None:
            _positive(most=self.most)

    def sizes(self, seen: Seen) -> Sizes:
        def grown(first: int, growth: float) -> int:
            exponent = seen.updates * math.log(growth)
            return seen.total if exponent > 50 else round(first * math.exp(exponent))

        curvature = grown(self.curvature, self.curvature_growth)
        if self.most is not None:
            curvature = min(curvature, self.most)
        return _at_most(grown(self.gradient, self.gradient_growth), curvature, seen.total)


@dataclass(frozen=True)
class VarianceTested(Sampler):
    """The gradient's sample grows when its own variance says that it is too small (Byrd et al., 2012, equation 3.12).

    The test is ||Var||_1 / |S| <= theta^2 ||g_S||^2 (equation 3.9); where it fails, |S| becomes what would pass it. The
    variance is that between the gradient's micro-batches, which the gradient pass sees anyway. A sample of a single
    micro-batch, which tells nothing of it, grows; ``parts`` sees to it that there are more.

    Attributes:
        gradient: frames in the first step.
        share: the curvature's sample as a share of the gradient's.
        theta: of the test, between 0 and 1.
        growth: the most that one step may multiply the sample by.
        parts: micro-batches at least.

    >>> sampler, last = VarianceTested(100, share=0.1, theta=0.5), Sizes(100, 10)
    >>> [sampler.sizes(Seen(3, 10_000, last, noise)) for noise in (0.4, 0.75)]
    [Sizes(gradient=100, curvature=10), Sizes(gradient=225, curvature=23)]
    """

    gradient: int
    share: float = 0.1
    theta: float = 0.5
    growth: float = 4.0
    parts: int = 16

    def __post_init__(self) -> None:
        _positive(gradient=self.gradient)
        for name in ("share", "theta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be over 0 and at most 1")
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth={self.growth}: must be over 1, or the sample never grows, and finite")
        check_whole(parts=self.parts)
        if self.parts < 2:
            raise ValueError(f"parts={self.parts}: one micro-batch tells nothing of the variance; give 2 at least")

    def sizes(self, seen: Seen) -> Sizes:
        if seen.last is None:
            size = self.gradient
        else:
            wanted = self.growth if math.isnan(seen.noise) else (seen.noise / self.theta) ** 2
            size = math.ceil(seen.last.gradient * min(max(wanted, 1.0), self.growth))
        size = min(size, seen.total)
        return _at_most(size, math.ceil(self.share * size), seen.total)


def _positive(**values: int) -> None:
    check_whole(**values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: a sample holds at least one frame")


def _at_most(gradient: int, curvature: int, total: int) -> Sizes:
    return Sizes(min(gradient, total), min(curvature, total))
