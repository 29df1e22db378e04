"""The divergence from a teacher of few pdfs against sums over its classes, and where these are about empty."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hessian

from quadric.loss.sequence_anchor import class_means, divergence
from quadric.loss.sequence_target import Teacher
from reference import sequence as twin

C = 6


def made(seed: int, listed: int, spread: float = 1.5, frames: int = 3) -> tuple[Tensor, Teacher]:
    """Logits, and the likeliest of another model."""
    generator = torch.Generator().manual_seed(seed)
    output, other = spread * torch.randn(2, frames, C, dtype=torch.float64, generator=generator)
    top = torch.softmax(other, -1).topk(listed)
    return output, (top.indices.int().numpy(), top.values.numpy())


def of(output: Tensor, teacher: Teacher) -> Tensor:
    return divergence(torch.log_softmax(output, -1), teacher)


def formulas(output: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the Hessian's blocks and the Fisher matrix's, by the formulas of the module."""
    p = torch.softmax(output, -1)
    q = torch.zeros_like(p).scatter(1, torch.from_numpy(teacher[0]).long(), torch.from_numpy(teacher[1]))
    outside = torch.ones_like(p).scatter(1, torch.from_numpy(teacher[0]).long(), 0.0)
    r, rho = 1 - q.sum(1, keepdim=True), (p * outside).sum(1, keepdim=True)
    s = torch.where(rho > 0, p * outside / rho, 0.0)
    gradient = torch.where(outside > 0, (rho - r) * s, p - q)

    def spread(x: Tensor) -> Tensor:
        return torch.diag_embed(x) - x[..., None] * x[..., None, :]

    return gradient, spread(p) - r[..., None] * spread(s), spread(p) - rho[..., None] * spread(s)


@given(st.integers(0, 10_000), st.integers(1, C))
def test_value_gradient_and_curvature_are_those_of_the_classes(seed: int, listed: int) -> None:
    output, teacher = made(seed, listed)
    leaf, v = output.clone().requires_grad_(), torch.randn(output.shape, dtype=torch.float64)
    value = of(leaf, teacher)
    torch.testing.assert_close(value, twin.divergence(output, teacher), rtol=1e-10, atol=1e-13)
    assert float(value.detach()) >= -1e-14
    gradient, blocks, fisher = formulas(output, teacher)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], gradient, rtol=1e-9, atol=1e-13)
    by_autograd = torch.einsum("tctd->tcd", hessian(lambda z: of(z, teacher), output))
    torch.testing.assert_close(by_autograd, blocks, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twin.fisher_of_classes(output, teacher[0]), fisher, rtol=1e-9, atol=1e-12)
    p, u = torch.softmax(output, -1), class_means(output[None], [teacher])(v[None])[0]
    product = p * (u - (p * u).sum(-1, keepdim=True))
    torch.testing.assert_close(product, torch.einsum("tcd,td->tc", fisher, v), rtol=1e-9, atol=1e-13)


def test_the_hessian_is_indefinite_where_the_teacher_gives_the_others_more_and_the_fisher_matrix_never() -> None:
    least = {"hessian": math.inf, "fisher": math.inf}
    for seed in range(20):
        _, blocks, fisher = formulas(*made(seed, 2))
        for name, matrix in (("hessian", blocks), ("fisher", fisher)):
            least[name] = min(least[name], float(torch.linalg.eigvalsh(matrix).min()))
    assert least["hessian"] < -0.01 and least["fisher"] > -1e-14


@given(st.integers(0, 10_000), st.integers(1, C))
def test_at_the_teacher_all_is_zero_and_the_fisher_matrix_is_the_hessian(seed: int, listed: int) -> None:
    output, _ = made(seed, listed)
    top = torch.softmax(output, -1).topk(listed)
    teacher = (top.indices.int().numpy(), top.values.numpy())
    leaf = output.clone().requires_grad_()
    value = of(leaf, teacher)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert abs(float(value.detach())) < 1e-13 and float(gradient.abs().max()) < 1e-14
    _, blocks, fisher = formulas(output, teacher)
    torch.testing.assert_close(blocks, fisher, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("listed", [1, C - 1, C])
@pytest.mark.parametrize("sure", [True, False], ids=["of a listed pdf", "of another"])
@pytest.mark.parametrize("rest", [0.0, 1e-30, 0.5])
def test_classes_that_are_about_empty(dtype: torch.dtype, listed: int, sure: bool, rest: float) -> None:
    """The model gives all to one pdf, the teacher nearly all, or half, to those that it lists."""
    output = torch.full((1, C), -2000.0, dtype=dtype)
    output[0, 0 if sure else C - 1] = 2000.0
    q = np.zeros((1, listed))
    q[0, 0] = 1.0 if listed == C else 1.0 - rest
    teacher = (np.arange(listed, dtype=np.int32)[None], q)
    leaf = output.clone().requires_grad_()
    value = of(leaf, teacher)
    (gradient,) = torch.autograd.grad(value, leaf)
    agree = sure and (rest < 0.5 or listed == C)
    half = rest == 0.5 and listed < C
    several = 0.5 * math.log(C - listed) if sure and half else 0.0
    expected = 0.0 if agree else math.log(0.5) + 2000.0 - several if half else 4000.0
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all() and float(gradient.sum()) == pytest.approx(0.0, abs=1e-6)
    assert class_means(output[None], [teacher])(torch.ones(1, 1, C, dtype=dtype)).isfinite().all()


def test_a_teacher_rounded_to_a_little_more_than_one_gives_the_others_nothing() -> None:
    output, (pdfs, _) = made(1, 2)
    over = (pdfs, np.tile([0.6004, 0.4003], (3, 1)))
    exact = (pdfs, over[1] / over[1].sum(1, keepdims=True))
    torch.testing.assert_close(of(output, over), of(output, exact), rtol=1e-12, atol=0)
