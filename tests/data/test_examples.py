"""Streams of examples: every one once a pass, the same whatever the sizes of the draws, shared out among ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.data.examples import ExampleStream, WholeStream


def stream(count: int = 10, **options: Any) -> ExampleStream:
    return ExampleStream(torch.arange(float(count)).unsqueeze(1), torch.arange(count), **options)


def drawn(source: ExampleStream, frames: int, parts: int = 1) -> list[int]:
    found: list[int] = []
    for batch in source.draw(frames, parts):
        assert batch.frames == len(batch.inputs) == len(batch.target)
        assert torch.equal(batch.inputs.squeeze(1).long(), batch.target)
        found += batch.target.tolist()
    return found


@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=8), seed=st.integers(0, 5))
def test_each_pass_shows_each_example_once_whatever_the_draws(sizes: list[int], seed: int) -> None:
    source, single = stream(seed=seed), stream(seed=seed)
    found = [x for size in sizes for x in drawn(source, size)]
    assert len(found) == sum(sizes) == source.frames_seen
    assert source.epoch == sum(sizes) / 10
    for start in range(0, len(found) - 9, 10):
        assert sorted(found[start : start + 10]) == list(range(10))
    assert found == [x for _ in found for x in drawn(single, 1)]


def test_passes_and_seeds_differ() -> None:
    source = stream(50)
    first, second, other = drawn(source, 50), drawn(source, 50), drawn(stream(50, seed=1), 50)
    assert first != second and first != other and first != list(range(50))


def test_a_stream_goes_on_from_its_state() -> None:
    source = stream(seed=4)
    drawn(source, 13)
    other = stream(seed=0)
    other.load_state_dict(source.state_dict())
    assert drawn(other, 20) == drawn(source, 20)


def test_a_sample_is_its_key_s_and_moves_nothing() -> None:
    source = stream(50)
    samples = [[x for batch in source.sample(8, key) for x in batch.target.tolist()] for key in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2] and source.frames_seen == 0
    assert len(set(samples[0])) == 8
    assert sorted(x for batch in source.sample(99, 3) for x in batch.target.tolist()) == list(range(50))


@given(ranks=st.integers(1, 5), frames=st.integers(1, 30))
def test_ranks_share_what_one_rank_would_be_given(ranks: int, frames: int) -> None:
    shares = [drawn(stream(shard=(rank, ranks)), frames) for rank in range(ranks)]
    assert [x for share in shares for x in share] == drawn(stream(), frames)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    everything = [
        [x for batch in stream(micro=3).everything((rank, ranks)) for x in batch.target.tolist()]
        for rank in range(ranks)
    ]
    assert sorted(x for part in everything for x in part) == list(range(10))


def test_a_draw_comes_in_parts() -> None:
    assert [len(batch.target) for batch in stream().draw(10, 3)] == [4, 4, 2]
    assert [len(batch.target) for batch in stream(micro=4).draw(10)] == [4, 4, 2]


@pytest.mark.parametrize(("parts", "expected"), [(4, [5, 5]), (3, [5, 5]), (5, [4, 4, 2]), (2, [10]), (1, [10])])
def test_ranks_make_a_draw_s_parts_between_them(parts: int, expected: list[int]) -> None:
    for rank in range(2):
        draw = stream(20, shard=(rank, 2)).draw(20, parts)
        assert [len(batch.target) for batch in draw] == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_change_is_by_the_generator_of_its_purpose_and_place(rank: int) -> None:
    """The keys are what trainings can be repeated by: a draw's is (2, epoch, position, i), a sample's (3, key, i)."""

    def number(*key: int) -> float:
        state = int(np.random.SeedSequence(5, spawn_key=key).generate_state(1, np.uint64)[0])
        return float(torch.rand((), generator=torch.Generator().manual_seed(state)))

    def change(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros_like(x) + torch.rand((), generator=generator)

    source = stream(10, change=change, micro=2, seed=5, shard=(rank, 2))
    source.draw(13)
    for made, place in ((source.draw(6), (2, 1, 3)), (source.sample(6, key=7), (3, 7))):
        assert [batch.inputs[0].item() for batch in made] == [number(*place, i * 2 + rank) for i in range(2)]


def test_inputs_are_changed_where_they_are_drawn_and_prepared_everywhere() -> None:
    def change(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x + 1000 * torch.randint(1, 9, x.shape, generator=generator)

    def source() -> ExampleStream:
        return ExampleStream(torch.arange(6.0), change=change, prepare=lambda x: x + 0.5)

    one, again = source(), source()
    (batch,), (same,) = one.draw(6), again.draw(6)
    assert torch.equal(batch.inputs, same.inputs) and torch.equal(batch.inputs, batch.target)
    assert bool((batch.inputs >= 1000.5).all())
    assert not torch.equal(batch.inputs.sort().values, one.draw(6)[0].inputs.sort().values)
    (plain,) = one.everything()
    assert plain.inputs.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_one_piece_is_drawn_whole() -> None:
    x, target = torch.zeros(3, 2), torch.tensor([1, -1, 0])
    source = WholeStream(x, target, 2)
    (batch,) = source.draw(1, parts=4)
    assert batch.inputs is x and batch.target is target and batch.frames == 2
    (same,) = source.sample(1, 7)
    assert same.inputs is x and source.frames_seen == 2 and source.epoch == 1.0
    other = WholeStream(x, target, 2)
    other.load_state_dict(source.state_dict())
    assert other.frames_seen == 2
    assert [len(list(source.everything((rank, 3)))) for rank in range(3)] == [1, 0, 0]
    with pytest.raises(ValueError, match="state was taken over other targets"):
        WholeStream(x, torch.tensor([1, 1, 0]), 3).load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": torch.zeros(0, 2)}, "inputs is empty"),
        ({"targets": torch.zeros(3)}, "targets has 3 rows, inputs 4"),
        ({"micro": 0}, "micro=0"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_is_no_stream_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleStream(**{"inputs": torch.zeros(4, 2)} | options)


def test_draws_of_nothing_are_refused() -> None:
    source, whole = stream(), WholeStream(torch.zeros(1, 1), torch.zeros(1), 1)
    for wrong in (lambda: source.draw(0), lambda: source.sample(0, 1), lambda: whole.draw(0)):
        with pytest.raises(ValueError, match="ask for at least one"):
            wrong()
    with pytest.raises(ValueError, match="key is -1"):
        source.sample(1, -1)
    with pytest.raises(ValueError, match="parts is 0"):
        source.draw(1, 0)
    with pytest.raises(ValueError, match="frames=0"):
        WholeStream(torch.zeros(1, 1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="state lacks seed"):
        source.load_state_dict({"epoch": 0, "position": 0, "examples": 10})
    with pytest.raises(ValueError, match="over 10 examples, here are 3"):
        stream(3).load_state_dict(source.state_dict())
