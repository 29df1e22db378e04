"""Units of work: what a stream gives one after the other, put together in any order."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quadric.data.augment import CropFlip, SpecAugment
from quadric.data.batch import Batches
from quadric.data.examples import ExampleStream, Stream, WholeStream
from quadric.data.stream import FrameStream
from quadric.parallel.units import Units


def halved(inputs: Tensor) -> Tensor:
    return inputs / 2


def images(count: int, *, seed: int = 0, micro: int = 3) -> ExampleStream:
    """Images that are told apart by their targets, changed as they are drawn."""
    inputs = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    return ExampleStream(inputs, torch.arange(count), prepare=halved, change=CropFlip(1), micro=micro, seed=seed)


def speech(lengths: list[int], *, chunk: int | None = 4, seed: int = 0) -> FrameStream:
    """Utterances whose targets number all frames."""
    generator, features, targets, start = np.random.default_rng(2), {}, {}, 0
    for number, length in enumerate(lengths):
        features[f"{number:03d}"] = generator.standard_normal((length, 3)).astype(np.float32)
        targets[f"{number:03d}"] = np.arange(start, start + length)
        start += length
    mask = SpecAugment(time_width=2, frequency_width=1)
    return FrameStream(features, targets, context=(1, 1), chunk=chunk, micro_frames=11, seed=seed, transform=mask)


EXAMPLES = st.builds(images, st.integers(1, 20), seed=st.integers(0, 3))
FRAMES = st.builds(
    speech, st.lists(st.integers(1, 12), min_size=1, max_size=6), chunk=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 3),
)  # fmt: skip
STREAMS = EXAMPLES | FRAMES


def shown(minibatches: list[Batches]) -> list[int]:
    """The frames, by their targets."""
    return [
        int(t) for minibatch in minibatches for batch in minibatch for t in batch.target.view(-1).tolist() if t >= 0
    ]


def alike(found: list[Batches], expected: list[Batches]) -> bool:
    pairs = [(list(a), list(b)) for a, b in zip(found, expected, strict=True)]
    return all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.target, b.target) and a.frames == b.frames
        for some, others in pairs
        for a, b in zip(some, others, strict=True)
    )


@settings(max_examples=50)
@given(stream=STREAMS, frames=st.integers(1, 25), every=st.integers(1, 4), epochs=st.integers(1, 3))
def test_each_pass_shows_every_frame_once(stream: Stream, frames: int, every: int, epochs: int) -> None:
    units = Units(stream, frames=frames, epochs=epochs, every=every)
    total = stream.total_frames
    minibatches = [minibatch for unit in range(len(units)) for minibatch in units[unit]]
    assert len(minibatches) == units.minibatches and len(units) == math.ceil(units.minibatches / every)
    found = shown(minibatches)
    for epoch in range(epochs):
        assert sorted(found[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert len(found) == epochs * total
    assert [units.frames(unit) for unit in range(len(units))] == [len(shown(units[u])) for u in range(len(units))]


@settings(max_examples=50)
@given(stream=STREAMS, frames=st.integers(1, 25), every=st.integers(1, 4), data=st.data())
def test_any_order_gives_what_drawing_gives(stream: Stream, frames: int, every: int, data: st.DataObject) -> None:
    units = Units(pickle.loads(pickle.dumps(stream)), frames=frames, epochs=2, every=every)
    drawn: list[Batches] = []
    while (seen := stream.frames_seen) < 2 * stream.total_frames:
        drawn.append(stream.draw(min(frames, stream.total_frames - seen % stream.total_frames)))
    order = data.draw(st.lists(st.integers(0, len(units) - 1), min_size=1, max_size=8))
    kept = [(unit, units[unit]) for unit in order]  # looked at only after the stream has moved on
    for unit, minibatches in kept:
        assert alike(minibatches, drawn[unit * every : (unit + 1) * every])
    elsewhere = pickle.loads(pickle.dumps(units))
    assert all(alike(elsewhere[unit], minibatches) for unit, minibatches in kept)
    assert elsewhere.fingerprint() == units.fingerprint()


@given(stream=STREAMS, frames=st.integers(1, 9), epochs=st.floats(0.05, 2.5))
def test_a_part_of_a_pass_ends_where_it_has_been_reached(stream: Stream, frames: int, epochs: float) -> None:
    units = Units(stream, frames=frames, epochs=epochs)
    sizes = [units.frames(unit) for unit in range(len(units))]
    assert sum(sizes) >= epochs * stream.total_frames > sum(sizes[:-1])


@settings(max_examples=50)
@given(stream=STREAMS, drawn=st.integers(1, 30))
def test_units_begin_where_the_stream_is_and_leave_it_there(stream: Stream, drawn: int) -> None:
    stream.draw(drawn)
    place = stream.state_dict()
    units = Units(stream, frames=3)
    assert stream.state_dict() == place
    drawn_next = [stream.draw(min(3, stream.total_frames - stream.frames_seen % stream.total_frames))]
    assert alike(units[0], drawn_next)
    total = sum(units.frames(unit) for unit in range(len(units)))
    assert total >= stream.total_frames


def test_one_piece_of_data_is_a_unit_for_each_pass() -> None:
    units = Units(WholeStream(torch.zeros(3, 2), torch.tensor([1, -1, 0]), 2), frames=7, epochs=3)
    assert [units.frames(unit) for unit in range(len(units))] == [2, 2, 2]


def test_fingerprints_tell_data_order_and_cuts_apart() -> None:
    found = [
        Units(images(10), frames=3).fingerprint(),
        Units(images(11), frames=3).fingerprint(),
        Units(images(10, seed=1), frames=3).fingerprint(),
        Units(images(10), frames=2).fingerprint(),
        Units(images(10), frames=3, every=2).fingerprint(),
        Units(images(10), frames=3, epochs=2).fingerprint(),
        Units(speech([5, 6]), frames=3).fingerprint(),
        Units(speech([6, 5]), frames=3).fingerprint(),
        Units(speech([5, 6], chunk=2), frames=3).fingerprint(),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == Units(images(10), frames=3).fingerprint()


@pytest.mark.parametrize(
    "options",
    [{"frames": 0}, {"frames": 2.5}, {"every": 0}, {"every": 1.5}, {"epochs": 0.0}, {"epochs": math.nan},
     {"epochs": math.inf}],
)  # fmt: skip
def test_numbers_out_of_range(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}="):
        Units(images(4), **({"frames": 2} | options))  # type: ignore[arg-type]


def test_a_share_of_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stream\.shard=\(0, 2\)"):
        Units(ExampleStream(torch.zeros(4, 1), shard=(0, 2)), frames=2)


@pytest.mark.parametrize("unit", [-1, 2])
def test_units_that_there_are_not(unit: int) -> None:
    units = Units(images(4), frames=2)
    for look in (units.frames, units.__getitem__):
        with pytest.raises(IndexError, match=f"unit={unit}: there are 2"):
            look(unit)
