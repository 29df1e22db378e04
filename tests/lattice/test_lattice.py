from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.lattice import Lattice, StatePath


def diamond() -> Lattice:
    arcs = [(2, 3, 6), (0, 1, 5), (0, 2, 6), (1, 3, 5)]
    return Lattice.from_arcs(
        arcs, final={3: -0.5}, weight=[-4.0, -1.0, -2.0, -3.0], word=[0, 1, 2, 0], begins=[False, True, True, False]
    )


def test_arcs_are_sorted_with_what_belongs_to_them() -> None:
    lattice = diamond()
    assert lattice.source.tolist() == [0, 0, 1, 2]
    assert lattice.weight.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert lattice.word.tolist() == [1, 2, 0, 0]
    assert lattice.begins.tolist() == [True, True, False, False]
    assert lattice.frames.tolist() == [0, 2, 4]
    assert lattice.levels.tolist() == [0, 1, 3, 4]
    assert lattice.frame.tolist() == [0, 0, 1, 1]
    assert (lattice.num_pdfs, lattice.density, len(lattice)) == (7, 2.0, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pdf": np.zeros(4)}, "pdf must be a one-dimensional int32"),
        ({"pdf": np.zeros(3, np.int32)}, "lengths"),
        ({"pdf": np.array([0, 0, -1, 0], np.int32)}, "pdf must not be negative"),
        ({"weight": np.array([0, 0, -np.inf, 0], np.float32)}, "weight must hold finite"),
        ({"final": np.array([np.nan])}, "final must hold finite"),
        ({"frames": np.array([0, 2, 3])}, "frames must ascend"),
        ({"frames": np.array([0, 0, 4])}, "frames must ascend"),
        ({"source": np.array([0, 0, 2, 1], np.int32)}, "source must ascend"),
        ({"target": np.array([1, 3, 3, 3], np.int32)}, "target must hold states of its frame"),
        ({"target": np.array([1, 1, 3, 3], np.int32)}, "on a path"),
        ({"source": np.array([0, 0, 1, 1], np.int32)}, "on a path"),
        ({"target": np.array([1, 2, 3, 3], np.int32)[::1], "source": np.array([0, 0, 1, 2], np.int64)}, "source must"),
    ],
)
def test_arrays_that_are_no_lattice_are_refused(change: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(diamond(), **change)


def test_a_lattice_without_arcs_or_with_other_final_states_is_refused() -> None:
    with pytest.raises(ValueError, match="arcs is empty"):
        Lattice.from_arcs([], final={})
    with pytest.raises(ValueError, match=r"last states \[1\]"):
        Lattice.from_arcs([(0, 1, 0)], final={0: 0.0})


def test_a_path_says_how_many_phones_it_has() -> None:
    pdf, phone = np.array([0, 1, 0], np.int32), np.zeros(3, np.int32)
    assert StatePath(pdf, phone, np.array([True, False, True])).num_phones == 2
    with pytest.raises(ValueError, match="first frame begins"):
        StatePath(pdf, phone, np.array([False, False, True]))
    with pytest.raises(ValueError, match="one entry per frame"):
        StatePath(pdf, phone, np.array([True]))
