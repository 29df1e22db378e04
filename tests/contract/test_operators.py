"""What every LinearOperator promises."""

from __future__ import annotations

import pytest
import torch

import cases
from quadric.linalg.operator import LinearOperator
from reference.dense import matrix_of


@pytest.fixture(params=cases.OPERATORS.values(), ids=[cls.__name__ for cls in cases.OPERATORS])
def pair(request: pytest.FixtureRequest) -> tuple[LinearOperator, torch.Tensor]:
    return request.param.build()


def test_the_action_is_the_matrix(pair: tuple[LinearOperator, torch.Tensor]) -> None:
    operator, matrix = pair
    v = cases.draw(operator.size, seed=7)
    torch.testing.assert_close(operator @ v, matrix @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(matrix_of(operator), matrix, rtol=1e-10, atol=1e-12)


def test_the_action_is_linear_and_repeatable(pair: tuple[LinearOperator, torch.Tensor]) -> None:
    operator, _ = pair
    u, v = cases.draw(operator.size, seed=8), cases.draw(operator.size, seed=9)
    torch.testing.assert_close(
        operator @ (2.0 * u - 3.0 * v), 2.0 * (operator @ u) - 3.0 * (operator @ v), rtol=1e-10, atol=1e-11
    )
    assert torch.equal(operator @ u, operator @ u)


def test_the_argument_stays_as_it_is(pair: tuple[LinearOperator, torch.Tensor]) -> None:
    operator, _ = pair
    v = cases.draw(operator.size)
    before = v.clone()
    operator @ v
    assert torch.equal(v, before)


def test_symmetric_when_declared(pair: tuple[LinearOperator, torch.Tensor]) -> None:
    operator, _ = pair
    if operator.symmetric:
        matrix = matrix_of(operator)
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-12)


def test_a_vector_of_another_size_is_refused(pair: tuple[LinearOperator, torch.Tensor]) -> None:
    operator, _ = pair
    with pytest.raises(ValueError, match=rf"v has shape \({operator.size + 1},\).*acts on \({operator.size},\)"):
        operator @ cases.draw(operator.size + 1)
