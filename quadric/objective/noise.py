"""How uncertain a mean gradient is, told by the micro-batches it was made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quadric.comm.communicator import Communicator
from quadric.linalg.vector import dot


class GradientNoise:
    """The variance of a mean gradient, from the sums G_b over w_b frames of its micro-batches.

    With g = sum G_b / W, the micro-batches taken as B independent draws: E||g - E g||^2 is estimated by
    B / (B - 1) sum_b ||G_b - w_b g||^2 / W^2.
    """

    def __init__(self, like: Tensor) -> None:
        self.batches, self.squares, self.weights, self.total = 0, 0.0, 0.0, 0.0
        self.weighted = torch.zeros_like(like)

    def add(self, gradient: Tensor, weight: float) -> None:
        """Takes the sum of the gradients of a micro-batch of so many frames."""
        self.batches += 1
        self.squares += dot(gradient, gradient)
        self.weights += weight * weight
        self.total += weight
        self.weighted.add_(gradient, alpha=weight)

    def error(self, mean: Tensor, communicator: Communicator) -> float:
        """The standard error of the mean gradient of all ranks; NaN where it is of one micro-batch."""
        own = [self.batches, self.squares, self.weights, self.total, dot(self.weighted, mean)]
        sums = torch.tensor(own, dtype=torch.float64, device=mean.device)
        communicator.sum_(sums)
        batches, squares, weights, total, along = sums.tolist()
        if batches < 2:
            return math.nan
        spread = squares - 2 * along + weights * dot(mean, mean)
        return math.sqrt(batches / (batches - 1) * max(spread, 0.0) / total**2)
