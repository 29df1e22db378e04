from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from quadric.linalg.bfgs import compact, damp, update_
from quadric.linalg.lbfgs import LBFGSInverse
from quadric.linalg.operator import Identity, Scaled
from quadric.linalg.pairs import Pair
from reference import dense

SEEDS = st.integers(0, 2**31)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=SEEDS, n=st.integers(1, 6))
def test_the_update_is_the_textbooks(seed: int, n: int) -> None:
    H, (s, y) = dense.random_spd(n, seed=seed), drawn(2, n, seed=seed)
    y = y * (s @ y).sign()
    assume(s @ y > 1e-3 * s.norm() * y.norm())
    expected = dense.bfgs_inverse(H, [(s, y)])
    assert bool(update_(H, s, y))
    torch.testing.assert_close(H, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(H @ y, s, rtol=1e-6, atol=1e-6)
    assert torch.linalg.eigvalsh(H)[0] > 0


def test_an_update_stays_symmetric_to_the_bit() -> None:
    H = torch.eye(7)
    for seed in range(50):
        s, y = drawn(2, 7, seed=seed).float()
        update_(H, s, y * (s @ y).sign())
        assert torch.equal(H, H.T)
    assert not torch.equal(H, torch.eye(7))


@pytest.mark.parametrize(
    ("s", "y"),
    [
        ([1.0, 0.0], [-1.0, 0.0]),
        ([1.0, 0.0], [0.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([math.nan, 0.0], [1.0, 0.0]),
        ([1e25, 0.0], [1e-25, 1e-20]),
        ([1.0, 0.0], [math.inf, 0.0]),
    ],
)
def test_a_pair_of_no_use_leaves_the_inverse_as_it_is(s: list[float], y: list[float]) -> None:
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    before = H.clone()
    assert not bool(update_(H, torch.tensor(s), torch.tensor(y)))
    assert torch.equal(H, before)


def test_an_update_may_be_forbidden() -> None:
    H = torch.eye(2)
    assert not bool(update_(H, torch.ones(2), torch.ones(2) * 3, torch.tensor(False)))
    assert torch.equal(H, torch.eye(2))


@given(
    seed=SEEDS,
    n=st.integers(1, 6),
    powell=st.sampled_from([0.1, 0.2, 0.9]),
    share=st.sampled_from([1e-3, 0.2, 0.99, 1.0, 3.0]),
    unit=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_damped_pairs_have_enough_curvature(seed: int, n: int, powell: float, share: float, unit: float) -> None:
    """By any pair, of however negative a curvature."""
    H, (s, y) = dense.random_spd(n, seed=seed), drawn(2, n, seed=seed)
    damped_s, damped_y = damp(s, y, H @ y, powell=powell, share=share, unit=torch.tensor(unit).double())
    assert damped_s @ y >= (1 - 1e-9) * powell * (y @ H @ y)
    assert damped_s @ damped_y >= (1 - 1e-9) * share * unit * (damped_s @ damped_s)
    if s @ y > powell * (y @ H @ y) and s @ y > share * unit * (s @ s):
        assert torch.equal(damped_s, s) and torch.equal(damped_y, y)
    assert bool(update_(H, damped_s, damped_y))
    values = torch.linalg.eigvalsh(H)
    assert values[0] > -1e-12 * values[-1]


def test_double_damping_by_hand() -> None:
    """H = I: first s'y = 0.2 y'y, and then s'y = 0.5 s's."""
    s, y = torch.tensor([2.0, 1.0]).double(), torch.tensor([0.0, -1.0]).double()
    first, last = damp(s, y, y, powell=0.2, share=0.5, unit=torch.tensor(1.0))
    theta = 0.8 * 1.0 / (1.0 + 1.0)
    torch.testing.assert_close(first, theta * s + (1 - theta) * y)
    assert float(first @ y) == pytest.approx(0.2)
    ss = float(first @ first)
    theta = 0.5 * ss / (ss - 0.2)
    torch.testing.assert_close(last, theta * y + (1 - theta) * first)


@given(seed=SEEDS, n=st.integers(1, 8), pairs=st.integers(0, 5), columns=st.integers(1, 3))
def test_the_compact_form_is_the_recursion(seed: int, n: int, pairs: int, columns: int) -> None:
    A = dense.random_spd(n, seed=seed)
    S, V = drawn(pairs, n, seed=seed), drawn(n, columns, seed=seed + 1)
    Y = S @ A
    found = compact(S, Y, torch.tensor(0.3).double(), V)
    recursion = LBFGSInverse(
        [Pair(k, s, y) for k, (s, y) in enumerate(zip(S, Y, strict=True))], n, H0=Scaled(Identity(n), 0.3)
    )
    assert recursion.skipped == 0
    expected = torch.stack([recursion @ v for v in V.T], 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    matrix = dense.bfgs_inverse(0.3 * torch.eye(n, dtype=V.dtype), zip(S, Y, strict=True)) @ V
    torch.testing.assert_close(found, matrix, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
