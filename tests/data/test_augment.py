from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quadric.data.augment import CropFlip, SpecAugment


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(hidden: Tensor) -> list[int]:
    """Lengths of the runs of True."""
    return [len(list(group)) for value, group in itertools.groupby(hidden.tolist()) if value]


@given(
    frames=st.integers(1, 30),
    masks=st.integers(0, 3),
    width=st.integers(0, 40),
    seed=st.integers(0, 2**32),
    along_time=st.booleans(),
)
def test_masks_are_few_narrow_runs(frames: int, masks: int, width: int, seed: int, along_time: bool) -> None:
    inputs = torch.ones(4, frames, 5) if along_time else torch.ones(4, 5, frames)
    augment = SpecAugment(masks, width, 0, 0) if along_time else SpecAugment(0, 0, masks, width)
    out = augment(inputs, seeded(seed))
    hidden = (out == 0).all(dim=2 if along_time else 1)
    assert int((out == 0).sum()) == 5 * int(hidden.sum())
    for row in hidden:
        assert len(runs(row)) <= masks
        assert int(row.sum()) <= masks * min(width, frames)


def test_width_and_start_are_uniform() -> None:
    out = SpecAugment(1, 4, 0, 0)(torch.ones(20_000, 10, 1), seeded())
    hidden = (out == 0).squeeze(2)
    widths = hidden.sum(1)
    torch.testing.assert_close(torch.bincount(widths) / 20_000, torch.full((5,), 0.2), rtol=0, atol=0.02)
    starts = hidden[widths == 3].int().argmax(1)
    torch.testing.assert_close(torch.bincount(starts) / len(starts), torch.full((8,), 1 / 8), rtol=0, atol=0.02)


def test_utterances_are_masked_independently_and_inputs_left_alone() -> None:
    inputs = torch.ones(8, 50, 40)
    out = SpecAugment()(inputs, seeded())
    assert torch.equal(inputs, torch.ones(8, 50, 40))
    assert len({tuple(row.flatten().tolist()) for row in out}) == 8


def test_the_generator_decides() -> None:
    inputs = torch.randn(3, 20, 8)
    masks = SpecAugment()
    assert torch.equal(masks(inputs, seeded(1)), masks(inputs, seeded(1)))
    assert not torch.equal(masks(inputs, seeded(1)), masks(inputs, seeded(2)))


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="time_width is -1"):
        SpecAugment(time_width=-1)


def cut_one_by_one(images: Tensor, padding: int, corners: Tensor, mirrored: Tensor) -> Tensor:
    """The slow twin of `CropFlip`: an image at a time."""
    _, channels, height, width = images.shape
    out = []
    for image, (down, right), mirror in zip(images, corners.T.tolist(), mirrored.tolist(), strict=True):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=images.dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        cut = padded[:, down : down + height, right : right + width]
        out.append(torch.flip(cut, [2]) if mirror else cut)
    return torch.stack(out)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_images_are_cut_and_mirrored(padding: int, dtype: torch.dtype) -> None:
    images = torch.arange(1, 1 + 20 * 2 * 4 * 5).reshape(20, 2, 4, 5).to(dtype)
    draws = seeded(3)
    corners = torch.randint(2 * padding + 1, (2, 20, 1), generator=draws)[..., 0]
    mirrored = torch.rand(20, 1, generator=draws)[:, 0] < 0.5
    out = CropFlip(padding)(images, seeded(3))
    assert out.dtype == dtype and torch.equal(out, cut_one_by_one(images, padding, corners, mirrored))
    assert torch.equal(images, torch.arange(1, 1 + 20 * 2 * 4 * 5).reshape(20, 2, 4, 5).to(dtype))


def test_every_place_and_both_sides_are_as_likely() -> None:
    count = 20_000
    images = torch.zeros(count, 1, 3, 3)
    images[:, :, 1, 1], images[:, :, 1, 2] = 1, 2
    out = CropFlip(1)(images, seeded())[:, 0]
    found = (out == 1).float().mean(0)
    torch.testing.assert_close(found, torch.full((3, 3), 1 / 9), rtol=0, atol=0.01)
    in_order = ((out[:, :, :-1] == 1) & (out[:, :, 1:] == 2)).any(dim=(1, 2)).float().mean()
    reverse = ((out[:, :, :-1] == 2) & (out[:, :, 1:] == 1)).any(dim=(1, 2)).float().mean()
    torch.testing.assert_close(torch.stack([in_order, reverse]), torch.full((2,), 1 / 3), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="padding is -1"):
        CropFlip(-1)
