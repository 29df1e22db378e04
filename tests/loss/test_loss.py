"""Losses against closed forms; what all losses share is in tests/contract."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.loss.loss import PADDING, CrossEntropy, SquaredError


def test_cross_entropy_of_two_classes_by_hand() -> None:
    output = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0]]], dtype=torch.float64)
    value = CrossEntropy()(output, torch.tensor([[1, 0]]))
    torch.testing.assert_close(float(value), math.log(4 / 3) + math.log(2.0))


def test_only_padding_sums_to_zero() -> None:
    output = torch.randn(1, 3, 4, requires_grad=True)
    target = torch.full((1, 3), PADDING)
    value = CrossEntropy()(output, target)
    (gradient,) = torch.autograd.grad(value, output)
    assert value.item() == 0 and not gradient.any()
    assert not CrossEntropy().curvature(output, target)(torch.ones_like(output)).any()


@given(st.floats(-300, 300), st.integers(0, 99))
def test_cross_entropy_ignores_a_common_shift_of_the_logits(shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    v = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    target = torch.randint(5, (3,), generator=generator)
    loss = CrossEntropy()
    torch.testing.assert_close(loss(output + shift, target), loss(output, target), rtol=1e-10, atol=1e-10)
    curved = loss.curvature(output, target)(v)
    torch.testing.assert_close(loss.curvature(output + shift, target)(v + shift), curved, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(curved.sum(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_cross_entropy_is_finite_where_the_softmax_saturates() -> None:
    output = torch.tensor([[1e4, -1e4]])
    assert float(CrossEntropy()(output, torch.tensor([1]))) == 2e4
    assert CrossEntropy().curvature(output, torch.tensor([0]))(torch.ones(1, 2)).isfinite().all()


def test_squared_error_by_hand() -> None:
    output, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert float(SquaredError()(output, target)) == 0.5 * (4 + 9)
    assert float(SquaredError().weight(target)) == 2


def test_what_is_right_is_counted_by_hand() -> None:
    output = torch.tensor([[[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]]])
    assert CrossEntropy().correct(output, torch.tensor([[0, 0, -1]])) == (1.0, 2.0)
    assert SquaredError().correct(output, output) is None
