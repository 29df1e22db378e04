from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadric.linalg.operator import Diagonal, Identity, LinearOperator, Matrix
from reference.dense import matrix_of

N = 4


def leaves() -> st.SearchStrategy[tuple[LinearOperator, torch.Tensor]]:
    def build(kind: int, seed: int) -> tuple[LinearOperator, torch.Tensor]:
        values = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        if kind == 0:
            return Identity(N), torch.eye(N, dtype=torch.float64)
        if kind == 1:
            return Diagonal(values[0]), torch.diag(values[0])
        return Matrix(values), values

    return st.builds(build, st.integers(0, 2), st.integers(0, 99))


def algebra() -> st.SearchStrategy[tuple[LinearOperator, torch.Tensor]]:
    """Random expressions of sums and scalings beside the same expressions of dense matrices."""
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.builds(lambda a, b: (a[0] + b[0], a[1] + b[1]), inner, inner),
            st.builds(lambda a, c: (c * a[0], c * a[1]), inner, st.floats(-3, 3)),
        ),
        max_leaves=5,
    )


@given(algebra())
def test_every_expression_is_its_matrix(pair: tuple[LinearOperator, torch.Tensor]) -> None:
    operator, matrix = pair
    torch.testing.assert_close(matrix_of(operator), matrix, rtol=1e-12, atol=1e-12)
    assert not operator.symmetric or torch.allclose(matrix, matrix.T, atol=1e-6)


def test_symmetry_is_declared_and_inherited() -> None:
    skew = Matrix(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    assert not skew.symmetric
    assert Matrix(torch.eye(2)).symmetric
    assert not (Identity(2) + skew).symmetric
    assert not (2.0 * skew).symmetric
    assert (skew * 2.0).size == 2


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match=r"v has shape \(3,\), this Identity acts on \(2,\)"):
        Identity(2) @ torch.zeros(3)
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 3\): a LinearOperator is square"):
        Matrix(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="cannot add operators of sizes 2 and 3"):
        Identity(2) + Identity(3)
