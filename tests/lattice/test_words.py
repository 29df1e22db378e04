from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.generate import LatticeOptions
from quadric.lattice.lattice import Lattice
from quadric.lattice.words import best_words, oracle_errors
from reference.levenshtein import edit_distance
from reference.searches import lattice_paths, score, searched_lattice


@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(1, 6),
    words=st.lists(st.integers(0, 4), max_size=6),
)
def test_words_are_those_of_the_list_of_paths(seed: int, frames: int, words: list[int]) -> None:
    rng = np.random.default_rng(seed)
    lattice = searched_lattice(rng, frames, LatticeOptions(20.0, 3.0))
    scores = rng.normal(size=(frames, 4))
    scores[rng.integers(frames), rng.integers(4)] = -np.inf
    said = {path: tuple(step[1] for step in path[0] if step[1]) for path in lattice_paths(lattice)}
    # No label of a path is 0: the word that is not in the list is always wrong.
    assert oracle_errors(lattice, words) == min(edit_distance(words, heard) for heard in set(said.values()))
    totals = {path: score(*path, scores) for path in said}
    best = max(totals.values())
    assert best_words(lattice, scores) in {said[path] for path, x in totals.items() if x >= best - 1e-9}


def test_misuse() -> None:
    lattice = Lattice.from_arcs([(0, 1, 2), (1, 2, 0)], final={2: 0.0}, word=[3, 0])
    assert best_words(lattice, np.zeros((2, 3))) == (3,)
    assert best_words(lattice, np.full((2, 3), -np.inf)) == (3,)
    assert [oracle_errors(lattice, words) for words in ((), (3,), (2,), (3, 3, 1))] == [1, 0, 1, 2]
    for wrong in (np.zeros((3, 3)), np.zeros((2, 2)), np.zeros(2)):
        with pytest.raises(ValueError, match="the lattice has 2 frames and emits pdf 2"):
            best_words(lattice, wrong)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="neither NaN"):
            best_words(lattice, np.full((2, 3), bad))
    with pytest.raises(ValueError, match="label -1"):
        oracle_errors(lattice, [1, -1])
