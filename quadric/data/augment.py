"""Augmentation of normalised features and of images, drawn anew for every training minibatch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional


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


@dataclass(frozen=True)
class CropFlip:
    """Images moved and mirrored (He et al. 2016, Section 4.2).

    An image is padded with zeros on all sides, a part of its size is cut out where chance will have it, and every
    second one is mirrored, left to right.

    Args:
        padding: pixels on each side.
    """

    padding: int = 4

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding is {self.padding}; give zero (images stay in place) or more pixels")

    def __call__(self, images: Shaped[Tensor, "B C H W"], generator: torch.Generator) -> Shaped[Tensor, "B C H W"]:
        """Changed copies of ``images``, a function of the state of ``generator``."""
        count, _, height, width = images.shape
        corners = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator, device=generator.device)
        mirrored = torch.rand(count, 1, generator=generator, device=generator.device) < 0.5
        down, along = (torch.arange(size, device=generator.device) for size in (height, width))
        rows = corners[0] + down
        columns = corners[1] + torch.where(mirrored, along.flip(0), along)
        padded = functional.pad(images, [self.padding] * 4)
        rows, columns = rows.to(images.device), columns.to(images.device)
        each = torch.arange(count, device=images.device)
        cut = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2).contiguous()


def _masks(batch: int, size: int, count: int, width: int, generator: torch.Generator) -> Bool[Tensor, "B size"]:
    """True where one of ``count`` random intervals per row covers the position."""
    shape, device = (batch, count, 1), generator.device
    widths = torch.randint(min(width, size) + 1, shape, generator=generator, device=device)
    # A uniform integer on 0..size-w inclusive, for a different w in every row.
    fractions = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    starts = (fractions * (size - widths + 1)).long()
    positions = torch.arange(size, device=device)
    return ((positions >= starts) & (positions < starts + widths)).any(dim=1)
