from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quadric.data.augment import SpecAugment
from quadric.data.batch import Batch, Example
from quadric.data.stream import FrameStream
from reference.collate import collate

LENGTHS = [7, 1, 23, 12, 5, 30, 18, 9]


def made(lengths: Iterable[int], dims: int = 3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Utterances whose targets number all frames, so that a batch tells which frames it holds."""
    features, targets, first = {}, {}, 0
    for n, frames in enumerate(lengths):
        rng = np.random.default_rng(n)
        features[f"u{n:02}"] = rng.standard_normal((frames, dims)).astype(np.float32)
        targets[f"u{n:02}"] = np.arange(first, first + frames)
        first += frames
    return features, targets


def stream(lengths: Iterable[int] = LENGTHS, **options: Any) -> FrameStream:
    chosen = {"context": (2, 1), "chunk": 6, "micro_frames": 40, "seed": 5, **options}
    return FrameStream(*made(lengths), **chosen)


def frames_in(batches: Iterable[Batch]) -> list[int]:
    return [t for batch in batches for t in batch.target.flatten().tolist() if t >= 0]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.inputs, y.inputs) and torch.equal(x.target, y.target) and x.frames == y.frames
        for x, y in zip(a, b, strict=True)
    )


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8)
chunk_sizes = st.one_of(st.none(), st.integers(1, 20))


@given(lengths=sizes, chunk=chunk_sizes, wanted=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_every_frame_once_per_epoch(lengths: list[int], chunk: int | None, wanted: int, seed: int) -> None:
    data = stream(lengths, chunk=chunk, seed=seed)
    seen: list[int] = []
    while len(seen) < 3 * data.total_frames:
        batches = data.draw(wanted)
        drawn = frames_in(batches)
        longest = max(lengths) if chunk is None else min(chunk, max(lengths))
        assert wanted <= len(drawn) < wanted + longest
        assert len(drawn) == sum(batch.frames for batch in batches)
        seen += drawn
        assert data.frames_seen == len(seen)
        assert data.epoch == len(seen) / data.total_frames
        counts = Counter(seen)
        complete = int(data.epoch)
        assert set(counts.values()) <= {complete, complete + 1}
        assert complete == 0 or len(counts) == sum(lengths)


@given(lengths=sizes, chunk=chunk_sizes, micro=st.integers(20, 50))
def test_minibatches_fit_and_equal_collate(lengths: list[int], chunk: int | None, micro: int) -> None:
    data = stream(lengths, chunk=chunk, micro_frames=micro)
    features, targets = made(lengths)
    owner = {t: (id, int(t - targets[id][0])) for id in targets for t in targets[id].tolist()}
    for batch in data.draw(data.total_frames):
        assert batch.target.numel() <= micro or len(batch.target) == 1
        examples, windows = [], []
        for row in batch.target:
            id, start = owner[int(row[0])]
            examples.append(Example(id, features[id], targets[id]))
            windows.append((start, start + int((row >= 0).sum())))
        assert same([batch], [collate(examples, 2, 1, windows=windows)])


def test_whole_utterances_of_similar_length_share_a_minibatch() -> None:
    lengths = list(np.random.default_rng(0).integers(10, 200, 300))
    batches = stream(lengths, chunk=None, micro_frames=1000).draw(sum(lengths))
    assert sum(batch.target.numel() for batch in batches) < 1.05 * sum(lengths)


@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=40), micro=st.sampled_from([500, 2000, 10_000]))
def test_minibatches_have_little_padding_and_none_is_made_in_vain(lengths: list[int], micro: int) -> None:
    batches = [frames_of(batch) for batch in stream(lengths, chunk=None, micro_frames=micro).everything()]
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert padding(batch) <= 512
        if following is not None:
            more = [*batch, max(following)]
            assert padding(more) > 512 or max(more) * len(more) > micro


def frames_of(batch: Batch) -> list[int]:
    """Of every utterance in a minibatch."""
    return (batch.target >= 0).sum(1).tolist()


def padding(lengths: list[int]) -> int:
    return max(lengths) * len(lengths) - sum(lengths)


def test_epochs_and_seeds_differ() -> None:
    total = sum(LENGTHS)
    # One item per minibatch shows the order: with equal lengths nothing is sorted.
    even = {"lengths": [6] * 20, "micro_frames": 6}
    first, second = stream(**even), stream(**{**even, "seed": 6})
    a, b = frames_in(first.draw(120)), frames_in(first.draw(120))
    assert sorted(a) == sorted(b) and a != b
    assert a != frames_in(second.draw(120)) and a == frames_in(stream(**even).draw(120))
    assert frames_in(stream().draw(total)) != list(range(total))


@settings(deadline=None)
@given(
    before=st.lists(st.integers(1, 90), max_size=4),
    after=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    chunk=chunk_sizes,
)
def test_resume_is_bit_identical(before: list[int], after: list[int], chunk: int | None) -> None:
    options = {"chunk": chunk, "transform": SpecAugment(1, 3, 1, 1)}
    whole = stream(**options)
    for frames in before:
        whole.draw(frames)
    state = whole.state_dict()
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    for restored in (json.loads(json.dumps(state)), torch.load(saved, weights_only=True)):
        resumed = stream(**{**options, "seed": 99})
        resumed.draw(17)
        resumed.load_state_dict(restored)
        assert (resumed.frames_seen, resumed.state_dict()) == (whole.frames_seen, state)
    for frames in after:
        assert same(whole.draw(frames), resumed.draw(frames))
    assert same(whole.sample(20, 3), resumed.sample(20, 3))


def test_transform_acts_on_draws_anew_each_time() -> None:
    plain, masked = stream([30]), stream([30], transform=SpecAugment(1, 5, 1, 2))
    first, second = masked.draw(30), masked.draw(30)
    assert not same(first, plain.draw(30))
    # With one utterance in one minibatch the two epochs differ in order and in masks.
    assert int((first[0].inputs == 0).sum()) > 0
    draws = (first, second, masked.draw(30), masked.draw(30))
    zeros = [int((batch.inputs == 0).sum()) for draw in draws for batch in draw]
    assert len(set(zeros)) > 1
    assert same(list(masked.everything()), list(plain.everything()))
    with pytest.raises(ValueError, match="keep the shape"):
        _ = stream(transform=lambda inputs, _: inputs[:, 1:]).draw(1)[0]


def test_samples_are_transformed_by_their_key_alone() -> None:
    plain, masked = stream(), stream(transform=SpecAugment(1, 5, 1, 2))
    first = masked.sample(60, 3)
    assert not same(first, plain.sample(60, 3))
    masked.draw(40)
    assert same(masked.sample(60, 3), first)

    seeds: list[int] = []

    def record(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return inputs

    data = stream(transform=record, micro_frames=10)
    minibatches = len(list(data.draw(60))) + sum(len(list(data.sample(60, key))) for key in range(3))
    assert minibatches > 3 and len(set(seeds)) == minibatches
    list(stream(transform=record, micro_frames=10, seed=6).sample(60, 0))
    assert len(set(seeds)) > minibatches


def test_a_draw_is_the_same_whenever_it_is_looked_at_and_keeps_one_minibatch() -> None:
    made: list[int] = []

    def record(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        made.append(generator.initial_seed())
        return inputs + torch.rand(inputs.shape, generator=generator)

    data = stream(transform=record, micro_frames=10)
    draw = data.draw(60)
    assert not made and len(draw) > 3
    first = list(draw)
    data.load_state_dict(data.state_dict() | {"seed": 12})
    assert same(draw, first) and same(draw[1:3], first[1:3]) and same([draw[-1]], first[-1:])
    made.clear()
    assert draw[-1] is draw[len(draw) - 1] and not made  # the last one looked at
    for place in (len(draw), -len(draw) - 1):
        with pytest.raises(IndexError, match=f"place={place}"):
            _ = draw[place]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_draw_comes_in_as_many_parts_as_are_wanted(ranks: int) -> None:
    shards = [stream([6] * 60, chunk=6, micro_frames=60, shard=(rank, ranks)) for rank in range(ranks)]
    together = [shard.draw(144) for shard in shards]
    apart = [shard.draw(144, 6) for shard in shards]
    assert sum(map(len, together)) < 6 == sum(map(len, apart))
    assert sum(batch.frames for draw in apart for batch in draw) == 144
    with pytest.raises(ValueError, match="parts is 0"):
        shards[0].draw(10, 0)


def test_parts_are_independent_draws() -> None:
    """The spread of a quantity that depends on the length: the estimate from the parts is right on average.

    Of minibatches of similar lengths it would be several times too large.
    """
    lengths = np.random.default_rng(0).integers(1, 40, 400).tolist()
    data = stream(lengths, chunk=None, micro_frames=10_000)
    means, estimates = [], []
    for _ in range(300):
        sums = [
            (sum(n * n for n in frames_of(batch)), float(sum(frames_of(batch)))) for batch in data.draw(600, parts=6)
        ]
        total = sum(frames for _, frames in sums)
        mean = sum(value for value, _ in sums) / total
        means.append(mean)
        spread = sum((value - frames * mean) ** 2 for value, frames in sums)
        estimates.append(len(sums) / (len(sums) - 1) * spread / total**2)
    assert np.mean(estimates) == pytest.approx(np.var(means), rel=0.25)


def test_every_minibatch_has_a_generator_of_its_own() -> None:
    seeds: list[int] = []

    def record(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return inputs

    data = stream(transform=record)
    minibatches = sum(len(list(data.draw(60))) for _ in range(5))
    assert minibatches > 5 and len(set(seeds)) == minibatches


@given(wanted=st.integers(1, 150), key=st.integers(0, 2**33), chunk=chunk_sizes)
def test_samples_do_not_move_the_stream(wanted: int, key: int, chunk: int | None) -> None:
    data = stream(chunk=chunk)
    data.draw(10)
    before = data.state_dict()
    sample = data.sample(wanted, key)
    assert data.state_dict() == before
    assert same(sample, stream(chunk=chunk).sample(wanted, key))
    frames = frames_in(sample)
    assert len(frames) == len(set(frames)) >= min(wanted, data.total_frames)
    if wanted >= data.total_frames:
        assert sorted(frames) == list(range(data.total_frames))


def test_samples_of_different_keys_and_the_draw_are_independent() -> None:
    data = stream([6] * 60, micro_frames=6)
    drawn = {tuple(frames_in(data.sample(60, key))) for key in range(20)}
    drawn.add(tuple(frames_in(data.draw(60))))
    assert len(drawn) == 21
    hits = Counter(t for key in range(300) for t in frames_in(data.sample(60, key)) if t % 6 == 0)
    assert len(hits) == 60 and max(hits.values()) < 2 * 50


def test_everything_is_everything_in_one_order() -> None:
    for chunk in (None, 6):
        data = stream(chunk=chunk)
        first = list(data.everything())
        data.draw(31)
        assert same(first, list(data.everything()))
        assert sorted(frames_in(first)) == list(range(data.total_frames))


@given(
    lengths=sizes,
    chunk=chunk_sizes,
    ranks=st.integers(1, 7),
    wanted=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    key=st.integers(0, 99),
)
def test_shards_make_up_what_one_rank_is_given(
    lengths: list[int], chunk: int | None, ranks: int, wanted: list[int], key: int
) -> None:
    whole = stream(lengths, chunk=chunk)
    shards = [stream(lengths, chunk=chunk, shard=(rank, ranks)) for rank in range(ranks)]
    longest = max(lengths) if chunk is None else min(chunk, max(lengths))

    def check(joint: list[Batch], parts: list[list[Batch]]) -> None:
        held = [frames_in(part) for part in parts]
        assert sorted(t for frames in held for t in frames) == sorted(frames_in(joint))
        fair = len(frames_in(joint)) / ranks
        assert all(abs(len(frames) - fair) <= longest for frames in held)

    for frames in wanted:
        check(whole.draw(frames), [shard.draw(frames) for shard in shards])
        check(whole.sample(frames, key), [shard.sample(frames, key) for shard in shards])
        assert all(shard.state_dict() == whole.state_dict() for shard in shards)
        assert all(shard.frames_seen == whole.frames_seen for shard in shards)
    assert same(list(shards[-1].everything()), list(whole.everything()))


@given(before=st.integers(1, 90), after=st.integers(1, 90), ranks=st.lists(st.integers(1, 5), min_size=2, max_size=2))
def test_resume_on_another_number_of_ranks(before: int, after: int, ranks: list[int]) -> None:
    shards = [stream(shard=(rank, ranks[0])) for rank in range(ranks[0])]
    for shard in shards:
        shard.draw(before)
    resumed = [stream(shard=(rank, ranks[1])) for rank in range(ranks[1])]
    for rank, shard in enumerate(resumed):
        shard.load_state_dict(shards[rank % ranks[0]].state_dict())
    expected = [t for shard in shards for t in frames_in(shard.draw(after))]
    assert sorted(t for shard in resumed for t in frames_in(shard.draw(after))) == sorted(expected)


@given(
    lengths=sizes,
    chunk=chunk_sizes,
    ranks=st.integers(1, 3),
    wanted=st.lists(st.integers(1, 150), min_size=1, max_size=8),
)
def test_a_rehearsal_tells_what_the_draws_will_hold(
    lengths: list[int], chunk: int | None, ranks: int, wanted: list[int]
) -> None:
    shards = [stream(lengths, chunk=chunk, shard=(rank, ranks)) for rank in range(ranks)]
    told = [list(map(shard.rehearsal(), wanted)) for shard in shards]
    assert all(shard.frames_seen == 0 for shard in shards)
    held = [sum(len(frames_in(shard.draw(frames))) for shard in shards) for frames in wanted]
    assert told == [held] * ranks
    assert list(map(shards[0].rehearsal(), wanted)) == held  # from the beginning, wherever the stream is


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_draw_of_one_frame_is_one_utterance(ranks: int) -> None:
    """With targets that cannot be cut; one rank has it, the others nothing."""
    features, classes = made(LENGTHS)
    targets = {id: tuple(target.tolist()) for id, target in classes.items()}
    shards = [
        FrameStream(features, targets, context=(2, 1), chunk=None, seed=5, shard=(rank, ranks)) for rank in range(ranks)
    ]
    for _ in range(2):  # epochs
        seen: list[Any] = []
        for _ in LENGTHS:
            batches = [batch for shard in shards for batch in shard.draw(1)]
            assert len(batches) == 1 and len(batches[0].target) == 1
            assert batches[0].frames == len(batches[0].target[0]) == batches[0].inputs.shape[1] - 3
            seen += batches[0].target
        assert sorted(seen) == sorted(targets.values())
    assert all(shard.epoch == 2.0 for shard in shards)


def test_equal_items_are_shared_evenly_and_few_leave_ranks_without() -> None:
    shards = [stream([6] * 20, shard=(rank, 5)) for rank in range(5)]
    assert [len(frames_in(shard.draw(120))) for shard in shards] == [24] * 5
    assert sorted(len(shard.draw(12)) for shard in shards) == [0, 0, 0, 1, 1]
    assert [len(frames_in(shard.draw(120))) for shard in shards] == [24] * 5


def test_ranks_transform_with_numbers_of_their_own() -> None:
    seeds: list[int] = []

    def record(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return inputs

    minibatches = 0
    for rank in range(3):
        shard = stream([6] * 30, micro_frames=12, transform=record, shard=(rank, 3))
        minibatches += sum(len(list(shard.draw(90))) for _ in range(3))
    assert minibatches > 9 and len(set(seeds)) == minibatches


def test_object_targets() -> None:
    class Alignment:
        def __init__(self, frames: int) -> None:
            self.frames = frames

        def __len__(self) -> int:
            return self.frames

    features, _ = made(LENGTHS)
    targets = {id: Alignment(len(rows)) for id, rows in features.items()}
    data = FrameStream(features, targets, context=(0, 0), chunk=None, micro_frames=64)
    batches = data.draw(data.total_frames)
    assert sorted(len(t) for batch in batches for t in batch.target) == sorted(LENGTHS)
    assert all(batch.frames == sum(len(t) for t in batch.target) for batch in batches)
    with pytest.raises(ValueError, match="chunk=None"):
        FrameStream(features, targets, context=(0, 0), chunk=5)


def test_memory_mapped_features_and_tensor_targets(tmp_path: Path) -> None:
    features, targets = made(LENGTHS)
    mapped = {}
    for id, rows in features.items():
        np.save(tmp_path / f"{id}.npy", rows)
        mapped[id] = np.load(tmp_path / f"{id}.npy", mmap_mode="r")
    tensors = {id: torch.from_numpy(target) for id, target in targets.items()}
    options = {"context": (2, 1), "chunk": 6, "micro_frames": 40, "seed": 5}
    assert same(FrameStream(mapped, tensors, **options).draw(60), stream().draw(60))


@pytest.mark.parametrize("as_objects", [False, True])
def test_targets_of_another_length_are_named(as_objects: bool) -> None:
    features, targets = made([10, 10, 10])
    targets["u00"], features["u01"] = targets["u00"][:8], features["u01"][:9]
    given = {id: target.tolist() for id, target in targets.items()} if as_objects else targets
    with pytest.raises(ValueError, match=r"2 utterances differ in frames .*: u00 \(10 and 8\), u01 \(9 and 10\)$"):
        FrameStream(features, given, context=(0, 0), chunk=None)


def test_bad_sets_are_named() -> None:
    features, targets = made([4, 6, 8])
    one = {"u00": features["u00"]}

    def refused(message: str, features: Any, targets: Any) -> None:
        with pytest.raises(ValueError, match=message):
            FrameStream(features, targets, context=(0, 0))

    refused("empty", {}, {})
    refused("2 utterances have targets but no features: u01, u02", one, targets)
    refused("have features but no targets: u01, u02", features, {"u00": targets["u00"]})
    refused("dimension", {**features, "u01": np.zeros((6, 5), np.float32)}, targets)
    refused(r"\[T, D\]", {"u00": np.zeros(4)}, {"u00": targets["u00"]})
    refused("no frames", {"u00": np.zeros((0, 3))}, {"u00": np.zeros(0, int)})
    refused("integers", one, {"u00": np.zeros(4)})
    refused("integers", one, {"u00": np.array(4)})
    refused("negative", one, {"u00": np.array([0, 1, -1, 2])})
    refused("mixes", features, {**targets, "u01": "abcdef"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": (-1, 0)}, "context"),
        ({"micro_frames": 0, "chunk": None}, "micro_frames"),
        ({"micro_frames": 5, "chunk": 6}, "chunk is 6"),
        ({"chunk": 0}, "chunk is 0"),
        ({"seed": -1}, "seed"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\)"),
        ({"shard": (0, 0)}, r"shard is \(0, 0\)"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(**options)


def test_bad_requests_are_named() -> None:
    data = stream()
    for frames in (0, -3):
        with pytest.raises(ValueError, match="frames is"):
            data.draw(frames)
        with pytest.raises(ValueError, match="frames is"):
            data.sample(frames, 0)
    with pytest.raises(ValueError, match="key"):
        data.sample(1, -1)


def test_a_state_of_another_stream_is_refused() -> None:
    state = stream().state_dict()
    with pytest.raises(ValueError, match="other utterances"):
        stream([*LENGTHS[:-1], 10]).load_state_dict(state)
    with pytest.raises(ValueError, match="chunk=6"):
        stream(chunk=7).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks position, seed"):
        stream().load_state_dict({k: v for k, v in state.items() if k not in ("seed", "position")})
    with pytest.raises(ValueError, match="damaged"):
        stream().load_state_dict({**state, "position": 10**6})


def test_a_long_utterance_has_its_own_minibatch() -> None:
    batches = stream([100, 10, 10], chunk=None, micro_frames=30).draw(120)
    assert [tuple(batch.target.shape) for batch in batches] == [(1, 100), (2, 10)]
