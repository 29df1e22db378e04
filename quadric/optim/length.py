"""How long a preconditioned step is: rules by which one learning rate serves many tasks.

An inverse of curvature makes a step of natural length only where the curvature is that of the loss. A Fisher matrix of
batch gradients is not: it shrinks with the batch, and steps by its inverse grow as the gradient falls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


class Length(ABC):
    """The rule: a factor for the step of each layer."""

    @abstractmethod
    def factors(self, steps: Sequence[Tensors], gradients: Sequence[Tensors], lr: float) -> list[float]:
        """One factor for each layer; where a step is not finite, any number or NaN.

        Args:
            steps: of each layer, what would be subtracted from its parameters at a learning rate of one.
            gradients: of each layer, with momentum, that the inverse was applied to.
            lr: the largest learning rate.
        """


@dataclass(frozen=True)
class Natural(Length):
    """As the inverse makes them. Learning rates are then a matter of the task: from 1e-6 to 1."""

    def factors(self, steps: Sequence[Tensors], gradients: Sequence[Tensors], lr: float) -> list[float]:
        return [1.0] * len(steps)


@dataclass(frozen=True)
class KLClip(Length):
    """Shorter where lr^2 d'm, twice the divergence that the curvature foresees, is over ``most`` (Ba et al., 2017)."""

    most: float = 1e-3

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise ValueError(f"most={self.most}: must be positive")

    def factors(self, steps: Sequence[Tensors], gradients: Sequence[Tensors], lr: float) -> list[float]:
        slopes = [
            torch.sum(d * m) for ds, ms in zip(steps, gradients, strict=True) for d, m in zip(ds, ms, strict=True)
        ]
        foreseen = lr * lr * float(torch.stack(slopes).sum())
        return [min(1.0, math.sqrt(self.most / foreseen)) if foreseen > 0 else 1.0] * len(steps)


@dataclass(frozen=True)
class UnitEntries(Length):
    """Such that the entries of each layer's step have a root mean square of one: a rate means what it does in Adam."""

    def factors(self, steps: Sequence[Tensors], gradients: Sequence[Tensors], lr: float) -> list[float]:
        norms = torch.stack([torch.stack(torch._foreach_norm(list(ds))).double().norm() for ds in steps]).tolist()
        if not all(map(math.isfinite, norms)):  # in float32 from entries of 1.8e19 on
            norms = [math.hypot(*(float(d.double().norm()) for d in ds)) for ds in steps]
        sizes = [sum(d.numel() for d in ds) for ds in steps]
        known = zip(sizes, norms, strict=True)
        return [1.0 if s == 0 else math.sqrt(n) / s if s < math.inf else math.nan for n, s in known]
