"""Utterances into minibatches: context, windows, padding.

A minibatch holds windows of utterances side by side. A window keeps its true neighbouring frames as context; where
the utterance ends, its edge frame is repeated. Shorter windows are filled up at their end, with target -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

Features: TypeAlias = Float[np.ndarray, "T D"]
Window: TypeAlias = tuple[int, int]

PADDING = -1  # that of quadric.loss.loss, which lies on this floor and cannot be imported
"""The target of a frame that is not there."""


class Example(NamedTuple):
    """One utterance: ``features`` float32 [T, D] and what they should become.

    ``target`` is an int64 array [T] of classes, or any object whose ``len()`` is T, such as a lattice.
    """

    id: str
    features: Features
    target: Any


class Batch(NamedTuple):
    """Windows of several utterances.

    ``inputs`` [B, left+T+right, D]; ``target`` an int64 tensor [B, T] padded with -1, or the list of the B target
    objects; ``frames`` counts the target frames that are real.
    """

    inputs: Float[Tensor, "B left+T+right D"]
    target: Int64[Tensor, "B T"] | list[Any]
    frames: int


class Batches(Sequence[Batch]):
    """Minibatches that are put together, each time the same, when they are looked at: one is in memory at a time.

    Args:
        make: the minibatch of a number.
        count: how many there are.
    """

    def __init__(self, make: Callable[[int], Batch], count: int) -> None:
        self._make, self._count = make, count
        self._last: tuple[int, Batch] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> list[Batch]: ...
    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._count))]
        if not -self._count <= place < self._count:
            raise IndexError(f"place={place}: there are {self._count} minibatches")
        place %= self._count
        if self._last is None or self._last[0] != place:
            self._last = (place, self._make(place))
        return self._last[1]


def pad_context(features: Features, left: int, right: int) -> Features:
    """``[left+T+right, D]``: the first frame repeated ``left`` times before, the last ``right`` times after.

    >>> pad_context(np.array([[1.0], [2.0]]), 1, 2).ravel()
    array([1., 1., 2., 2., 2.])
    """
    check_context(left, right)
    if len(features) == 0:
        raise ValueError("features has no frames; leave empty utterances out")
    return np.pad(features, ((left, right), (0, 0)), mode="edge")


def chunks(example: Example, length: int) -> list[Window]:
    """``example`` cut into windows ``(start, stop)`` of ``length`` frames, the last one shorter if need be.

    >>> chunks(Example("a", np.zeros((7, 1)), np.zeros(7, int)), 3)
    [(0, 3), (3, 6), (6, 7)]
    """
    if length < 1:
        raise ValueError(f"length is {length}; a chunk has at least one frame")
    frames = len(example.features)
    return [(start, min(start + length, frames)) for start in range(0, frames, length)]


def gather(features: Sequence[Features], windows: Sequence[Window], left: int, right: int) -> Tensor:
    """The inputs ``[B, left+T+right, D]`` of ``windows``, T the longest: one contiguous copy per window.

    Frames past the end of a shorter window are its next neighbours, or the repeated last frame of the utterance.
    """
    longest = max(stop - start for start, stop in windows)
    inputs = np.empty((len(windows), left + longest + right, features[0].shape[1]), dtype=np.float32)
    for row, frames, (start, _) in zip(inputs, features, windows, strict=True):
        begin, end = start - left, start + longest + right
        before, inside = max(0, -begin), min(end, len(frames)) - begin
        row[before:inside] = frames[begin + before : begin + inside]
        if before:
            row[:before] = frames[0]
        if inside < len(row):
            row[inside:] = frames[-1]
    return torch.from_numpy(inputs)


def gather_targets(targets: Sequence[Any], windows: Sequence[Window]) -> Tensor | list[Any]:
    """The targets of ``windows``: int64 [B, T] padded with -1, or the list of target objects as they are."""
    if not isinstance(targets[0], np.ndarray):
        return list(targets)
    longest = max(stop - start for start, stop in windows)
    padded = np.full((len(windows), longest), PADDING, dtype=np.int64)
    for row, target, (start, stop) in zip(padded, targets, windows, strict=True):
        row[: stop - start] = target[start:stop]
    return torch.from_numpy(padded)


def check_context(left: int, right: int) -> None:
    """Refuses a negative context."""
    if left < 0 or right < 0:
        raise ValueError(f"context is ({left}, {right}); give the frames before and after, neither negative")
