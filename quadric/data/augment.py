"""Augmentation of normalised features, drawn anew for every training minibatch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SpecAugment:
    """Time and frequency masks of SpecAugment (Park et al. 2019, Section 2), without time warping.

    The defaults suit windows of 50 to 100 frames; the paper's, for whole utterances, would hide half of such a window.
    Each mask hides ``w`` consecutive frames (or feature dimensions) of one utterance: ``w`` is uniform on 0 to the
    width inclusive, its start uniform where it fits. Hidden values become 0, the mean of normalised features.

    Args:
        time_masks: masks per utterance along time.
        time_width: the widest, in frames; clipped to the length of the input.
        frequency_masks: masks per utterance along the feature dimension.
        frequency_width: the widest, in dimensions; clipped to their number.
    """

    time_masks: int = 1
    time_width: int = 10
    frequency_masks: int = 2
    frequency_width: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; give zero (no masks) or more")

    def __call__(self, inputs: Float[Tensor, "B T D"], generator: torch.Generator) -> Float[Tensor, "B T D"]:
        """A masked copy of ``inputs``, a function of the state of ``generator``."""
        batch, frames, dims = inputs.shape
        time = _masks(batch, frames, self.time_masks, self.time_width, generator)
        frequency = _masks(batch, dims, self.frequency_masks, self.frequency_width, generator)
        hidden = time.unsqueeze(2) | frequency.unsqueeze(1)
        return inputs.masked_fill(hidden.to(inputs.device), 0.0)


def _masks(batch: int, size: int, count: int, width: int, generator: torch.Generator) -> Bool[Tensor, "B size"]:
    """True where one of ``count`` random intervals per row covers the position."""
    shape, device = (batch, count, 1), generator.device
    widths = torch.randint(min(width, size) + 1, shape, generator=generator, device=device)
    # A uniform integer on 0..size-w inclusive, for a different w in every row.
    fractions = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    starts = (fractions * (size - widths + 1)).long()
    positions = torch.arange(size, device=device)
    return ((positions >= starts) & (positions < starts + widths)).any(dim=1)
