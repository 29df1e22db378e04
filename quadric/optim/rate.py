"""The first rate of stochastic gradient descent, found by short trials (Bottou, SGD 2.0: ``svmasgd``)."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quadric.comm.communicator import Communicator, Solo
from quadric.loss.loss import Loss
from quadric.objective.objective import MicroBatch, Objective

_MOST = 40
"""Factors of 2 from the first rate: a trillion."""


def search_rate(cost: Callable[[float], float], first: float = 1.0) -> float:
    """The rate at which a short training ends with a low cost, among ``first`` and its multiples by powers of 2.

    From ``first`` and twice that it moves by factors of 2 in the direction in which the cost falls, until it rises. The
    best of those tried is the rate, wherever it came from: ``svmasgd`` takes half of it where it came from above, which
    costs a network much of its only pass. What is not finite counts as infinitely high.

    Raises:
        ValueError: ``first`` is no positive number, or no rate has a finite cost.

    >>> search_rate(lambda rate: (rate - 0.3) ** 2)
    0.25
    >>> search_rate(lambda rate: (rate - 30.0) ** 2)
    32.0
    """
    if not 0 < first < math.inf:
        raise ValueError(f"first={first}: must be positive")

    def at(rate: float) -> float:
        found = float(cost(rate))
        return found if math.isfinite(found) else math.inf

    best, lowest, factor = first, at(first), 2.0
    upper = at(2 * first)
    if upper < lowest:
        best, lowest = 2 * first, upper
    elif lowest < upper or lowest == math.inf:
        factor = 0.5
    else:
        return first
    for _ in range(_MOST):
        found = at(best * factor)
        if found > lowest or found == lowest < math.inf:
            return best
        best, lowest = best * factor, found
    if lowest == math.inf:
        raise ValueError(f"cost is not finite at any rate from {first} down to {best}: look at the data and the model")
    return best


def sgd_cost(
    model: nn.Module,
    loss: Loss,
    minibatches: Sequence[Sequence[MicroBatch]],
    *,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    delay: int = 0,
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
        delay: steps that a gradient waits before it is applied, as that of a worker does while others push theirs.

    >>> from quadric.loss.loss import SquaredError
    >>> model = nn.Linear(1, 1, bias=False)
    >>> x = torch.ones(8, 1)
    >>> search_rate(sgd_cost(model, SquaredError(), [[(x, 2 * x)]] * 4))
    1.0

    Raises:
        ValueError: there is no minibatch; a negative delay.
    """
    if not minibatches:
        raise ValueError("minibatches is empty: give one at least")
    if delay < 0:
        raise ValueError(f"delay={delay}: must not be negative")
    everything = [batch for minibatch in minibatches for batch in minibatch]

    def cost(rate: float) -> float:
        trial = copy.deepcopy(model).train()
        parameters = [p for p in trial.parameters() if p.requires_grad]
        optimizer, waiting = torch.optim.SGD(parameters, lr=rate), deque[list[Tensor | None]]()
        common = {"autocast": autocast, "communicator": communicator}
        for number, minibatch in enumerate(minibatches):
            value = Objective(trial, loss, minibatch, seed=seed + number, **common)()  # type: ignore[arg-type]
            if not math.isfinite(float(value)):
                return math.inf
            waiting.append([p.grad for p in parameters])
            last = number + 1 == len(minibatches)
            while waiting and (last or len(waiting) > delay):
                for p, gradient in zip(parameters, waiting.popleft(), strict=True):
                    p.grad = gradient
                optimizer.step()
            optimizer.zero_grad()
        objective = Objective(trial, loss, everything, seed=seed, **common)  # type: ignore[arg-type]
        return objective.value(objective.space.point())

    return cost
