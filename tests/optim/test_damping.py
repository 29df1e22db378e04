from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadric.optim.damping import Fixed, LevenbergMarquardt

RATIOS = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (-math.inf, 1.5),
        (math.nan, 1.5),
        (-1.0, 1.5),
        (0.2499, 1.5),
        (0.25, 1.0),
        (0.75, 1.0),
        (0.7501, 2 / 3),
        (5.0, 2 / 3),
    ],
)
def test_follows_the_ratio(ratio: float, factor: float) -> None:
    assert LevenbergMarquardt().update(6.0, ratio) == pytest.approx(6.0 * factor)


@given(st.lists(RATIOS, max_size=200), st.floats(1e-6, 1e6))
def test_stays_in_its_bounds(ratios: list[float], value: float) -> None:
    rule = LevenbergMarquardt(minimum=1e-6, maximum=1e6)
    for ratio in ratios:
        value = rule.update(value, ratio)
        assert 1e-6 <= value <= 1e6


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_truer_model_never_means_more_damping(a: float, b: float) -> None:
    rule = LevenbergMarquardt()
    assert rule.update(1.0, min(a, b)) >= rule.update(1.0, max(a, b))


@given(RATIOS)
def test_fixed_is_fixed(ratio: float) -> None:
    assert Fixed(0.3).update(0.3, ratio) == 0.3


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match=r"initial=0: damping must be positive.*Fixed\(0\.0\)"):
        LevenbergMarquardt(initial=0)
    with pytest.raises(ValueError, match="initial=nan"):
        LevenbergMarquardt(initial=math.nan)
    with pytest.raises(ValueError, match=r"boost=0\.5, drop=0\.6\d*: need boost > 1 > drop > 0"):
        LevenbergMarquardt(boost=0.5)
