"""Sample sizes, and the noise of a gradient that they may follow."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cases
from cases import draw
from quadric.loss.loss import SquaredError
from quadric.objective.objective import Objective
from quadric.optim.sampling import FixedSizes, GeometricSizes, Sampler, Seen, Sizes, VarianceTested


@pytest.mark.parametrize("build", cases.SAMPLERS.values(), ids=lambda _: "")
@given(noises=st.lists(st.floats(0.0, 3.0) | st.just(math.nan), max_size=12), total=st.integers(1, 5000))
def test_sizes_never_shrink_nor_exceed_the_set(build: Callable[[], Sampler], noises: list[float], total: int) -> None:
    sampler, last = build(), None
    for updates, noise in enumerate(noises):
        sizes = sampler.sizes(Seen(updates, total, last, noise))
        assert 1 <= sizes.gradient <= total and 1 <= sizes.curvature <= total
        assert last is None or (sizes.gradient >= last.gradient and sizes.curvature >= last.curvature)
        last = sizes


def test_geometric_growth_is_separate_and_capped() -> None:
    sampler = GeometricSizes(100, 10, gradient_growth=1.5, curvature_growth=2.0, most=60)
    sizes = [sampler.sizes(Seen(k, 1000)) for k in range(8)]
    assert [s.gradient for s in sizes] == [100, 150, 225, 338, 506, 759, 1000, 1000]
    assert [s.curvature for s in sizes] == [10, 20, 40, 60, 60, 60, 60, 60]
    assert sampler.sizes(Seen(10_000, 1000)).gradient == 1000


def test_the_variance_test_asks_for_what_would_pass_it() -> None:
    sampler = VarianceTested(100, share=0.2, theta=0.5, growth=10.0)
    assert sampler.sizes(Seen(0, 10**6)) == Sizes(100, 20)
    assert sampler.sizes(Seen(1, 10**6, Sizes(100, 20), 0.5)) == Sizes(100, 20)
    assert sampler.sizes(Seen(1, 10**6, Sizes(100, 20), 1.0)) == Sizes(400, 80)
    assert sampler.sizes(Seen(1, 10**6, Sizes(100, 20), 5.0)) == Sizes(1000, 200)
    assert sampler.sizes(Seen(1, 10**6, Sizes(100, 20), 0.1)) == Sizes(100, 20)
    assert sampler.sizes(Seen(1, 10**6, Sizes(100, 20), math.nan)) == Sizes(1000, 200)


def test_noise_is_the_standard_error_of_the_gradient() -> None:
    """Against the spread of gradients over many samples of the same size."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    told, gradients = [], []
    for seed in range(400):
        x = draw(40, 3, seed=seed)
        y = x.sum(1, keepdim=True) + draw(40, 1, seed=1000 + seed)
        objective = Objective(model, SquaredError(), [(x[i : i + 2], y[i : i + 2]) for i in range(0, 40, 2)])
        _, gradient = objective.value_and_grad(objective.space.point())
        told.append((objective.gradient_noise * float(gradient.norm())) ** 2)
        gradients.append(gradient)
    spread = float(torch.stack(gradients).var(0).sum())
    assert sum(told) / len(told) == pytest.approx(spread, rel=0.1)


def test_noise_of_one_micro_batch_is_not_known() -> None:
    objective = Objective(nn.Linear(3, 1).double(), SquaredError(), [(draw(4, 3), draw(4, 1))])
    objective.value_and_grad(objective.space.point())
    assert math.isnan(objective.gradient_noise)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedSizes(0, 1), "gradient=0: a sample holds at least one frame"),
        (lambda: GeometricSizes(10, 10, gradient_growth=0.9), "gradient_growth=0.9"),
        (lambda: GeometricSizes(10, 10, most=0), "most=0"),
        (lambda: VarianceTested(10, theta=0.0), "theta=0.0"),
        (lambda: VarianceTested(10, growth=1.0), "growth=1.0"),
        (lambda: VarianceTested(10, growth=math.inf), "growth=inf"),
        (lambda: VarianceTested(10, parts=1), "parts=1"),
        (lambda: FixedSizes(10, -1), "curvature=-1"),
    ],
)
def test_misuse_is_named(build: Callable[[], Sampler], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
