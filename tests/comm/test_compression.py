"""Compressors send what their formulas say, and lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cases
from quadric.comm.compression import AdaComp, CLTk, Compressor, HalfPrecision, LowRank, bin_lengths
from quadric.comm.message import Factors, Message, Signs, Sparse
from reference import compressors as slow

N = cases.COMPRESSED
Build = Callable[[], Compressor]


@pytest.fixture(params=cases.COMPRESSORS.values(), ids=lambda build: type(build()).__name__)
def build(request: pytest.FixtureRequest) -> Build:
    found: Build = request.param
    return found


def gradients(steps: int, n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, n, generator=generator, dtype=torch.float64).to(dtype))


def added(message: Message) -> Tensor:
    """The vector in float64, as a receiver who keeps such numbers has it."""
    out = torch.zeros(message.length, dtype=torch.float64)
    message.add_to(out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_sent_and_what_is_left_are_all_gradients(build: Build, dtype: torch.dtype) -> None:
    compressor, sent = build(), torch.zeros(N, dtype=torch.float64)
    given = gradients(30, dtype=dtype)
    for gradient in given:
        before = gradient.clone()
        compressor.compress(gradient).add_to(sent)
        assert torch.equal(gradient, before)
    total = torch.stack(given).double().sum(0)
    near = 2e-14 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(sent + compressor.residue, total, rtol=0, atol=near)
    assert compressor.residue.dtype == dtype
    assert float((sent - total).norm() / total.norm()) < 1  # something was sent, of the right sign


@settings(max_examples=40)
@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=N, max_size=N), min_size=1, max_size=3))
def test_nothing_is_lost_of_any_numbers(values: list[list[float]]) -> None:
    for build in cases.COMPRESSORS.values():
        compressor, sent = build(), torch.zeros(N, dtype=torch.float64)
        given = torch.tensor(values, dtype=torch.float64)
        for gradient in given:
            message = compressor.compress(gradient)
            assert message.finite
            message.add_to(sent)
        scale = float(given.abs().max()) + float(sent.abs().max()) + 1e-300
        torch.testing.assert_close((sent + compressor.residue) / scale, given.sum(0) / scale, rtol=0, atol=1e-12)


def test_what_is_refused_is_as_if_it_had_not_been_sent(build: Build) -> None:
    first, second = gradients(2)
    compressor = build()
    accepted = added(compressor.compress(first))
    refused = compressor.compress(second)
    compressor.restore(refused)
    torch.testing.assert_close(accepted + compressor.residue, first + second, rtol=0, atol=1e-14)


def test_a_filtered_memory_takes_back_what_it_would_have_kept() -> None:
    compressor, (first, second) = CLTk(0.3, memory=0.25), gradients(2)
    compressor.compress(first)
    before = compressor.residue.clone()
    compressor.restore(compressor.compress(second))
    torch.testing.assert_close(compressor.residue, before + 0.25 * second, rtol=0, atol=1e-7)


def test_a_message_comes_back_to_one_that_starts_afresh(build: Build) -> None:
    message, compressor = build().compress(gradients(1)[0]), build()
    compressor.restore(message)
    assert torch.equal(compressor.residue, message.dense())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_can_be_refused_and_leaves_no_trace(build: Build, bad: float) -> None:
    compressor, other = build(), build()
    for step, gradient in enumerate(gradients(4, dtype=torch.float32)):
        if step == 2:
            spoilt = gradient.clone()
            spoilt[5] = bad
            message = compressor.compress(spoilt)
            assert not message.finite and not bool(message.dense().isfinite().all())
            compressor.restore(message)
        assert torch.equal(compressor.compress(gradient).dense(), other.compress(gradient).dense())
    assert torch.equal(compressor.residue, other.residue)


def test_what_is_beyond_the_range_of_a_message_is_not_finite(build: Build) -> None:
    compressor = build()
    if isinstance(compressor, HalfPrecision):
        return  # saturates
    assert not compressor.compress(torch.full((N,), 1e300, dtype=torch.float64)).finite
    assert not bool(compressor.residue.any())


def test_it_goes_on_from_its_state_to_the_bit(build: Build) -> None:
    given, first = gradients(6, dtype=torch.float32), build()
    for gradient in given[:3]:
        first.compress(gradient)
    state, second = first.state_dict(), build()
    expected = [first.compress(gradient).dense() for gradient in given[3:]]
    second.load_state_dict(state)
    found = [second.compress(gradient).dense() for gradient in given[3:]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(first.residue, second.residue)


def test_zeros_send_nothing_and_spoil_nothing(build: Build) -> None:
    compressor = build()
    for _ in range(2):
        assert not bool(compressor.compress(torch.zeros(N)).dense().any())
    given = gradients(1)[0]
    sent = added(compressor.compress(given))
    assert bool(sent.any())
    torch.testing.assert_close(sent + compressor.residue, given, rtol=0, atol=1e-14)


def test_half_a_gradient_is_compressed_in_float32(build: Build) -> None:
    compressor = build()
    given = gradients(1)[0].bfloat16()
    sent = compressor.compress(given).dense()
    assert compressor.residue.dtype == torch.float32
    torch.testing.assert_close(sent + compressor.residue, given.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.zeros(2, N // 2), "give a floating-point vector"),
        (torch.zeros(N, dtype=torch.int32), "give a floating-point vector"),
        (torch.zeros(N + 1), f"a vector of {N + 1} entries: this compressor is one of {N}"),
    ],
)
def test_other_gradients_are_refused(build: Build, gradient: Tensor, message: str) -> None:
    compressor = build()
    compressor.compress(torch.ones(N))
    with pytest.raises(ValueError, match=message):
        compressor.compress(gradient)
    if message.startswith("a vector"):
        for wrong in (
            lambda: compressor.restore(HalfPrecision().compress(gradient)),
            lambda: compressor.load_state_dict(compressor.state_dict() | {"residue": gradient}),
        ):
            with pytest.raises(ValueError, match=message):
                wrong()


@pytest.mark.parametrize(("sizes", "bins"), [([N], [7]), ([13, 1, N - 14], [5, 3, 500]), ([20, N - 20], [10, 1])])
def test_adacomp_sends_what_its_formula_says(sizes: list[int], bins: list[int]) -> None:
    compressor, residue = AdaComp(sizes, bins), [0.0] * N
    for step, gradient in enumerate(gradients(12)):
        if step % 3 == 1:
            gradient[:9] = 0
        message = compressor.compress(gradient)
        sent, residue = slow.adacomp(residue, gradient.tolist(), sizes, bins)
        torch.testing.assert_close(message.dense().double(), torch.tensor(sent).double(), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(compressor.residue, torch.tensor(residue).double(), rtol=0, atol=1e-5)
        residue = compressor.residue.tolist()


def test_adacomp_counts_bytes_as_its_docstring_does() -> None:
    compressor = AdaComp([1000, 300], [500, 50])
    message = compressor.compress(gradients(1, 1300)[0])
    assert isinstance(message, Signs)
    entries, bins = int((message.dense() != 0).sum()), 2 + 6
    assert message.nbytes == 2 * entries + -(-entries // 8) + 2 * bins + 12 * 2
    assert AdaComp([300], 50).compress(gradients(1, 300)[0]).counts.itemsize == 1  # type: ignore[attr-defined]


def test_adacomp_sends_fewer_as_the_residue_grows() -> None:
    compressor = AdaComp([20_000])
    shares = [int((compressor.compress(g).dense() != 0).sum()) / 20_000 for g in gradients(100, 20_000)]
    assert 0.07 < shares[0] < 0.15 and shares[-1] < 0.03


def test_bins_are_short_for_convolutions() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert bin_lengths(model.parameters()) == [50, 500, 500, 500, 500, 500]


@pytest.mark.parametrize("memory", [1.0, 0.1])
def test_cltk_sends_what_its_formula_says(memory: float) -> None:
    leader, follower = CLTk(0.2, memory), CLTk(0.2, memory)
    states = [[0.0] * N, [0.0] * N]
    for a, b in zip(gradients(8), gradients(8, seed=1), strict=True):
        first = leader.compress(a)
        second = follower.compress(b, torch.from_numpy(first.indices))
        chosen = slow.largest([r + g for r, g in zip(states[0], a.tolist(), strict=True)], round(0.2 * N))
        assert first.indices.tolist() == second.indices.tolist() == chosen
        for k, (gradient, message, compressor) in enumerate(((a, first, leader), (b, second, follower))):
            sent, states[k] = slow.cltk(states[k], gradient.tolist(), chosen, memory)
            torch.testing.assert_close(message.dense().double(), torch.tensor(sent).double(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(compressor.residue, torch.tensor(states[k]).double(), rtol=0, atol=1e-6)
            states[k] = compressor.residue.tolist()


def test_cltk_of_layers_is_one_for_each() -> None:
    sizes = [25, 1, N - 26]
    together, alone = CLTk(0.2, sizes=sizes), [CLTk(0.2) for _ in sizes]
    for gradient in gradients(5):
        expected = [c.compress(g).dense() for c, g in zip(alone, gradient.split(sizes), strict=True)]
        message = together.compress(gradient)
        assert torch.equal(message.dense(), torch.cat(expected))
        assert len(message.indices) == 5 + 1 + 3
    with pytest.raises(ValueError, match="a vector of 41 entries: this compressor is one of 40"):
        together.compress(torch.ones(N + 1))


def test_cltk_commutes_with_the_sum() -> None:
    """One worker with the sum of all gradients, following the same leader, sends the sum of their messages."""
    workers, one = [CLTk(0.2) for _ in range(3)], CLTk(0.2)
    for step in range(6):
        given = [gradients(6, seed=seed)[step] for seed in range(3)]
        order = [step % 3, *(rank for rank in range(3) if rank != step % 3)]
        leading = workers[order[0]].compress(given[order[0]])
        messages = [leading, *(workers[rank].compress(given[rank], leading.indices) for rank in order[1:])]
        total = torch.zeros(N, dtype=torch.float64)
        for message in messages:
            message.add_to(total)
        found = one.compress(torch.stack(given).sum(0), leading.indices).dense()
        torch.testing.assert_close(found.double(), total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("indices", [torch.tensor([0, N]), np.array([-1, 3])])
def test_cltk_refuses_indices_outside(indices: Any) -> None:
    with pytest.raises(ValueError, match="indices go from"):
        CLTk(0.1).compress(torch.ones(N), indices)


def test_a_follower_that_is_not_finite_sends_as_many_entries() -> None:
    message = CLTk(0.1).compress(torch.full((N,), torch.nan), torch.tensor([2, 4]))
    assert message.indices.tolist() == [2, 4] and bool(np.isnan(message.values).all())
    assert isinstance(CLTk(0.1).compress(torch.zeros(0)), Sparse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_saturates_and_sends_the_rest_later(dtype: torch.dtype) -> None:
    compressor, given = HalfPrecision(dtype), torch.tensor([3e38, -3.4e38, 1.0, 1e-8, 70_000.0])
    assert compressor.compress(given).finite
    sent = torch.zeros(5, dtype=torch.float64)
    compressor = HalfPrecision(dtype)
    small = torch.tensor([1e5, -2e5, 1.0, 1e-8, 65_519.0])
    compressor.compress(small).add_to(sent)
    for _ in range(4):
        compressor.compress(torch.zeros(5)).add_to(sent)
    torch.testing.assert_close(sent.float(), small, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_projects_on_the_span_of_its_last_product(rank: int) -> None:
    shapes = [(4, 6), (3,), (5, 1, 5), (2, 2)]
    n = 24 + 3 + 25 + 4
    compressor, residue = LowRank(shapes, rank), torch.zeros(n, dtype=torch.float64)
    for gradient in gradients(6, n):
        total, basis = residue + gradient, [Q.double() for Q in compressor.Q]
        message = compressor.compress(gradient)
        assert isinstance(message, Factors)
        sent = message.dense().double()
        residue = compressor.residue
        places = torch.arange(n).split([24, 3, 25, 4])
        for k, ((rows, columns), place, Q) in enumerate(
            zip([(4, 6), (1, 3), (5, 5), (2, 2)], places, basis, strict=True)
        ):
            if k in (1, 3):
                torch.testing.assert_close(sent[place], total[place], rtol=1e-6, atol=1e-6)
                continue
            expected, following = slow.low_rank(total[place].view(rows, columns), Q)
            torch.testing.assert_close(sent[place].view(rows, columns), expected, rtol=1e-4, atol=1e-5)
            found = compressor.Q[k].double()
            torch.testing.assert_close(found @ found.T, following @ following.T, rtol=1e-4, atol=1e-4)


def test_low_rank_finds_the_best_by_warm_starts() -> None:
    """Of one matrix again and again, with nothing kept: subspace iteration to its first singular vectors."""
    M = gradients(1, 60)[0].view(6, 10)
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    best = (U[:, :2] * S[:2]) @ V[:2]
    compressor = LowRank([(6, 10)], 2)
    for _ in range(60):
        compressor.residue.zero_()
        sent = compressor.compress(M.reshape(-1)).dense().double()
    torch.testing.assert_close(sent.view(6, 10), best, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: AdaComp([]), r"sizes=\[\]"),
        (lambda: AdaComp([3, 0]), r"sizes=\[3, 0\]"),
        (lambda: AdaComp([3], 0), "bin=0"),
        (lambda: AdaComp([3], 70_000), "bin=70000"),
        (lambda: AdaComp([3], [2, 2]), r"bin=\[2, 2\]: .* each of the 1 layers"),
        (lambda: CLTk(0), "share=0"),
        (lambda: CLTk(0.1, sizes=[0, 3]), r"sizes=\[0, 3\]"),
        (lambda: CLTk(1.5), "share=1.5"),
        (lambda: CLTk(0.1, memory=0), "memory=0"),
        (lambda: HalfPrecision(torch.float32), "dtype=torch.float32"),
        (lambda: LowRank([(2, 3)], 0), "rank=0"),
        (lambda: LowRank([], 1), "shapes is empty"),
        (lambda: LowRank([(9, 9)], 1).load_state_dict(LowRank([(9, 9)], 2).state_dict()), "its Q are of other shapes"),
    ],
)
def test_what_cannot_be_built(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
