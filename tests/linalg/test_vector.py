from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.linalg import vector
from quadric.linalg.vector import dot

UNIT = 2.0**-53


def exact(x: torch.Tensor, y: torch.Tensor) -> float:
    """The correctly rounded sum of the products, which float64 holds exactly where the vectors are shorter."""
    return math.fsum((x.double() * y.double()).tolist())


def bound(x: torch.Tensor, y: torch.Tensor, chunk: int) -> float:
    terms = min(len(x), chunk) + math.ceil(len(x) / chunk) + 1  # the last: of the reference
    return terms * UNIT / (1 - terms * UNIT) * math.fsum((x.double() * y.double()).abs().tolist())


@given(
    n=st.integers(0, 300),
    chunk=st.integers(1, 100),
    seed=st.integers(0, 999),
    spread=st.floats(0, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_within_the_stated_bound(n: int, chunk: int, seed: int, spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, n, generator=generator) * torch.exp(spread * torch.randn(2, n, generator=generator))).clamp(
        -6e4, 6e4
    )
    x, y = x.to(dtype), y.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vector.CHUNK, "cpu", chunk)
        found = dot(x, y)
    assert abs(found - exact(x, y)) <= bound(x, y, chunk)


def test_within_the_bound_over_many_chunks_that_cancel() -> None:
    x = torch.randn(3 * vector.CHUNK["cpu"] + 17)
    y = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0) * 1e4 + torch.randn(len(x))
    assert abs(dot(x, y) - exact(x, y)) <= bound(x, y, vector.CHUNK["cpu"])


def test_a_norm_is_the_product_of_two_equal_vectors() -> None:
    x = torch.randn(2 * vector.CHUNK["cpu"] + 3)
    assert dot(x, x) == dot(x, x.clone())


@given(n=st.integers(1, 200), seed=st.integers(0, 99))
def test_double_precision_is_the_plain_product(n: int, seed: int) -> None:
    x, y = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert dot(x, y) == float(torch.dot(x, y))


def test_mixed_types() -> None:
    assert dot(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 3.0], dtype=torch.float64)) == 0.1 + 6.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    x = torch.ones(2 * vector.CHUNK["cpu"])
    x[-1] = value
    assert not math.isfinite(dot(x, x))
    x[0] = -x[-1]
    assert not math.isfinite(dot(x, torch.ones_like(x)))


def test_never_two_copies_of_the_vectors() -> None:
    x = torch.ones(1 << 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert dot(x, x) == 1 << 20
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 8 * vector.CHUNK["cpu"]


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2,\) and y \(3,\): give two vectors of one size"):
        dot(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"x has shape \(2, 2\)"):
        dot(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_accelerator_agrees() -> None:
    x, y = torch.randn(2, 2 * vector.CHUNK_ELSEWHERE + 5)
    error = abs(dot(x.cuda(), y.cuda()) - exact(x, y))
    assert error <= bound(x, y, vector.CHUNK_ELSEWHERE)
