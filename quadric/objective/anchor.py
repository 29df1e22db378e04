"""An anchor: a term of the objective that holds the parameters near a point."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.vector import dot
from quadric.space import ParameterSpace, bits


@dataclass(frozen=True, eq=False)
class Anchor:
    """weight / 2 ||theta - at||^2, beside the mean loss per frame, of which it has the unit.

    With ``at`` where a training starts, it keeps a network near what it has learnt before (L2-SP of Li, Grandvalet and
    Davoine, 2018); at zero it is weight decay as a term of the objective.

    It is the negative logarithm of a Gaussian prior of precision weight I, and adds weight I to every curvature. For
    the Gauss-Newton matrix and the Hessian those are its second derivatives. To the Fisher matrices it is added as the
    precision of the prior: its gradient lies outside their range, so that a solve with the model's part alone would
    have no solution.

    Args:
        at: the point.
        weight: at least 0.

    >>> import torch
    >>> anchor = Anchor(torch.zeros(2), weight=0.5)
    >>> anchor.value(torch.tensor([3.0, 4.0])), anchor.gradient(torch.tensor([3.0, 4.0]))
    (6.25, tensor([1.5000, 2.0000]))

    Raises:
        ValueError: ``at`` is no vector or not finite, or the weight is negative or not finite.
    """

    at: Float[Tensor, " n"]
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight}: must be finite and not negative; for none, leave the anchor out")
        if self.at.ndim != 1 or not bool(self.at.isfinite().all()):
            shape = tuple(self.at.shape)
            raise ValueError(f"at has shape {shape}: give a finite vector, such as ParameterSpace(model).point()")

    def value(self, theta: Float[Tensor, " n"]) -> float:
        away = theta - self.at
        return 0.5 * self.weight * dot(away, away)

    def gradient(self, theta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return (theta - self.at).mul_(self.weight)

    def check(self, space: ParameterSpace) -> None:
        """Raises ``ValueError`` where it is no point of ``space``."""
        own, wanted = (len(self.at), self.at.dtype, self.at.device), (space.size, space.dtype, space.device)
        if own != wanted:
            raise ValueError(
                f"anchor: at is ({', '.join(map(str, own))}) in size, type and device, the model's parameters are "
                f"({', '.join(map(str, wanted))}): give ParameterSpace(model).point(), taken of this model"
            )

    def fingerprint(self) -> str:
        """The weight and a sum of the bits of the point, as in `ParameterSpace.fingerprint`."""
        return f"weight {self.weight}, bits {bits([self.at]):016x}"
