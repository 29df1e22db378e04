from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.data.batch import Batch, Example, chunks, collate, pad_context


def example(frames: int, id: str = "a", dims: int = 2) -> Example:
    rng = np.random.default_rng(frames)
    return Example(
        id, rng.standard_normal((frames, dims)).astype(np.float32), rng.integers(0, 9, frames).astype(np.int64)
    )


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
def test_collate_frame_by_frame(lengths: list[int], left: int, right: int, data: st.DataObject) -> None:
    """Each frame of each window finds its true neighbours, or the nearest edge of its utterance."""
    examples = [example(frames, str(n)) for n, frames in enumerate(lengths)]
    windows = []
    for frames in lengths:
        start = data.draw(st.integers(0, frames - 1))
        windows.append((start, data.draw(st.integers(start + 1, frames))))
    batch = collate(examples, left, right, windows=windows)
    longest = max(stop - start for start, stop in windows)
    assert batch.inputs.shape == (len(lengths), left + longest + right, 2)
    assert batch.frames == sum(stop - start for start, stop in windows) == int((batch.target >= 0).sum())
    for b, (one, (start, stop)) in enumerate(zip(examples, windows, strict=True)):
        for t in range(left + longest + right):
            source = min(max(start - left + t, 0), len(one.features) - 1)
            np.testing.assert_array_equal(batch.inputs[b, t].numpy(), one.features[source])
        expected = [*one.target[start:stop], *[-1] * (longest - (stop - start))]
        assert batch.target[b].tolist() == expected


def test_collate_whole_utterances_equals_padding_each() -> None:
    long, short = example(5, "long"), example(2, "short")
    batch = collate([long, short], 2, 1)
    np.testing.assert_array_equal(batch.inputs[0].numpy(), pad_context(long.features, 2, 1))
    np.testing.assert_array_equal(batch.inputs[1].numpy(), pad_context(short.features, 2, 1 + 3))
    assert batch.inputs.dtype == torch.float32 and batch.target.dtype == torch.int64
    assert batch.frames == 7


def test_object_targets_stay_objects() -> None:
    one = Example("a", np.zeros((3, 2), np.float32), "abc")
    batch = collate([one, one], 0, 0)
    assert batch.target == ["abc", "abc"] and batch.frames == 6
    assert batch.to("cpu").target == ["abc", "abc"]


def test_to_moves_the_tensors() -> None:
    batch = collate([example(3)], 1, 1).to("meta")
    assert isinstance(batch, Batch)
    assert batch.inputs.device.type == batch.target.device.type == "meta" and batch.frames == 3


def test_misuse_is_named() -> None:
    one = example(3)
    with pytest.raises(ValueError, match="length is 0"):
        chunks(one, 0)
    with pytest.raises(ValueError, match="examples is empty"):
        collate([], 0, 0)
    with pytest.raises(ValueError, match="context"):
        collate([one], -1, 0)
    with pytest.raises(ValueError, match="context"):
        pad_context(one.features, 0, -1)
    with pytest.raises(ValueError, match="no frames"):
        pad_context(one.features[:0], 1, 1)
    with pytest.raises(ValueError, match="3 frames of features and 2 of target"):
        collate([one._replace(target=one.target[:2])], 0, 0)
    with pytest.raises(ValueError, match="windows has 2"):
        collate([one], 0, 0, windows=[(0, 1), (1, 2)])
    for window in [(0, 4), (-1, 2), (2, 2)]:
        with pytest.raises(ValueError, match="outside"):
            collate([one], 0, 0, windows=[window])
    with pytest.raises(ValueError, match="cuts a str"):
        collate([one._replace(target="abc")], 0, 0, windows=[(0, 1)])
