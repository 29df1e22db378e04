"""Messages travel without copies, and refuse to be what they cannot be."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
from quadric.comm.message import Factors, Halves, Message, Signs, Sparse

int32, float32, uint8, uint16 = np.int32, np.float32, np.uint8, np.uint16


@pytest.fixture(params=cases.MESSAGES.values(), ids=lambda build: build().__class__.__name__)
def message(request: pytest.FixtureRequest) -> Message:
    built: Message = request.param()
    return built


def test_what_it_adds_is_what_it_means(message: Message) -> None:
    dense = message.dense()
    for dtype in (torch.float32, torch.float64):
        base = torch.randn(message.length, dtype=dtype)
        out = base.clone()
        message.add_to(out, -0.5)
        torch.testing.assert_close(out, base - 0.5 * dense.to(dtype), rtol=0, atol=1e-6)
    assert bool((dense != 0).any()) and message.finite


def test_it_adds_to_a_part_of_a_vector(message: Message) -> None:
    whole = torch.zeros(2, message.length + 4)
    message.add_to(whole[1, 2:-2])
    assert torch.equal(whole[1, 2:-2], message.dense())
    assert not bool(whole[0].any() or whole[1, :2].any() or whole[1, -2:].any())


def test_it_fits_only_its_own_length(message: Message) -> None:
    n = message.length
    for wrong in (torch.zeros(n + 1), torch.zeros(1, n), torch.zeros(n, dtype=torch.int32)):
        with pytest.raises(ValueError, match=f"this message is of {n} floating-point numbers"):
            message.add_to(wrong)


def test_its_arrays_travel_beside_the_pickle_and_need_not_be_written(message: Message) -> None:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    arrays = [a for a in vars(message).values() if isinstance(a, np.ndarray) and a.size]
    assert sum(buffer.raw().nbytes for buffer in buffers) == message.nbytes
    assert len(data) < 600
    found = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
    assert type(found) is type(message) and found.nbytes == message.nbytes and found.finite
    assert torch.equal(found.dense(), message.dense())
    assert arrays


def test_what_is_unpickled_is_checked() -> None:
    damaged = Sparse(4, np.array([1, 3], int32), np.ones(2, float32))
    damaged.indices[1] = 4
    with pytest.raises(ValueError, match="indices go from 1 to 4"):
        pickle.loads(pickle.dumps(damaged))


def test_numbers_that_are_not_finite_are_seen(message: Message) -> None:
    message.numbers().fill_(torch.nan)
    assert not message.finite
    message.numbers().fill_(torch.inf)
    assert not message.finite


WRONG: dict[str, tuple[type[Message], dict[str, Any], str]] = {
    "an index below": (Sparse, {"indices": np.array([-1, 3], int32)}, "indices go from -1 to 3"),
    "an index above": (Sparse, {"indices": np.array([0, 7], int32)}, "indices go from 0 to 7: the vector has 7"),
    "too few values": (Sparse, {"values": np.ones(1, float32)}, "values has 1 entries: .* are 2"),
    "long indices": (Sparse, {"indices": np.array([1, 3])}, "indices is int64"),
    "double values": (Sparse, {"values": np.ones(2)}, "values is float64"),
    "no array": (Sparse, {"values": [1.0, 2.0]}, "values is list"),
    "a matrix": (Sparse, {"values": np.ones((2, 1), float32)}, "values is float32"),
    "gaps": (Sparse, {"values": np.ones(4, float32)[::2]}, "values has gaps"),
    "a negative length": (Sparse, {"size": -1}, "size is -1"),
    "a length that is no number": (Sparse, {"size": 7.0}, "size is 7.0"),
    "a place beyond its bin": (Signs, {"offsets": np.array([0, 4, 1, 0], uint8)}, "outside its bin"),
    "a place beyond the last, shorter bin": (Signs, {"offsets": np.array([0, 3, 1, 1], uint8)}, "outside its bin"),
    "more counted than there": (Signs, {"counts": np.array([1, 2, 2], uint8)}, "offsets has 4 entries: .* are 5"),
    "bins missing": (Signs, {"counts": np.array([2, 2], uint8)}, "counts has 2 entries: .* are 3"),
    "wide counts": (Signs, {"counts": np.array([1, 2, 1], uint16)}, "counts is uint16"),
    "bits missing": (Signs, {"signs": np.zeros(0, uint8)}, "signs has 0 entries"),
    "bins of nothing": (Signs, {"bins": np.array([0, 2], int32)}, "sizes or bins"),
    "a layer of less than nothing": (Signs, {"sizes": np.array([-5, 2], int32)}, "sizes or bins"),
    "huge layers": (Signs, {"sizes": np.array([2**31 - 1] * 2, int32)}, "counts has 3 entries"),
    "a scale missing": (Signs, {"scales": np.ones(1, float32)}, "scales has 1 entries"),
    "another kind": (Halves, {"kind": "float8"}, "kind is 'float8'"),
    "signed bits": (Halves, {"bits": np.zeros(3, np.int16)}, "bits is int16"),
    "values missing": (Factors, {"values": np.ones(8, float32)}, "values has 8 entries: .* are 9"),
    "a negative rank": (Factors, {"shapes": np.array([[3, 4, -1], [1, 2, 0]], int32)}, "none negative"),
    "pairs for triples": (Factors, {"shapes": np.array([[3, 4]], int32)}, "rows, columns and rank"),
    "huge tensors": (Factors, {"shapes": np.array([[2**31 - 1] * 3] * 9, int32)}, "values has 9 entries"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_is_refused(wrong: str) -> None:
    kind, changed, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        replace(cases.MESSAGES[kind](), **changed)


@given(st.binary(max_size=60))
def test_signs_from_any_bytes_are_refused_or_stay_within_the_vector(data: bytes) -> None:
    sizes, bins = [5, 300, 1], [4, 256, 1]
    try:
        message, rest = Signs.from_bytes(np.frombuffer(data, uint8), sizes, bins)
    except ValueError:
        return
    around = torch.zeros(306 + 20, dtype=torch.float64)
    message.add_to(around[10:-10])
    assert not bool(around[:10].any() or around[-10:].any())
    assert len(rest) + len(message.to_bytes()) == len(data)


def test_signs_go_through_bytes_one_after_the_other() -> None:
    first, second = cases.MESSAGES[Signs](), Signs(
        np.array([600], int32), np.array([500], int32), np.array([2.0], float32),
        np.array([1, 2], uint16), np.array([499, 0, 99], uint16), np.array([0b01000000], uint8),
    )  # fmt: skip
    assert isinstance(first, Signs)
    data = np.concatenate([first.to_bytes(), second.to_bytes()])
    found, rest = Signs.from_bytes(data, first.sizes.tolist(), first.bins.tolist())
    assert torch.equal(found.dense(), first.dense())
    found, rest = Signs.from_bytes(rest, [600], [500])
    assert torch.equal(found.dense(), second.dense()) and not len(rest)
    assert second.dense().nonzero()[:, 0].tolist() == [499, 500, 599]
    assert second.dense()[[499, 500, 599]].tolist() == [2.0, -2.0, 2.0]
    with pytest.raises(ValueError, match="bytes too early"):
        Signs.from_bytes(data[:-1][len(first.to_bytes()) :], [600], [500])


def test_places_in_short_bins_take_one_byte() -> None:
    for bin, kind in ((255, uint8), (256, uint16)):
        signs = Signs(np.array([256], int32), np.array([bin], int32), np.ones(1, float32),
                      np.array([1, 0] if bin == 255 else [1], kind), np.array([bin - 1], kind),
                      np.zeros(1, uint8))  # fmt: skip
        assert signs.dense().nonzero().item() == bin - 1


def test_bytes_are_counted_and_nothing_else() -> None:
    assert cases.MESSAGES[Sparse]().nbytes == 2 * (4 + 4)
    assert cases.MESSAGES[Signs]().nbytes == 2 * (4 + 4 + 4) + 3 + 4 + 1
    assert cases.MESSAGES[Halves]().nbytes == 3 * 2
    assert cases.MESSAGES[Factors]().nbytes == 2 * 3 * 4 + (3 + 4 + 2) * 4
