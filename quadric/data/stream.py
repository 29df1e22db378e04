"""An endless, seeded, resumable stream of frames over a set of utterances."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from quadric.data.batch import Batch, Batches, Example, Features, check_context, chunks, gather, gather_targets

Transform: TypeAlias = Callable[[Float[Tensor, "B T D"], torch.Generator], Float[Tensor, "B T D"]]
Items: TypeAlias = Int64[np.ndarray, " items"]

# What a random stream is for: streams of one seed but different purposes are independent.
_ORDER, _SAMPLE, _TRANSFORM, _SAMPLE_TRANSFORM = range(4)
_LISTED = 10
MICRO_FRAMES = 10_000
"""The most frames of a minibatch, if nothing else is said."""
_MOST_PADDING = 512
"""Frames of a minibatch that are padding: more of them cost more than another minibatch does."""


class FrameStream:
    """Minibatches from the random permutations of a set of utterances, as many frames as each step asks for.

    The unit of the permutation, an *item*, is a window of ``chunk`` frames, or a whole utterance. Each epoch draws a
    new permutation and shows every frame once; a draw that crosses the end of an epoch takes the rest from the next.
    All randomness is a function of the seed and the place in the stream, so a stream restored from
    ``state_dict`` continues bit for bit, whatever the sizes of the draws before or after.

    Several ranks share the work by a ``shard`` each. Every draw and every sample is then one for all ranks, who permute
    alike; a rank is given its own part of the items, as many frames as the others to within the longest item. The parts
    make up what one rank alone would be given, and a stream may be resumed on another number of ranks. A draw of fewer
    items than ranks leaves some with no minibatch. Numbers of frames are those of all ranks together.

    Features are kept as the mapping gives them: a memory-mapped array stays on disk and only the windows drawn are
    read. Targets stay in memory.

    Args:
        features: utterance id -> float32 [T, D].
        targets: utterance id -> integer classes [T], or any object of length T (then ``chunk`` must be None).
        context: frames before and after each window that the model needs, ``(left, right)``.
        micro_frames: the most target frames in one minibatch, padding included, context not. A whole utterance that
            is longer makes a minibatch of its own.
        chunk: frames per window; None keeps utterances whole.
        seed: of the permutations, the samples and the transform.
        transform: applied to the inputs of ``draw`` and ``sample`` with a generator of its own for each minibatch.
        shard: this rank and the number of ranks. The transform draws other numbers on each.

    Raises:
        ValueError: no utterances, ids or lengths that do not match, empty or misshaped arrays, sizes out of range.
    """

    def __init__(
        self,
        features: Mapping[str, Features],
        targets: Mapping[str, Any],
        *,
        context: tuple[int, int],
        micro_frames: int = MICRO_FRAMES,
        chunk: int | None = 50,
        seed: int = 0,
        transform: Transform | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        check_context(*context)
        _check_sizes(micro_frames, chunk, seed)
        _check_shard(*shard)
        self._examples = _load(features, targets)
        if chunk is not None and not isinstance(self._examples[0].target, np.ndarray):
            kind = type(self._examples[0].target).__name__
            raise ValueError(f"chunk is {chunk} but targets of type {kind} cannot be cut; pass chunk=None")
        self._windows = _windows(self._examples, chunk)
        self._context, self._micro_frames, self._chunk = context, micro_frames, chunk
        self._seed, self._transform = seed, transform
        self._rank, self._ranks = shard
        self._fingerprint = _fingerprint(self._examples)
        self._total = sum(len(example.features) for example in self._examples)
        self._epoch, self._position = 0, 0
        self._permuted: tuple[int, int] | None = None
        self._go_to(0, 0)

    def draw(self, frames: int, parts: int = 1) -> Batches:
        """The next items, just enough to reach ``frames`` target frames, in minibatches of similar lengths.

        A minibatch is put together when it is looked at, and only the last one stays in memory. There are ``parts`` of
        them on all ranks together, or about as many, also where fewer would hold the frames.

        Raises:
            ValueError: ``frames`` or ``parts`` is not positive.
        """
        _check_frames(frames)
        if parts < 1:
            raise ValueError(f"parts is {parts}; give one minibatch at least")
        place = (self._epoch, self._position)
        taken, missing = [], frames
        while missing > 0:
            seen = self._seen
            stop = min(int(np.searchsorted(self._ends, seen + missing)) + 1, len(self._order))
            taken.append(self._order[self._position : stop])
            missing -= int(self._ends[stop - 1]) - seen
            if stop == len(self._order):
                self._go_to(self._epoch + 1, 0)
            else:
                self._position = stop
        return self._transformed(np.concatenate(taken), _TRANSFORM, *place, parts=parts)

    def rehearsal(self) -> Callable[[int], int]:
        """A function that tells how many frames each draw of so many holds, one after the other from the beginning.

        That is those asked for and the rest of the last item: a draw of 1 is a whole item. Nothing is drawn.

        >>> features = {"a": np.zeros((5, 1)), "b": np.zeros((3, 1))}
        >>> stream = FrameStream(features, {id: np.zeros(len(f), int) for id, f in features.items()}, context=(0, 0))
        >>> holds = stream.rehearsal()
        >>> sorted([holds(1), holds(1)]), holds(6)
        ([3, 5], 8)
        """
        epoch, start = 0, 0
        ends = np.cumsum(self._lengths(self._permutation(_ORDER, epoch)))

        def holds(frames: int) -> int:
            nonlocal epoch, start, ends
            taken = 0
            while taken < frames:
                last = min(int(np.searchsorted(ends, start + frames - taken)), len(ends) - 1)
                taken += int(ends[last]) - start
                start = int(ends[last])
                if start == self._total:
                    epoch, start = epoch + 1, 0
                    ends = np.cumsum(self._lengths(self._permutation(_ORDER, epoch)))
            return taken

        return holds

    def sample(self, frames: int, key: int) -> Batches:
        """A random subset of the whole set, just enough to reach ``frames``; the stream does not move.

        The same ``key`` gives the same sample, different keys independent ones. It is transformed as draws are: what is
        computed on it, such as curvature, is then of the same random function as the gradient. Asking for at least
        ``total_frames`` gives every frame once.

        Raises:
            ValueError: ``frames`` is not positive or ``key`` is negative.
        """
        _check_frames(frames)
        if key < 0:
            raise ValueError(f"key is {key}; give a non-negative number, such as the count of updates")
        order = self._permutation(_SAMPLE, key)
        taken = order[: _reach(self._lengths(order), frames)]
        return self._transformed(taken, _SAMPLE_TRANSFORM, key)

    def everything(self, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Every frame once, in a fixed order and as it is, for evaluation; not only this rank's.

        Of ``share=(rank, ranks)``, only each ``ranks``-th minibatch, from that of the number ``rank`` on.
        """
        rank, ranks = share
        for number, items in enumerate(self._pack(np.arange(len(self._windows)), self._micro_frames)):
            if number % ranks == rank:
                yield self._batch(items)

    @property
    def shard(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return self._rank, self._ranks

    @property
    def total_frames(self) -> int:
        """Target frames in the set, and in one epoch."""
        return self._total

    @property
    def frames_seen(self) -> int:
        """Target frames drawn so far, over all epochs."""
        return self._epoch * self._total + self._seen

    @property
    def epoch(self) -> float:
        """Progress in epochs: 1.5 is halfway through the second."""
        return self.frames_seen / self._total

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, in five plain values."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "chunk": self._chunk,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken, under its seed.

        Raises:
            ValueError: the state is incomplete, or of a stream over other utterances or another ``chunk``.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"state lacks {', '.join(missing)}; pass what state_dict() returned")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError("state was taken over other utterances or lengths; resume on the data it was made with")
        if state["chunk"] != self._chunk:
            raise ValueError(f"state was taken with chunk={state['chunk']}, this stream has chunk={self._chunk}")
        if state["epoch"] < 0 or not 0 <= state["position"] < len(self._windows):
            raise ValueError(f"state points to item {state['position']} of {len(self._windows)}; it is damaged")
        self._seed = int(state["seed"])
        self._go_to(int(state["epoch"]), int(state["position"]))

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        if self._permuted != (self._seed, epoch):
            self._permuted = (self._seed, epoch)
            self._order: Items = self._permutation(_ORDER, epoch)
            self._ends: Items = np.cumsum(self._lengths(self._order))

    @property
    def _seen(self) -> int:
        """Frames of this epoch."""
        return int(self._ends[self._position - 1]) if self._position else 0

    def _permutation(self, purpose: int, number: int) -> Items:
        # Sorting raw bits: they are the part of a NumPy generator that is fixed across its versions.
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(purpose, number)))
        return np.argsort(bits.random_raw(len(self._windows)), kind="stable")

    def _lengths(self, items: Items) -> Int64[np.ndarray, " items"]:
        return self._windows[items, 2] - self._windows[items, 1]

    def _pack(self, items: Items, most: int) -> Iterator[Items]:
        """Splits ``items``, longest first, into minibatches of ``most`` frames when padded, and little padding."""
        lengths = self._lengths(items)
        longest_first = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(items):
            longest = int(lengths[longest_first[start]])
            fitting = longest_first[start : start + max(1, most // longest)]
            padding = np.cumsum(longest - lengths[fitting])
            fits = int(np.searchsorted(padding, _MOST_PADDING, side="right"))
            yield items[fitting[:fits]]
            start += fits

    def _pack_as_drawn(self, items: Items, most: int) -> Iterator[Items]:
        """The same in the order of the draw, with more padding: minibatches are independent draws then.

        Sorted by length they are not, and their spread is not that of the gradient where it depends on the length.
        """
        lengths = self._lengths(items)
        start = 0
        while start < len(items):
            padded = np.maximum.accumulate(lengths[start : start + most]) * np.arange(1, len(items) - start + 1)[:most]
            fits = max(1, int(np.searchsorted(padded, most, side="right")))
            yield items[start : start + fits]
            start += fits

    def _batch(self, items: Items) -> Batch:
        rows = self._windows[items].tolist()
        examples = [self._examples[utterance] for utterance, _, _ in rows]
        windows = [(start, stop) for _, start, stop in rows]
        inputs = gather([example.features for example in examples], windows, *self._context)
        target = gather_targets([example.target for example in examples], windows)
        return Batch(inputs, target, sum(stop - start for start, stop in windows))

    def _own(self, items: Items) -> Items:
        """This rank's part of ``items``: those whose middle frame lies in its part of all their frames."""
        ends = np.cumsum(self._lengths(items))
        doubled_middles = 2 * ends - self._lengths(items)
        return items[doubled_middles * self._ranks // (2 * ends[-1]) == self._rank]

    def _transformed(self, items: Items, *place: int, parts: int = 1) -> Batches:
        """This rank's minibatches of ``items``, each transformed with the generator of its place."""
        own = self._own(items)
        each = -(-int(self._lengths(own).sum()) // -(-parts // self._ranks))
        pack = self._pack if parts == 1 else self._pack_as_drawn
        packed, seed = list(pack(own, max(1, min(each, self._micro_frames)))), self._seed

        def make(i: int) -> Batch:
            here = np.random.SeedSequence(seed, spawn_key=(*place, i * self._ranks + self._rank))
            return self._transform_one(self._batch(packed[i]), here)

        return Batches(make, len(packed))

    def _transform_one(self, batch: Batch, seed: np.random.SeedSequence) -> Batch:
        if self._transform is None:
            return batch
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        inputs = self._transform(batch.inputs, generator)
        if inputs.shape != batch.inputs.shape:
            raise ValueError(
                f"transform turned inputs {tuple(batch.inputs.shape)} into {tuple(inputs.shape)}; keep the shape"
            )
        return batch._replace(inputs=inputs)


def _refuse(ids: Sequence[str], fault: str) -> None:
    """Reports all utterances with one fault at once, if there are any."""
    if ids:
        listed = ", ".join(ids[:_LISTED]) + (", ..." if len(ids) > _LISTED else "")
        raise ValueError(f"{len(ids)} utterances {fault}: {listed}")


def _load(features: Mapping[str, Features], targets: Mapping[str, Any]) -> list[Example]:
    """The checked examples in the order of their ids."""
    if not features and not targets:
        raise ValueError("features and targets are empty; give at least one utterance")
    _refuse(sorted(features.keys() - targets.keys()), "have features but no targets")
    _refuse(sorted(targets.keys() - features.keys()), "have targets but no features")
    examples = [Example(id, np.asarray(features[id]), _as_target(targets[id])) for id in sorted(features)]
    _check_targets(examples)
    _check_features(examples)
    differing = [
        f"{example.id} ({len(example.features)} and {len(example.target)})"
        for example in examples
        if len(example.features) != len(example.target)
    ]
    _refuse(differing, "differ in frames of features and target")
    return examples


def _as_target(target: Any) -> Any:
    return target.numpy() if isinstance(target, Tensor) else target


def _check_features(examples: Sequence[Example]) -> None:
    flat = [e.id for e in examples if e.features.ndim != 2 or e.features.shape[1] == 0]
    _refuse(flat, "have features that are not [T, D]")
    _refuse([e.id for e in examples if not len(e.features) or not len(e.target)], "have no frames")
    dims = examples[0].features.shape[1]
    other = [f"{e.id} ({e.features.shape[1]})" for e in examples if e.features.shape[1] != dims]
    _refuse(other, f"differ in feature dimension from the {dims} of {examples[0].id}")


def _check_targets(examples: Sequence[Example]) -> None:
    arrays = [example for example in examples if isinstance(example.target, np.ndarray)]
    if arrays and len(arrays) < len(examples):
        raise ValueError("targets mixes arrays and other objects; give one kind for all utterances")
    wrong = [e.id for e in arrays if e.target.ndim != 1 or e.target.dtype.kind not in "iu"]
    _refuse(wrong, "have targets that are not integers [T]")
    negative = [e.id for e in arrays if (e.target < 0).any()]
    _refuse(negative, "have negative targets (-1 is kept for padding)")


def _windows(examples: Sequence[Example], chunk: int | None) -> Int64[np.ndarray, "items 3"]:
    """Rows (utterance, start, stop), every frame in exactly one."""
    rows = [
        (number, start, stop)
        for number, example in enumerate(examples)
        for start, stop in chunks(example, chunk or len(example.features))
    ]
    return np.array(rows, dtype=np.int64)


def _reach(lengths: Int64[np.ndarray, " items"], frames: int) -> int:
    """How many of the first items it takes to reach ``frames``, all if they do not suffice."""
    return min(int(np.searchsorted(np.cumsum(lengths), frames)) + 1, len(lengths))


def _fingerprint(examples: Sequence[Example]) -> str:
    """A digest of the ids and lengths of the utterances."""
    text = "\n".join(f"{example.id}\t{len(example.features)}" for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_frames(frames: int) -> None:
    if frames < 1:
        raise ValueError(f"frames is {frames}; ask for at least one")


def _check_shard(rank: int, ranks: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"shard is ({rank}, {ranks}); give this rank, from 0, and the number of ranks")


def _check_sizes(micro_frames: int, chunk: int | None, seed: int) -> None:
    if micro_frames < 1:
        raise ValueError(f"micro_frames is {micro_frames}; a minibatch holds at least one frame")
    if chunk is not None and not 1 <= chunk <= micro_frames:
        raise ValueError(f"chunk is {chunk}; give 1 to micro_frames={micro_frames} frames, or None")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give a non-negative number")
