from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.automaton import Automaton
from quadric.lattice.labelled import LabelledAutomaton


def labelled() -> LabelledAutomaton:
    automaton = Automaton.from_arcs([(1, 1, 3, -0.7), (1, 0, 5, -np.inf), (0, 0, 2, 0.1)], final={0: -0.5}, start=1)
    return LabelledAutomaton(
        automaton, np.array([0, 2, 1], np.int32), np.array([1, 0, 4], np.int32), np.array([True, False, True])
    )


def test_a_file_holds_it_all(tmp_path: Path) -> None:
    graph = labelled()
    graph.save(tmp_path / "graph.npz")
    again = LabelledAutomaton.load(tmp_path / "graph.npz")
    for name in ("source", "target", "pdf", "weight", "final"):
        before, after = getattr(graph.automaton, name), getattr(again.automaton, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert again.automaton.start == 1 and type(again.automaton.start) is int
    for name in ("word", "phone", "begins"):
        np.testing.assert_array_equal(getattr(again, name), getattr(graph, name))
    assert (again.num_states, again.num_arcs, again.num_pdfs) == (2, 3, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["graph.npz"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        LabelledAutomaton.load(tmp_path / "absent.npz")
    labelled().save(tmp_path / "graph.npz")
    content = (tmp_path / "graph.npz").read_bytes()
    for damaged in (b"text", content[:200], content[:-30], content[:100] + b"\0" * 30 + content[130:]):
        (tmp_path / "graph.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a file that LabelledAutomaton\.save wrote"):
            LabelledAutomaton.load(tmp_path / "graph.npz")
    np.savez(tmp_path / "other.npz", word=np.zeros(3))
    with pytest.raises(ValueError, match="is not a file that"):
        LabelledAutomaton.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"word": np.zeros(2, np.int32)}, "word has 2 entries; the automaton has 3 arcs"),
        ({"begins": np.zeros(3, np.int32)}, "begins must be a one-dimensional bool"),
        ({"phone": np.array([0, -1, 0], np.int32)}, "phone must not be negative, found -1"),
        ({"word": np.array([0, -2, 0], np.int32)}, "word must not be negative, found -2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(labelled(), **change)
