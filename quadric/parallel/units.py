"""The minibatches of a training as numbered units of work, which any worker can put together at any time."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from quadric.data.batch import Batches
from quadric.data.examples import Stream
from quadric.options import check_whole


class Units:
    """The minibatches that ``stream`` gives from its beginning, some to a unit.

    No minibatch goes over the end of a pass: each pass shows every frame once.

    Args:
        stream: of the training data, of one rank, with a seed that says all there is to random order. It is read from
            wherever a unit begins: who wants it elsewhere takes a copy.
        frames: of a minibatch, and the rest of its last item.
        epochs: passes; a part of one ends in the middle.
        every: minibatches of a unit.

    >>> import torch
    >>> from quadric.data.examples import ExampleStream
    >>> units = Units(ExampleStream(torch.arange(5.0).unsqueeze(1)), frames=2, epochs=2, every=2)
    >>> [[sum(batch.frames for batch in batches) for batches in units[i]] for i in range(len(units))]
    [[2, 2], [1, 2], [2, 1]]

    Raises:
        ValueError: numbers out of range; the stream is of one rank of several.
    """

    def __init__(self, stream: Stream, *, frames: int, epochs: float = 1.0, every: int = 1) -> None:
        check_whole(frames=frames, every=every)
        for name, value in {"frames": frames, "epochs": epochs, "every": every}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be positive")
        if stream.shard[1] != 1:
            raise ValueError(f"stream.shard={stream.shard}: units are of all data; make the stream with shard=(0, 1)")
        self._stream, self.every = stream, every
        self.total_frames = stream.total_frames
        self._places: list[tuple[dict[str, Any], int]] = []
        self._frames: list[int] = []
        start, begun = stream.state_dict(), stream.frames_seen
        while (seen := stream.frames_seen - begun) < epochs * stream.total_frames:
            left = stream.total_frames - stream.frames_seen % stream.total_frames
            self._places.append((stream.state_dict(), min(frames, left)))
            stream.draw(self._places[-1][1])
            self._frames.append(stream.frames_seen - begun - seen)
        stream.load_state_dict(start)

    def __len__(self) -> int:
        return -(-len(self._places) // self.every)

    def frames(self, unit: int) -> int:
        """How many a unit holds."""
        return sum(self._frames[self._slice(unit)])

    @property
    def minibatches(self) -> int:
        """Of all units."""
        return len(self._places)

    def __getitem__(self, unit: int) -> list[Batches]:
        """The minibatches of a unit, each in micro-batches."""
        found = []
        for state, frames in self._places[self._slice(unit)]:
            self._stream.load_state_dict(state)
            found.append(self._stream.draw(frames))
        return found

    def _slice(self, unit: int) -> slice:
        if not 0 <= unit < len(self):
            raise IndexError(f"unit={unit}: there are {len(self)}")
        return slice(unit * self.every, (unit + 1) * self.every)

    def fingerprint(self) -> str:
        """Of the data's lengths, its order and the cuts, but not of the numbers in it."""
        text = repr((self.every, self._places))
        return hashlib.sha256(text.encode()).hexdigest()
