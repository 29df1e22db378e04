"""Backtracking on functions of one number, where every right answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from quadric.linalg.operator import Identity
from quadric.linalg.solver import Iterate, Path
from quadric.optim.descent import LocalModel
from quadric.optim.search import Backtracking, BestIterate, Candidates, Step
from quadric.outcome import Outcome


def local(f: Callable[[float], float], theta: float, gradient: float) -> LocalModel:
    point, slope = torch.tensor([theta], dtype=torch.float64), torch.tensor([gradient], dtype=torch.float64)
    return LocalModel(point, f(theta), slope, Identity(1))


def path(*points: float, first_step: int = 1) -> Path:
    vectors = [torch.tensor([x], dtype=torch.float64) for x in points]
    return Path(tuple(Iterate(first_step + i, x, -1.0, 1.0) for i, x in enumerate(vectors)), Outcome.TRUNCATED)


class Recorded:
    """A function of one number that remembers where it was asked."""

    def __init__(self, f: Callable[[float], float]) -> None:
        self.f, self.asked = f, list[float]()

    def __call__(self, theta: torch.Tensor) -> float:
        self.asked.append(float(theta))
        return self.f(float(theta))


def parabola(x: float) -> float:
    return (x - 3.0) ** 2


@pytest.mark.parametrize(
    ("points", "index", "asked"),
    [
        ((1.0, 2.0, 3.0), 2, [3.0, 2.0]),  # the last is best: one look back
        ((1.0, 3.0, 5.0, 7.0), 1, [7.0, 5.0, 3.0, 1.0]),  # back while it improves
        ((3.0, 6.5, 6.0), 2, [6.0, 6.5]),  # stops at the first that does not improve, as in the paper
        ((2.0,), 0, [2.0]),
    ],
)
def test_walks_back_while_the_objective_improves(points: tuple[float, ...], index: int, asked: list[float]) -> None:
    value = Recorded(parabola)
    step = Backtracking(attempts=1).select(local(parabola, 0.0, -6.0), path(*points), value)
    assert value.asked == asked
    if points[index] < 6:
        assert step is not None
        assert (step.point, step.scale, float(step.direction)) == (index, 1.0, points[index])
        assert step.value == parabola(points[index])
    else:
        assert step is None


def test_shrinks_an_overshooting_step_until_armijo_holds() -> None:
    value = Recorded(parabola)
    step = Backtracking(sufficient=0.25, shrink=0.5).select(local(parabola, 0.0, -6.0), path(16.0), value)
    assert step is not None
    assert (step.scale, float(step.direction), step.value) == (0.25, 4.0, 1.0)
    assert value.asked == [16.0, 8.0, 4.0]


def test_armijo_asks_for_a_share_of_the_slope() -> None:
    """From 0, the step 5.9 lowers the parabola by 0.59, the slope promises 35.4."""
    lenient, strict = (Backtracking(sufficient=s, shrink=0.5) for s in (0.01, 0.1))
    taken = [search.select(local(parabola, 0.0, -6.0), path(5.9), Recorded(parabola)) for search in (lenient, strict)]
    assert [step and step.scale for step in taken] == [1.0, 0.5]


def test_points_that_are_not_finite_are_passed_over() -> None:
    def cliff(x: float) -> float:
        return parabola(x) if x < 4 else (math.inf if x < 9 else math.nan)

    step = Backtracking().select(local(cliff, 0.0, -6.0), path(1.0, 2.5, 5.0, 20.0), Recorded(cliff))
    assert step is not None
    assert (step.point, step.scale) == (1, 1.0)
    shrunk = Backtracking().select(local(cliff, 0.0, -6.0), path(20.0), Recorded(cliff))
    assert shrunk is not None
    assert shrunk.scale < 0.21 and shrunk.value < 9.0


def test_none_when_nothing_lowers_the_objective() -> None:
    value = Recorded(lambda x: -parabola(x))
    assert Backtracking(attempts=7).select(local(value.f, 3.0, 0.0), path(0.0, 0.0), value) is None
    rising = Recorded(abs)
    assert Backtracking(attempts=7).select(local(abs, 0.0, -1.0), path(1.0), rising) is None
    assert len(rising.asked) == 7


@pytest.mark.parametrize(("point", "taken"), [(1.0, None), (2.0, None), (4.0, 1.0), (6.0, 0.5)])
def test_where_the_slope_is_positive_a_step_must_still_lower_the_objective(point: float, taken: float | None) -> None:
    """A hill and then a valley: Armijo's rule with this slope would allow a rise of up to 4.5 at the first point."""
    valley = {0.0: 5.0, 1.0: 7.0, 2.0: 5.0, 3.0: 4.0, 4.0: 3.0, 6.0: 6.0}
    value = Recorded(lambda x: valley.get(x, 5.5))
    step = Backtracking(sufficient=0.9).select(local(value.f, 0.0, 5.0), path(point), value)
    assert (step and step.scale) == taken
    assert step is None or step.value < 5.0


def test_an_equal_value_is_no_step() -> None:
    assert Backtracking(attempts=5).select(local(lambda x: 1.0, 0.0, 0.0), path(1.0), Recorded(lambda x: 1.0)) is None


@pytest.mark.parametrize("empty", [Path((), Outcome.NON_FINITE), path(0.0, first_step=0)])
def test_a_path_without_a_step_costs_nothing(empty: Path) -> None:
    value = Recorded(parabola)
    assert Backtracking().select(local(parabola, 0.0, -6.0), empty, value) is None
    assert not value.asked


def test_a_warm_start_is_a_candidate_even_when_the_solver_did_not_move() -> None:
    step = Backtracking().select(local(parabola, 0.0, -6.0), path(2.0, first_step=0), Recorded(parabola))
    assert step is not None and float(step.direction) == 2.0


def choices(values: list[float], attempts: int = 2) -> dict[str, tuple[Step | None, list[float]]]:
    """What each way to evaluate a path of these values takes, from 0 with a value of 1, and what it asked."""
    found = {}
    for candidates in get_args(Candidates):
        known = {float(i + 1): value for i, value in enumerate(values)}
        value = Recorded(lambda x, known=known: known.get(x, 1.5 - 0.1 * x))  # between the points
        search = BestIterate(attempts=attempts, candidates=candidates)
        step = search.select(local(lambda x: 1.0, 0.0, -1.0), path(*known), value)
        found[candidates] = step, value.asked
    return found


heights = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0, math.inf, math.nan]), min_size=1, max_size=9)


@given(falling=heights, rising=heights)
@example(falling=[3.0, 0.5, 0.5], rising=[0.5, 1.0, 1.0])
@example(falling=[math.inf, math.nan], rising=[math.nan])
@example(falling=[0.5], rising=[math.inf, math.nan])
def test_backwards_finds_the_best_where_values_fall_and_then_rise(falling: list[float], rising: list[float]) -> None:
    """Plateaus and values that are not finite included; it asks down to the first point before the best."""
    known = {x: math.inf if math.isnan(x) else x for x in (*falling, *rising)}
    values = sorted(falling, key=known.__getitem__, reverse=True) + sorted(rising, key=known.__getitem__)
    (every, asked_all), (some, asked) = (choices(values)[name] for name in ("all", "backwards"))
    assert (every is None) == (some is None)
    if every is not None and some is not None:
        assert (some.point, some.scale, some.value, some.whole) == (every.point, every.scale, every.value, every.whole)
        assert torch.equal(some.direction, every.direction)
    best = min(range(len(values)), key=lambda i: (known[values[i]], i))
    lines = len(asked_all) - len(values)  # of the line search
    assert len(asked) == len(values) - max(best - 1, 0) + lines
    assert sorted(asked_all[: len(values)]) == [float(i + 1) for i in range(len(values))]


@given(values=heights)
def test_backwards_is_never_above_the_last_point_nor_above_all_its_evaluations(values: list[float]) -> None:
    (every, _), (some, asked) = (choices(values, attempts=0)[name] for name in ("all", "backwards"))
    assert asked == [float(len(values) - i) for i in range(len(asked))]
    if some is None:
        assert not values[-1] < 1.0
    else:
        assert every is not None and every.value <= some.value < 1.0
        assert not values[-1] < some.value
        assert some.value == min(values[int(x) - 1] for x in asked if not math.isnan(values[int(x) - 1]))


def test_backwards_takes_two_evaluations_where_the_last_point_is_best() -> None:
    _, asked = choices([0.9, 0.8, 0.7, 0.6, 0.5])["backwards"]
    assert asked == [5.0, 4.0]


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match=r"candidates='some': give 'all' or 'backwards'"):
        BestIterate(candidates="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shrink=1\.0: a factor between 0 and 1"):
        Backtracking(shrink=1.0)
