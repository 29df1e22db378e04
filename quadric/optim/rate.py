"""The first rate of stochastic gradient descent, found by short trials (Bottou, SGD 2.0: ``svmasgd``)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from quadric.comm.communicator import Communicator, Solo
from quadric.loss.loss import Loss
from quadric.objective.objective import MicroBatch, Objective

_MOST = 40
"""Factors of 2 from the first rate: a trillion."""


def search_rate(cost: Callable[[float], float], first: float = 1.0) -> float:
    """The rate at which a short training ends with a low cost, among ``first`` and its multiples by powers of 2.

    From ``first`` and twice that it moves by factors of 2 in the direction in which the cost falls, until it rises. The
    lower of the last two is the rate: of a cost with one minimum that is either where the minimum is or half of it, and
    the lower is the safer for a training that is longer. What is not finite counts as infinitely high.

    Raises:
        ValueError: ``first`` is no positive number, or no rate has a finite cost.

    >>> search_rate(lambda rate: (rate - 0.3) ** 2)
    0.125
    >>> search_rate(lambda rate: (rate - 30.0) ** 2)
    32.0
    """
    if not 0 < first < math.inf:
        raise ValueError(f"first={first}: must be positive")

    def at(rate: float) -> float:
        found = float(cost(rate))
        return found if math.isfinite(found) else math.inf

    low, high = first, 2 * first
    below, above = at(low), at(high)
    upwards = above < below
    for _ in range(_MOST):
        if upwards and above < below:
            low, below, high = high, above, 2 * high
            above = at(high)
        elif not upwards and (below < above or below == math.inf):
            high, above, low = low, below, low / 2
            below = at(low)
        else:
            return low
    if below == math.inf:
        raise ValueError(f"cost is not finite at any rate from {first} down to {low}: look at the data and the model")
    return low


def sgd_cost(
    model: nn.Module,
    loss: Loss,
    minibatches: Sequence[Sequence[MicroBatch]],
    *,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    communicator: Communicator = Solo(),
) -> Callable[[float], float]:
    """The cost of a rate for `search_rate`: of what SGD at that rate makes of the model in one pass over a subset.

    It is the mean loss over all of ``minibatches`` of a copy of the model, after a step on each; infinite when a loss
    was not finite. The model stays as it is, and so do torch's random numbers.

    Args:
        model: where training will start.
        loss: of its output.
        minibatches: of each step, the micro-batches of this rank.
        autocast, communicator: as in `Objective`.
        seed: of the random layers.

    >>> from quadric.loss.loss import SquaredError
    >>> model = nn.Linear(1, 1, bias=False)
    >>> x = torch.ones(8, 1)
    >>> search_rate(sgd_cost(model, SquaredError(), [[(x, 2 * x)]] * 4))
    0.5

    Raises:
        ValueError: there is no minibatch.
    """
    if not minibatches:
        raise ValueError("minibatches is empty: give one at least")
    everything = [batch for minibatch in minibatches for batch in minibatch]

    def cost(rate: float) -> float:
        trial = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD([p for p in trial.parameters() if p.requires_grad], lr=rate)
        common = {"autocast": autocast, "communicator": communicator}
        for number, minibatch in enumerate(minibatches):
            value = optimizer.step(Objective(trial, loss, minibatch, seed=seed + number, **common))  # type: ignore[arg-type]
            if not math.isfinite(float(value)):
                return math.inf
        objective = Objective(trial, loss, everything, seed=seed, **common)  # type: ignore[arg-type]
        return objective.value(objective.space.point())

    return cost
