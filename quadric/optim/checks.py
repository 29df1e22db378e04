"""What the shell of the block-diagonal family refuses."""

from __future__ import annotations

import math

from torch import Tensor, nn


def check_rates(**options: float) -> None:
    """Refuses what is negative, infinite or NaN, and a momentum of one or more."""
    for name, value in options.items():
        if not 0 <= value < (1 if name == "momentum" else math.inf):
            raise ValueError(f"{name}={value}: must be at least 0" + (" and less than 1" if name == "momentum" else ""))


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
