"""What must be a whole number is refused where it is none, by the name of the option."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quadric.linalg.krylov import ConjugateGradient, FlexibleCG, MinRes, Notay
from quadric.linalg.pairs import LastPairs, SpreadPairs
from quadric.linalg.truncation import FixedIterations, RelativeProgress
from quadric.optim.precondition import FisherDiagonal
from quadric.optim.sampling import FixedSizes, GeometricSizes, VarianceTested
from quadric.optim.search import Backtracking, BestIterate
from quadric.train.method import NGHF, FirstOrder, HessianFree, NaturalGradient
from quadric.train.plan import Plan

WHOLE: list[tuple[Callable[..., object], str]] = [
    (ConjugateGradient, "max_steps"),
    (FlexibleCG, "max_steps"),
    (MinRes, "max_steps"),
    (FixedIterations, "iterations"),
    (RelativeProgress, "lag"),
    (Notay, "directions"),
    (LastPairs, "memory"),
    (SpreadPairs, "memory"),
    (FisherDiagonal, "draws"),
    (Backtracking, "attempts"),
    (BestIterate, "attempts"),
    (FixedSizes, "gradient"),
    (lambda **options: FixedSizes(10, **options), "curvature"),
    (lambda **options: GeometricSizes(10, 5, **options), "most"),
    (lambda **options: VarianceTested(10, **options), "parts"),
    (FirstOrder, "gradient_frames"),
    (HessianFree, "max_steps"),
    (HessianFree, "curvature_most"),
    (NaturalGradient, "iterations"),
    (NGHF, "curvature_frames"),
    (lambda **options: Plan(1, FixedSizes(1), **options), "evaluations"),
]


@pytest.mark.parametrize(("build", "name"), WHOLE)
def test_what_counts_is_a_whole_number(build: Callable[..., object], name: str) -> None:
    for value in (2.5, 3.0):
        with pytest.raises(ValueError, match=rf"^{name}={value}: give a whole number$"):
            build(**{name: value})
    build(**{name: np.int64(3)})


def test_an_option_that_may_be_none_or_a_fraction_still_may() -> None:
    HessianFree(epochs=0.5, curvature_most=None)


def test_progress_is_over_an_iteration_at_least() -> None:
    with pytest.raises(ValueError, match="lag=0: progress is over one iteration at least"):
        RelativeProgress(lag=0)
