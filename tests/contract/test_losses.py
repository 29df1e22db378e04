"""What every Loss promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cases
from cases import LossCase
from quadric.data.batch import PADDING as PADDING_OF_BATCHES
from quadric.loss.loss import PADDING, Loss
from reference import dense

IDS = [cls.__name__ for cls in cases.LOSSES]


@pytest.fixture(params=cases.LOSSES.values(), ids=IDS)
def case(request: pytest.FixtureRequest) -> LossCase:
    return replace(request.param, output=request.param.output.clone())


def test_the_gradient_is_that_of_finite_differences(case: LossCase) -> None:
    loss = case.loss()
    assert torch.autograd.gradcheck(lambda z: loss(z, case.target), (case.output.requires_grad_(),))


def test_the_value_is_a_sum_over_utterances(case: LossCase) -> None:
    loss = case.loss()
    whole = loss(case.output, case.target)
    parts = [loss(case.output[b : b + 1], case.target[b : b + 1]) for b in range(len(case.output))]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=0)
    assert whole.shape == ()


def test_the_weight_is_the_number_of_frames_that_count(case: LossCase) -> None:
    assert float(case.loss().weight(case.target)) == int(case.counts.sum())


@pytest.mark.parametrize(
    "case", [c for c in cases.LOSSES.values() if not c.counts.all()], ids=lambda case: type(case.loss()).__name__
)
def test_padding_contributes_nothing(case: LossCase) -> None:
    loss = case.loss()
    changed = torch.where(case.counts[..., None], case.output, 30.0)
    assert torch.equal(loss(changed, case.target), loss(case.output, case.target))
    output = case.output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output, case.target), output)
    assert not gradient[~case.counts].any()
    assert gradient[case.counts].any(-1).all()
    if case.curvature:
        v = cases.draw(*case.output.shape, seed=5)
        product = loss.curvature(case.output, case.target)(v)
        other = loss.curvature(changed, case.target)(torch.where(case.counts[..., None], v, 9.0))
        assert not product[~case.counts].any()
        assert torch.equal(product, other)


def test_the_curvature_is_the_hessian(case: LossCase) -> None:
    loss = case.loss()
    v = cases.draw(*case.output.shape, seed=6)
    if not case.curvature:
        with pytest.raises(NotImplementedError, match=f"{type(loss).__name__} has no curvature.*first-order"):
            loss.curvature(case.output, case.target)(v)
        return
    H = dense.output_hessian(loss, case.output, case.target)
    product = loss.curvature(case.output, case.target)(v)
    assert product.shape == case.output.shape
    torch.testing.assert_close(product.reshape(-1), H @ v.reshape(-1), rtol=1e-10, atol=1e-12)
    if case.semidefinite:
        assert float((v * product).sum()) >= 0


def test_the_fisher_matrix_is_of_its_factors(case: LossCase) -> None:
    loss = case.loss()
    u, v = loss.fisher_factor(case.output, case.target), cases.draw(*case.output.shape, seed=7)
    assert u.shape == case.output.shape and not u[~case.counts].any()
    expected = torch.stack([row * (row @ along) for row, along in zip(u.flatten(0, 1), v.flatten(0, 1), strict=True)])
    torch.testing.assert_close(loss.fisher(case.output, case.target)(v).flatten(0, 1), expected)


def test_half_precision_is_summed_in_single(case: LossCase) -> None:
    loss = case.loss()
    exact = loss(case.output.bfloat16().double(), case.target)
    value = loss(case.output.bfloat16(), case.target)
    if isinstance(case.target, torch.Tensor) and case.target.is_floating_point():
        assert value.isfinite()
    else:
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_accelerator_agrees(case: LossCase) -> None:
    loss, target = case.loss(), case.target
    moved = target.cuda() if isinstance(target, torch.Tensor) else target
    output, there = case.output.requires_grad_(), case.output.detach().cuda().requires_grad_()
    here_value, there_value = loss(output, target), loss.cuda()(there, moved)
    torch.testing.assert_close(there_value.cpu(), here_value)
    (here_gradient,), (there_gradient,) = (
        torch.autograd.grad(here_value, output),
        torch.autograd.grad(there_value, there),
    )
    torch.testing.assert_close(there_gradient.cpu(), here_gradient)


def test_the_base_asks_for_its_methods() -> None:
    with pytest.raises(NotImplementedError):
        Loss()(torch.zeros(1), torch.zeros(1))
    with pytest.raises(NotImplementedError):
        Loss().weight(torch.zeros(1))


def test_losses_and_batches_agree_on_padding() -> None:
    """Neither package may import the other."""
    assert PADDING == PADDING_OF_BATCHES
