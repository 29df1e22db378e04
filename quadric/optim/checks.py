"""What the shell of the block-diagonal family refuses."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from quadric.optim.damping import Damping


def check_rates(**options: float) -> None:
    """Refuses what is negative, infinite or NaN, and a momentum of one or more."""
    for name, value in options.items():
        if not isinstance(value, int | float) and not isinstance(value, Tensor):
            raise ValueError(f"{name}={value!r}: give a number")
        if not 0 <= value < (1 if name == "momentum" else math.inf):
            raise ValueError(f"{name}={value}: must be at least 0" + (" and less than 1" if name == "momentum" else ""))


def check_parts(model: object, damping: object, *parts: tuple[str, object, type]) -> None:
    """Refuses a model that is none, a damping that no inverse can be made with, and parts of another type."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: give the module itself, whose layers are looked at; parameters or "
            "groups of it may follow as params"
        )
    if isinstance(damping, int | float) and not 0 < damping < math.inf:
        raise ValueError(f"damping={damping}: must be positive: statistics of few steps have no inverse without it")
    if not isinstance(damping, int | float | Damping):
        raise ValueError(f"damping={damping!r}: give a number, or a rule of damping")
    for name, part, kind in parts:
        if not isinstance(part, kind):
            raise ValueError(f"{name}={part!r}: give {kind.__name__}")


def loss_of(value: Any) -> float:
    """What a closure has returned, where damping follows it."""
    if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"closure returned {found}, and damping follows the loss: have it return the loss of the batch, a number "
            "or a tensor of one element, or give damping a number"
        )
    return float(value.detach() if isinstance(value, Tensor) else value)


def check_parameter(p: Tensor, name: str | None, model: nn.Module) -> None:
    """Refuses a parameter that is not the model's, or complex, or sharded."""
    if name is None:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is none of model={type(model).__name__}: an optimiser of layers "
            "serves one model; build another for the other, or put both into one nn.ModuleList"
        )
    if p.is_complex():
        raise ValueError(f"{name} is complex: train its real view, torch.view_as_real, or leave it out of params")
    if hasattr(p, "device_mesh"):
        raise ValueError(
            f"{name} is sharded over devices: blocks are of whole layers; use DistributedDataParallel, or leave it out "
            "of params"
        )
