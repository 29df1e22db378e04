"""Losses that are multiplied by a number before ``backward()``: what gradients, and cotangents that hooks see, are of.

A gradient is unscaled before a step is made of it. What is recorded of the backward pass is not, and statistics are
quadratic in it: the number must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quadric.objective.objective import Objective

LossScale = Callable[[], float]


def unscale_(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None, known: LossScale | None) -> float:
    """What `torch.amp.GradScaler` says as it calls ``optimizer.step``: gradients are divided by it, if they are not.

    Args:
        optimizer: has its attributes ``grad_scale`` and ``found_inf``, where a scaler has called it.
        closure: of the step.
        known: tells the scale, where no scaler does.

    Returns:
        The number that the loss was multiplied by: zero where the scaler has found a gradient that is not finite, NaN
        where gradients were unscaled before and nobody says by what.

    Raises:
        ValueError: a closure, whose gradients a scaler has not seen; gradients in float16.
    """
    told: Tensor | None = getattr(optimizer, "grad_scale", None)
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    if found is None:
        return 1.0 if known is None else _checked(known())
    if closure is not None:
        raise ValueError(
            "scaler.step(optimizer, closure): a GradScaler looks at gradients before the closure makes them; call "
            "optimizer.step(closure), unscale the gradients in the closure, and build the optimiser with "
            "loss_scale=scaler.get_scale"
        )
    if bool(found):
        return 0.0
    if told is None:
        return math.nan if known is None else _checked(known())
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if any(g.dtype is torch.float16 for g in gradients):
        raise ValueError(
            "gradients are in float16, and lose digits unscaled: keep the parameters in float32, and autocast"
        )
    for g in gradients:
        g.div_(told.to(g.device))
    return float(told)


def scale_of_calls(closure: Callable[[], Any] | None, scale: float, ranks: int) -> float:
    """`Seen.scale`: on several ranks an `Objective` sums their gradients, anyone else takes the mean.

    Raises:
        ValueError: the scale is not known; the objective is of other ranks.
    """
    if isinstance(closure, Objective):
        if closure.communicator.size not in (1, ranks):
            raise ValueError(
                f"communicator: the optimiser knows of {ranks} ranks, its Objective of {closure.communicator.size}: "
                "give both the same, or statistics differ between the ranks"
            )
        return 1 / closure.communicator.size
    if math.isnan(scale):
        raise ValueError(
            "scaler.unscale_() was called before scaler.step(), which then does not say the scale that calls were "
            "recorded at: build the optimiser with loss_scale=scaler.get_scale"
        )
    return scale


def _checked(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise ValueError(f"loss_scale() is {scale}: it must be positive, 1 where the loss is not scaled")
    return float(scale)
