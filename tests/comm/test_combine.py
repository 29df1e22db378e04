"""Combiners of gradients, by their twins and by what they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quadric.comm.combine import adasum, graph_any2vec
from reference import compressors as slow

Combiner = Callable[[Sequence[Tensor]], Tensor]
BOTH = pytest.mark.parametrize("combine", [adasum, graph_any2vec], ids=lambda combine: combine.__name__)
numbers = st.floats(-1e6, 1e6, width=32)
vectors = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n).map(tensor), min_size=1, max_size=6)
)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(found: Tensor, expected: Tensor, size: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size + 1e-300)


@BOTH
@given(count=st.integers(1, 7), seed=st.integers(0, 1000))
def test_they_do_as_their_twins(combine: Combiner, count: int, seed: int) -> None:
    given = list(torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    before = [g.clone() for g in given]
    expected = getattr(slow, combine.__name__)([g.tolist() for g in given])
    near(combine(given), tensor(expected), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@BOTH
@given(count=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_orthogonal_are_summed(combine: Combiner, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
    given = list((basis[:, :count] * torch.randn(count, dtype=torch.float64, generator=generator).exp()).T)
    near(combine(given), torch.stack(given).sum(0), 10.0)


@BOTH
@given(st.lists(numbers, min_size=1, max_size=5).map(tensor), st.integers(1, 6))
def test_the_equal_are_themselves(combine: Combiner, gradient: Tensor, count: int) -> None:
    near(combine([gradient] * count), gradient, float(gradient.norm()))


@BOTH
@given(vectors, st.data())
def test_a_zero_changes_nothing(combine: Combiner, given: list[Tensor], data: st.DataObject) -> None:
    if combine is adasum:  # where a zero stands decides who is paired with whom, but for one in the middle of a pair
        given = given[:1]
    place = data.draw(st.integers(0, len(given)))
    zero = torch.zeros_like(given[0])
    near(combine([*given[:place], zero, *given[place:]]), combine(given), sum(float(g.norm()) for g in given))
    assert not bool(combine([zero, zero, zero]).any())


@given(vectors)
def test_adasum_is_the_same_in_either_order(given: list[Tensor]) -> None:
    first, second = given[0], given[-1]
    assert torch.equal(adasum([first, second]), adasum([second, first]))
    four = (given * 4)[:4]
    assert torch.equal(adasum(four), adasum(four[::-1]))


def test_graph_any2vec_is_not() -> None:
    first, second = tensor([1.0, 0.0]), tensor([1.0, 1.0])
    assert not torch.allclose(graph_any2vec([first, second]), graph_any2vec([second, first]))


@BOTH
def test_squares_that_vanish_in_float32_do_no_harm(combine: Combiner) -> None:
    given = [torch.tensor([1e-30, 0.0]), torch.tensor([1e-30, 2e-30])]
    large = combine([1e30 * g for g in given])
    torch.testing.assert_close(1e30 * combine(given), large)


@BOTH
@pytest.mark.parametrize("wrong", [[], [torch.ones(2), torch.ones(3)], [torch.ones(2, 2)]])
def test_what_cannot_be_combined(combine: Combiner, wrong: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="give vectors of one length"):
        combine(wrong)
