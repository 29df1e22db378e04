from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.data.batch import Example, Window, chunks, gather, gather_targets, pad_context
from reference.collate import collate


def example(frames: int, id: str = "a", dims: int = 2) -> Example:
    rng = np.random.default_rng(frames)
    return Example(
        id, rng.standard_normal((frames, dims)).astype(np.float32), rng.integers(0, 9, frames).astype(np.int64)
    )


def gathered(
    examples: list[Example], left: int, right: int, windows: list[Window]
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = gather([one.features for one in examples], windows, left, right)
    target = gather_targets([one.target for one in examples], windows)
    assert isinstance(target, torch.Tensor)
    return inputs, target


@given(frames=st.integers(1, 40), length=st.integers(1, 50))
def test_chunks_cover_every_frame_once(frames: int, length: int) -> None:
    windows = chunks(example(frames), length)
    assert [t for start, stop in windows for t in range(start, stop)] == list(range(frames))
    assert all(stop - start == length for start, stop in windows[:-1])
    assert 1 <= windows[-1][1] - windows[-1][0] <= length


def test_pad_context_repeats_the_edges() -> None:
    features = example(3).features
    out = pad_context(features, 2, 1)
    np.testing.assert_array_equal(out, features[[0, 0, 0, 1, 2, 2]])
    assert out.dtype == np.float32


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    left=st.integers(0, 6),
    right=st.integers(0, 6),
    data=st.data(),
)
def test_windows_frame_by_frame(lengths: list[int], left: int, right: int, data: st.DataObject) -> None:
    """Each frame of each window finds its true neighbours, or the nearest edge of its utterance."""
    examples = [example(frames, str(n)) for n, frames in enumerate(lengths)]
    windows = []
    for frames in lengths:
        start = data.draw(st.integers(0, frames - 1))
        windows.append((start, data.draw(st.integers(start + 1, frames))))
    inputs, target = gathered(examples, left, right, windows)
    longest = max(stop - start for start, stop in windows)
    assert inputs.shape == (len(lengths), left + longest + right, 2)
    for b, (one, (start, stop)) in enumerate(zip(examples, windows, strict=True)):
        for t in range(left + longest + right):
            source = min(max(start - left + t, 0), len(one.features) - 1)
            np.testing.assert_array_equal(inputs[b, t].numpy(), one.features[source])
        expected = [*one.target[start:stop], *[-1] * (longest - (stop - start))]
        assert target[b].tolist() == expected
    slow = collate(examples, left, right, windows=windows)
    assert torch.equal(slow.inputs, inputs) and torch.equal(slow.target, target)
    assert slow.frames == int((target >= 0).sum())


def test_whole_utterances_are_those_padded_each() -> None:
    long, short = example(5, "long"), example(2, "short")
    inputs, target = gathered([long, short], 2, 1, [(0, 5), (0, 2)])
    np.testing.assert_array_equal(inputs[0].numpy(), pad_context(long.features, 2, 1))
    np.testing.assert_array_equal(inputs[1].numpy(), pad_context(short.features, 2, 1 + 3))
    assert inputs.dtype == torch.float32 and target.dtype == torch.int64
    assert torch.equal(inputs, collate([long, short], 2, 1).inputs)


def test_object_targets_stay_objects() -> None:
    assert gather_targets(["abc", "abc"], [(0, 3), (0, 3)]) == ["abc", "abc"]


def test_misuse_is_named() -> None:
    one = example(3)
    with pytest.raises(ValueError, match="length is 0"):
        chunks(one, 0)
    with pytest.raises(ValueError, match="context"):
        pad_context(one.features, 0, -1)
    with pytest.raises(ValueError, match="no frames"):
        pad_context(one.features[:0], 1, 1)
