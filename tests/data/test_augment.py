from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quadric.data.augment import SpecAugment


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
