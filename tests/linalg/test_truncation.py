from __future__ import annotations

import pytest

import cases
from quadric.linalg.truncation import FixedIterations, RelativeProgress, Truncation
from quadric.outcome import Outcome


def shrinking(length: int, factor: float) -> list[float]:
    """Model values whose progress falls by ``factor`` an iteration: 0, -1, -1 - f, -1 - f - f^2, ..."""
    values = [0.0]
    for i in range(length):
        values.append(values[-1] - factor**i)
    return values


@pytest.mark.parametrize("make", cases.TRUNCATIONS.values(), ids=[cls.__name__ for cls in cases.TRUNCATIONS])
def test_never_at_the_start(make: type[Truncation]) -> None:
    assert make().reached([0.0], [1.0]) is None


def test_the_tolerance_of_relative_progress_is_per_iteration() -> None:
    """Martens' factor k: a constant rate of progress is judged alike whatever the lag."""
    rate = 1e-3
    models = [-((1 + rate) ** i) for i in range(60)]
    for lag in (1, 5, 20):
        assert RelativeProgress(0.9 * rate, lag, 0.0).reached(models, []) is None
        assert RelativeProgress(1.1 * rate, lag, 0.0).reached(models, []) is Outcome.TRUNCATED


def test_relative_progress_by_hand() -> None:
    models = shrinking(40, 0.7)
    rule = RelativeProgress(5e-4)
    stops = [i for i in range(len(models)) if rule.reached(models[: i + 1], []) is not None]
    expected = [i for i in range(11, len(models)) if (models[i] - models[i - 10]) / models[i] < 10 * 5e-4]
    assert stops == expected and stops[0] > 11


def test_the_lag_grows_with_the_iteration() -> None:
    models = [-1.0] * 30 + [-2.0] * 171  # the jump lies 170 iterations back at the end
    assert RelativeProgress(1e-6, 10, 0.1).reached(models, []) is Outcome.TRUNCATED
    assert RelativeProgress(1e-6, 10, 0.9).reached(models, []) is None


def test_a_model_that_is_not_below_zero_is_no_progress_to_judge() -> None:
    assert RelativeProgress().reached([1.0] * 50, []) is None


def test_fixed_iterations_count_products() -> None:
    rule = FixedIterations(3)
    assert [rule.reached([0.0] * n, [1.0] * n) for n in (1, 2, 3)] == [None] * 3
    assert rule.reached([0.0] * 4, [1.0] * 4) is Outcome.STEP_LIMIT


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match="iterations=0: at least one is needed, for example 8"):
        FixedIterations(0)
