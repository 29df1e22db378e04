from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Matrix
from quadric.linalg.pairs import LastPairs, Pair, PairSelection, SpreadPairs
from quadric.linalg.truncation import Residual
from reference import dense


def offered(selection: PairSelection, run: int) -> list[tuple[int, ...]]:
    """The steps held after every step of a run."""
    held: tuple[Pair, ...] = ()
    steps = []
    for step in range(1, run + 1):
        held = selection.keep(held, Pair(step, torch.ones(1), torch.ones(1)))
        steps.append(tuple(pair.step for pair in held))
    return steps


@pytest.mark.parametrize("make", cases.PAIR_SELECTIONS.values(), ids=[cls.__name__ for cls in cases.PAIR_SELECTIONS])
@pytest.mark.parametrize("memory", [1, 2, 5])
def test_the_memory_is_full_as_soon_as_it_can_be_and_never_over(make: type[PairSelection], memory: int) -> None:
    assert [len(steps) for steps in offered(make(memory), 40)] == [min(i, memory) for i in range(1, 41)]
    assert all(steps == tuple(sorted(steps)) for steps in offered(make(memory), 40))


@pytest.mark.parametrize("make", cases.PAIR_SELECTIONS.values(), ids=[cls.__name__ for cls in cases.PAIR_SELECTIONS])
def test_misuse_is_explained(make: type[PairSelection]) -> None:
    with pytest.raises(ValueError, match=r"memory=0: at least one pair.*pairs=None"):
        make(0)


def test_the_last() -> None:
    assert offered(LastPairs(3), 7)[-1] == (5, 6, 7)


@given(memory=st.integers(2, 20), run=st.integers(1, 200))
def test_spread_pairs_leave_gaps_of_one_width_and_its_double(memory: int, run: int) -> None:
    """So no part of the run is without pairs, and what is not covered at its end is no wider either."""
    steps = offered(SpreadPairs(memory), run)[-1]
    assert steps[0] == 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    if run <= memory:
        assert steps == tuple(range(1, run + 1))
        return
    narrow = min(gaps)
    assert narrow & (narrow - 1) == 0
    assert set(gaps) <= {narrow, 2 * narrow}
    assert run - steps[-1] < 2 * narrow


def test_a_run_holds_no_more_than_selected() -> None:
    """What the solver lets go of is freed."""
    alive: list[int] = []

    class Watching(Matrix):
        def apply(self, v: torch.Tensor) -> torch.Tensor:
            product = super().apply(v)
            alive.append(sum(reference() is not None for reference in references))
            references.append(weakref.ref(product))
            return product

    references: list[weakref.ref[torch.Tensor]] = []
    A, b = dense.random_spd(60, condition=1e6), cases.draw(60)
    path = ConjugateGradient(40, Residual(0.0), pairs=LastPairs(3)).solve(Watching(A), b)
    assert path.steps == 40 and max(alive) <= 4


def test_inner_products_of_a_pair() -> None:
    pair = Pair(1, torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
    assert (pair.ss, pair.sy, pair.yy) == (5.0, 1.0, 10.0)
