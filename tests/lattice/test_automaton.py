from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.automaton import Automaton


def arrays(**changes: object) -> dict[str, object]:
    """Three states in a row, each with a self loop; ``changes`` break it."""
    fields: dict[str, object] = {
        "source": np.array([0, 0, 1, 1], np.int32),
        "target": np.array([0, 1, 1, 2], np.int32),
        "pdf": np.array([0, 0, 4, 4], np.int32),
        "weight": np.log(np.full(4, 0.5)),
        "final": np.array([-np.inf, -np.inf, 0.0]),
        "start": 0,
    }
    return fields | changes


def test_fields_describe_themselves() -> None:
    automaton = Automaton(**arrays())  # type: ignore[arg-type]
    assert (automaton.num_states, automaton.num_arcs, automaton.num_pdfs) == (3, 4, 5)
    assert automaton.offsets.tolist() == [0, 2, 4, 4]
    assert automaton.min_frames == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": np.array([0, 0, 1, 1])}, "source must be a one-dimensional int32"),
        ({"source": [0, 0, 1, 1]}, "not list"),
        ({"weight": np.zeros(4, np.float32)}, "weight must be a one-dimensional float64"),
        ({"weight": np.zeros((2, 2))}, r"shape \(2, 2\)"),
        ({"weight": np.zeros(8)[::2]}, "weight must be contiguous"),
        ({"pdf": np.zeros(3, np.int32)}, "one entry per arc"),
        ({"pdf": np.array([0, 0, -1, 0], np.int32)}, "remove epsilon arcs"),
        ({"source": np.array([0, 1, 0, 1], np.int32)}, "source must ascend"),
        ({"target": np.array([0, 1, 1, 3], np.int32)}, "target must hold states 0 to 2"),
        ({"target": np.array([0, 1, 1, -1], np.int32)}, "target must hold states 0 to 2"),
        ({"start": 3}, "start=3"),
        ({"weight": np.array([0.0, np.nan, 0.0, 0.0])}, "weight must hold log weights"),
        ({"final": np.array([0.0, np.inf, 0.0])}, "final must hold log weights"),
        ({"final": np.full(3, -np.inf)}, "no path can end"),
    ],
)
def test_misuse_names_the_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Automaton(**arrays(**changes))  # type: ignore[arg-type]


def test_from_arcs_sorts_and_keeps_parallel_arcs() -> None:
    automaton = Automaton.from_arcs([(1, 1, 2, -3.0), (0, 1, 1, -1.0), (0, 1, 0, -2.0)], final={1: -0.5})
    assert automaton.source.tolist() == [0, 0, 1]
    assert automaton.pdf.tolist() == [1, 0, 2]
    assert automaton.weight.tolist() == [-1.0, -2.0, -3.0]
    assert automaton.final.tolist() == [-np.inf, -0.5]


def test_min_frames_takes_the_shortest_way_and_no_forbidden_arc() -> None:
    short = [(0, 1, 0, 0.0), (1, 2, 0, 0.0), (2, 3, 0, 0.0), (0, 2, 0, 0.0)]
    assert Automaton.from_arcs(short, final={3: 0.0}).min_frames == 2
    assert Automaton.from_arcs([*short[:3], (0, 2, 0, -np.inf)], final={3: 0.0}).min_frames == 3
    assert Automaton.from_arcs([], final={0: 0.0}).min_frames == 0


def test_min_frames_of_an_unreachable_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="no final state can be reached"):
        _ = Automaton.from_arcs([(1, 2, 0, 0.0)], final={2: 0.0}).min_frames


def test_survives_pickling_without_its_caches() -> None:
    automaton = Automaton(**arrays())  # type: ignore[arg-type]
    assert automaton.min_frames == 2
    copy = pickle.loads(pickle.dumps(automaton))
    assert "min_frames" not in vars(copy)
    assert copy.min_frames == 2
    assert np.array_equal(copy.weight, automaton.weight)
