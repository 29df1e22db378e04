"""Streams of examples that are rows of tensors, such as images, and of data that is one piece, such as a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from quadric.data.batch import Batch, Batches

Change = Callable[[Tensor, torch.Generator], Tensor]

# What a random stream is for: streams of one seed but different purposes are independent.
_ORDER, _SAMPLE, _CHANGE, _SAMPLE_CHANGE = range(4)
MICRO = 1000
"""The most examples of a minibatch, if nothing else is said."""


class Stream(Protocol):
    """Training data that an optimiser is given as much of as it asks for; ``frames`` are what a loss counts."""

    @property
    def shard(self) -> tuple[int, int]: ...
    @property
    def total_frames(self) -> int: ...
    @property
    def frames_seen(self) -> int: ...
    @property
    def epoch(self) -> float: ...
    def draw(self, frames: int, parts: int = 1) -> Batches: ...
    def rehearsal(self) -> Callable[[int], int]: ...
    def sample(self, frames: int, key: int) -> Batches: ...
    def everything(self, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ExampleStream:
    """Minibatches from the random permutations of a set of examples, one frame each.

    As `quadric.data.stream.FrameStream`: every epoch shows each example once, a draw that crosses its end goes on in
    the next, and what is drawn is a function of the seed and the place, whatever was drawn before. Several ranks have a
    ``shard`` each of every draw.

    Args:
        inputs: the examples, [N, ...], on the device where they are wanted.
        targets: [N, ...]; None: the inputs themselves, as prepared.
        prepare: of the inputs of every minibatch, such as their normalisation.
        change: of those of ``draw`` and ``sample`` before that, by a generator: such as `CropFlip`.
        micro: the most examples in one minibatch.
        seed: of permutations, samples and changes.
        shard: this rank and the number of ranks.

    >>> stream = ExampleStream(torch.arange(4.0).unsqueeze(1), torch.arange(4))
    >>> (batch,) = stream.draw(3)
    >>> bool((batch.inputs.squeeze(1) == batch.target).all()), batch.frames, stream.epoch
    (True, 3, 0.75)

    Raises:
        ValueError: no examples, or another number of targets; sizes out of range.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        change: Change | None = None,
        micro: int = MICRO,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if not len(inputs):
            raise ValueError("inputs is empty: give one example at least")
        if targets is not None and len(targets) != len(inputs):
            raise ValueError(f"targets has {len(targets)} rows, inputs {len(inputs)}: give one for each example")
        if micro < 1 or seed < 0 or not 0 <= shard[0] < shard[1]:
            raise ValueError(
                f"micro={micro}, seed={seed}, shard={shard}: give 1 example or more, a seed of 0 or more, and this "
                "rank, from 0, with the number of ranks"
            )
        self.inputs, self.targets, self.shard = inputs, targets, shard
        self._prepare, self._change, self._micro, self._seed = prepare, change, micro, seed
        self._epoch, self._position = 0, 0
        self._permuted: tuple[int, int] | None = None
        self._go_to(0, 0)

    def __len__(self) -> int:
        return len(self.inputs)

    def draw(self, frames: int, parts: int = 1) -> Batches:
        """The next examples, in ``parts`` minibatches at least where there are as many.

        Raises:
            ValueError: not one example, or not one part.
        """
        _check(frames)
        if parts < 1:
            raise ValueError(f"parts is {parts}; give one minibatch at least")
        place, taken, missing = (self._epoch, self._position), [], frames
        while missing > 0:
            taken.append(self._order[self._position : self._position + missing])
            missing -= len(taken[-1])
            self._position += len(taken[-1])
            if self._position == len(self):
                self._go_to(self._epoch + 1, 0)
        return self._batches(np.concatenate(taken), _CHANGE, *place, parts=parts)

    def rehearsal(self) -> Callable[[int], int]:
        """How many frames a draw of so many holds: as many."""
        return lambda frames: frames

    def sample(self, frames: int, key: int) -> Batches:
        """A random subset of the whole set, the same for the same ``key``; the stream does not move."""
        _check(frames)
        if key < 0:
            raise ValueError(f"key is {key}; give a non-negative number, such as the count of updates")
        return self._batches(self._permutation(_SAMPLE, key)[:frames], _SAMPLE_CHANGE, key)

    def everything(self, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Every example once, in order and unchanged; of ``share=(rank, ranks)`` each ``ranks``-th minibatch."""
        rank, ranks = share
        for first in range(rank * self._micro, len(self), ranks * self._micro):
            yield self._batch(np.arange(first, min(first + self._micro, len(self))), None)

    @property
    def total_frames(self) -> int:
        return len(self)

    @property
    def frames_seen(self) -> int:
        return self._epoch * len(self) + self._position

    @property
    def epoch(self) -> float:
        return self.frames_seen / len(self)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position, "examples": len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken, under its seed.

        Raises:
            ValueError: the state is incomplete, or of another number of examples.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}; pass what state_dict() returned")
        if state["examples"] != len(self):
            raise ValueError(f"state was taken over {state['examples']} examples, here are {len(self)}")
        self._seed = int(state["seed"])
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        if self._permuted != (self._seed, epoch):
            self._permuted = (self._seed, epoch)
            self._order: Int64[np.ndarray, " N"] = self._permutation(_ORDER, epoch)

    def _permutation(self, purpose: int, number: int) -> Int64[np.ndarray, " N"]:
        # Sorting raw bits: they are the part of a NumPy generator that is fixed across its versions.
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(purpose, number)))
        return np.argsort(bits.random_raw(len(self)), kind="stable")

    def _batches(self, items: Int64[np.ndarray, " n"], *place: int, parts: int = 1) -> Batches:
        """This rank's minibatches of ``items``, each changed by the generator of its place."""
        rank, ranks = self.shard
        own = items[rank * len(items) // ranks : (rank + 1) * len(items) // ranks]
        size = max(1, min(self._micro, -(-len(own) // -(-parts // ranks))))
        seed = self._seed

        def make(i: int) -> Batch:
            return self._batch(
                own[i * size : (i + 1) * size], np.random.SeedSequence(seed, spawn_key=(*place, i * ranks + rank))
            )

        return Batches(make, -(-len(own) // size))

    def _batch(self, items: Int64[np.ndarray, " n"], seed: np.random.SeedSequence | None) -> Batch:
        places = torch.from_numpy(items)
        inputs = self.inputs[places.to(self.inputs.device)]
        if self._change is not None and seed is not None:
            inputs = self._change(inputs, torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0])))
        if self._prepare is not None:
            inputs = self._prepare(inputs)
        target = inputs if self.targets is None else self.targets[places.to(self.targets.device)]
        return Batch(inputs, target, len(items))


class WholeStream:
    """One piece of data that every update sees all of, such as a graph.

    Args:
        inputs: what the model is called with.
        target: what its output should become.
        frames: how many a loss counts of it.

    >>> stream = WholeStream(torch.zeros(3, 2), torch.tensor([1, -1, 0]), 2)
    >>> len(stream.draw(1)), stream.epoch, stream.rehearsal()(1)
    (1, 1.0, 2)

    Raises:
        ValueError: there is no frame.
    """

    shard = (0, 1)

    def __init__(self, inputs: Tensor, target: Tensor, frames: int) -> None:
        if frames < 1:
            raise ValueError(f"frames={frames}: a loss must count one at least; are there targets?")
        self.total_frames, self.frames_seen = frames, 0
        self._batch = Batch(inputs, target, frames)
        self._digest = hashlib.sha256(target.cpu().numpy().tobytes()).hexdigest()

    @property
    def epoch(self) -> float:
        return self.frames_seen / self.total_frames

    def draw(self, frames: int, parts: int = 1) -> Batches:
        """All of it."""
        _check(frames)
        self.frames_seen += self.total_frames
        return Batches(lambda i: self._batch, 1)

    def rehearsal(self) -> Callable[[int], int]:
        """How many frames a draw holds: all."""
        return lambda frames: self.total_frames

    def sample(self, frames: int, key: int) -> Batches:
        """All of it; the stream does not move."""
        _check(frames)
        return Batches(lambda i: self._batch, 1)

    def everything(self, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """It, for the first of the ranks."""
        if share[0] == 0:
            yield self._batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"frames_seen": self.frames_seen, "target": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken.

        Raises:
            ValueError: the state is of other data.
        """
        if state.get("target") != self._digest:
            raise ValueError("state was taken over other targets; resume on the data it was made with")
        self.frames_seen = int(state["frames_seen"])


def _check(frames: int) -> None:
    if frames < 1:
        raise ValueError(f"frames is {frames}; ask for at least one")
