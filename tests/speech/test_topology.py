from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadric.speech.topology import STATES, Tying, monophone, phone_segments

PHONES = ("SIL", "A", "B")


def triphone(seed: int = 0, *, classes: int = 2) -> Tying:
    """Every state splits its contexts at random."""
    rng = np.random.default_rng(seed)
    table = np.empty((3, 3, 3, STATES), np.int64)
    first = 0
    for phone, state in product(range(3), range(STATES)):
        table[phone, :, :, state] = first + np.unique(rng.integers(classes, size=9), return_inverse=True)[1].reshape(
            3, 3
        )
        first = table[phone, :, :, state].max() + 1
    return Tying(PHONES, 3, table.astype(np.int32))


def test_monophones() -> None:
    tying = monophone(("A", "B"))
    assert tying.phones == PHONES
    assert tying.num_pdfs == 9
    assert [tying.pdfs((phone,)) for phone in range(3)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert tying.state_of_pdf.tolist() == [0, 1, 2] * 3


def test_owners_and_windows_of_triphones() -> None:
    tying = triphone()
    for left, centre, right in product(range(3), repeat=3):
        pdfs = tying.pdfs((left, centre, right))
        assert pdfs == tuple(tying.table[centre, left, right])
        assert tying.phone_of_pdf[list(pdfs)].tolist() == [centre] * STATES
        assert tying.state_of_pdf[list(pdfs)].tolist() == list(range(STATES))


@pytest.mark.parametrize("window", [(1,), (0, 1, 3), (-1, 0, 0), (0, 0)])
def test_a_wrong_window_is_refused(window: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="window="):
        triphone().pdfs(window)


@pytest.mark.parametrize("tying", [monophone(("A", "B")), triphone()], ids=["mono", "tri"])
def test_saved_and_loaded(tmp_path: Path, tying: Tying) -> None:
    tying.save(tmp_path / "tying.npz")
    loaded = Tying.load(tmp_path / "tying.npz")
    assert (loaded.phones, loaded.context) == (tying.phones, tying.context)
    assert np.array_equal(loaded.table, tying.table)
    assert loaded.table.dtype == np.int32
    assert [path.name for path in tmp_path.iterdir()] == ["tying.npz"]


def test_loading_what_is_no_tying(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Tying.load(tmp_path / "absent.npz")
    for name, content in (("text.npz", b"no arrays"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"not a file that Tying\.save wrote"):
            Tying.load(tmp_path / name)
    np.savez(tmp_path / "other.npz", phones=np.array(PHONES))
    with pytest.raises(ValueError, match=r"not a file that Tying\.save wrote"):
        Tying.load(tmp_path / "other.npz")


def table_with(change: tuple[tuple[int, ...], int]) -> np.ndarray:
    table = monophone(("A", "B")).table.copy()
    index, value = change
    table[index] = value
    return table


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phones": ("A", "SIL", "B")}, "must begin with SIL"),
        ({"phones": ("SIL", "A", "A")}, "A more than once"),
        ({"context": 2}, "context=2"),
        ({"context": 3}, "shape"),
        ({"table": np.zeros((3, 1, 1, 3))}, "integers"),
        ({"table": table_with(((2, 0, 0, 2), 9))}, "renumber"),
        ({"table": table_with(((1, 0, 0, 0), -1))}, "renumber"),
        ({"table": np.minimum(monophone(("A", "B")).table, 7)}, "shares pdf 7"),
    ],
)
def test_a_wrong_tying_is_refused(fields: dict, message: str) -> None:
    right = {"phones": PHONES, "context": 1, "table": monophone(("A", "B")).table}
    with pytest.raises(ValueError, match=message):
        Tying(**{**right, **fields})


def test_the_table_cannot_be_changed() -> None:
    table = monophone(("A",)).table.copy()
    tying = Tying(("SIL", "A"), 1, table)
    table[:] = 0
    assert tying.num_pdfs == 6
    with pytest.raises(ValueError, match="read-only"):
        tying.table[0] = 1


@given(
    phones=st.lists(st.integers(0, 2), max_size=6),
    durations=st.lists(st.integers(1, 3), min_size=18, max_size=18),
    seed=st.integers(0, 3),
)
def test_segments_are_the_phones_that_were_said(phones: list[int], durations: list[int], seed: int) -> None:
    tying = triphone(seed)
    padded = [0, *phones, 0]
    pdfs: list[int] = []
    ends = [0]
    for i in range(len(phones)):
        states = tying.pdfs(padded[i : i + 3])
        for state, pdf in enumerate(states):
            pdfs += [pdf] * durations[STATES * i + state]
        ends.append(len(pdfs))
    expected = list(zip(phones, ends[:-1], ends[1:], strict=True))
    assert phone_segments(np.array(pdfs, np.int64), tying) == expected


def test_segments_of_impossible_pdfs_are_refused() -> None:
    with pytest.raises(ValueError, match="pdfs 0 to 5"):
        phone_segments(np.array([0, 6]), monophone(("A",)))
    with pytest.raises(ValueError, match="integers"):
        phone_segments(np.array([0.0]), monophone(("A",)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    monophone(("AH", "T")).save(tmp_path / "tying.npz")
    whole = (tmp_path / "tying.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"torn\.npz' is not a file that Tying\.save wrote"):
        Tying.load(tmp_path / "torn.npz")
