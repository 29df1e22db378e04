"""What every acoustic model promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp

import cases
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import AcousticModel
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.space import ParameterSpace
from reference import dense

Build = Callable[..., AcousticModel]


@pytest.fixture(params=cases.MODELS.values(), ids=[kind.__name__ for kind in cases.MODELS])
def build(request: pytest.FixtureRequest) -> Build:
    return request.param


def moved(build: Build, **options: Any) -> AcousticModel:
    """In float64, with no bias at zero."""
    torch.manual_seed(0)
    model = build(**options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded(model: AcousticModel, batch: int, frames: int) -> Tensor:
    return cases.draw(batch, model.left_context + frames + model.right_context, model.inputs)


def test_one_row_of_scores_for_every_frame_with_its_context(build: Build) -> None:
    model = moved(build)
    assert model(padded(model, 2, 7)).shape == (2, 7, model.outputs)
    assert model(padded(model, 2, 1)).shape == (2, 1, model.outputs)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_frame_scores_the_same_in_every_batch_and_chunk(build: Build, activation: str, norm: str) -> None:
    model = moved(build, norm=norm, activation=activation)
    inputs = padded(model, 4, 10)
    together = model(inputs)
    for b in range(4):
        torch.testing.assert_close(model(inputs[b : b + 1])[0], together[b], rtol=1e-12, atol=1e-12)
    for first, last in ((0, 1), (3, 5), (9, 10)):
        window = inputs[:, first : last + model.left_context + model.right_context]
        torch.testing.assert_close(model(window), together[:, first:last], rtol=1e-12, atol=1e-12)


def test_context_is_exact_at_both_ends(build: Build) -> None:
    model = moved(build, activation="tanh")
    inputs = padded(model, 1, 9).requires_grad_()
    (reached,) = torch.autograd.grad(model(inputs)[0, 4].sum(), inputs)
    frames = reached[0].abs().sum(1).nonzero().flatten().tolist()
    assert (frames[0], frames[-1]) == (4, 4 + model.left_context + model.right_context)


@pytest.mark.parametrize("options", [{"activation": "sigmoid"}, {"activation": "tanh", "norm": "layer"}], ids=str)
def test_gradients_to_second_order(build: Build, options: dict[str, Any]) -> None:
    model = moved(build, **options)
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().requires_grad_() for p in model.parameters()]
    inputs = padded(model, 1, 2).requires_grad_()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (inputs, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (inputs, *values), fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_jvp_agrees_with_double_backward(build: Build, activation: str, norm: str) -> None:
    model = moved(build, activation=activation, norm=norm)
    inputs = padded(model, 2, 3)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in theta.items()}
    _, forward = jvp(lambda parameters: functional_call(model, parameters, (inputs,)), (theta,), (v,))

    # J v as the derivative of u -> J' u, which is linear, in the direction v.
    output = model(inputs)
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, list(model.parameters()), u, create_graph=True)
    (double,) = torch.autograd.grad(pulled, u, list(v.values()))
    torch.testing.assert_close(forward, double)


def objective(model: AcousticModel) -> tuple[Objective, list[tuple[Tensor, Tensor]]]:
    data = [(padded(model, 2, 3), torch.tensor([[0, 3, 1], [2, 1, -1]])), (padded(model, 1, 2), torch.tensor([[1, 0]]))]
    return Objective(model, CrossEntropy(), data), data


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_gauss_newton_products_are_those_of_the_dense_matrix(build: Build, norm: str) -> None:
    model = moved(build, norm=norm)
    whole, data = objective(model)
    theta = whole.space.point()
    expected = dense.gauss_newton(model, CrossEntropy(), data, theta)
    v = cases.draw(len(theta), seed=1)
    torch.testing.assert_close(whole.curvature(theta) @ v, expected @ v)


def test_hessian_products_are_derivatives_of_the_gradient(build: Build) -> None:
    model = moved(build, activation="tanh")
    whole, _ = objective(model)
    theta, step = whole.space.point(), 1e-5
    v = cases.draw(len(theta), seed=1)
    after, before = (whole.value_and_grad(theta + sign * step * v)[1] for sign in (1, -1))
    found = whole.curvature(theta, Curvature.HESSIAN) @ v
    torch.testing.assert_close(found, (after - before) / (2 * step), rtol=1e-5, atol=1e-7)


def test_gradients_and_products_stay_close_under_autocast(build: Build) -> None:
    model = moved(build, activation="tanh").float()
    data = [(padded(model, 2, 6).float(), torch.arange(12).view(2, 6) % 4)]
    exact, low = (Objective(model, CrossEntropy(), data, autocast=kind) for kind in (None, torch.bfloat16))
    theta = exact.space.point()
    v = cases.draw(len(theta), seed=1).float()

    def far(found: Tensor, expected: Tensor) -> float:
        assert found.dtype == torch.float32
        return float((found - expected).norm() / expected.norm())

    assert 0 < far(low.value_and_grad(theta)[1], exact.value_and_grad(theta)[1]) < 0.05
    assert 0 < far(low.curvature(theta) @ v, exact.curvature(theta) @ v) < 0.05


def test_a_copy_with_its_state_scores_the_same(build: Build) -> None:
    model, other = moved(build), build().double()
    other.load_state_dict(model.state_dict())
    inputs = padded(model, 1, 3)
    assert torch.equal(model(inputs), other(inputs))
    assert ParameterSpace(model).size == sum(p.numel() for p in model.parameters())


def test_dropout_acts_only_in_training(build: Build) -> None:
    model = moved(build, dropout=0.5)
    inputs = padded(model, 1, 5)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_bad_inputs_and_priors_are_named(build: Build) -> None:
    model = build()
    needed = model.left_context + 1 + model.right_context
    with pytest.raises(ValueError, match=f"takes {needed}"):
        model(torch.zeros(1, needed - 1, 3))
    with pytest.raises(ValueError, match="B, frames, 3"):
        model(torch.zeros(1, needed, 4))
    with pytest.raises(ValueError, match="B, frames, 3"):
        model(torch.zeros(needed, 3))
    with pytest.raises(ValueError, match="log_prior"):
        model.initialise_output_bias(torch.zeros(3))
    model.initialise_output_bias(torch.arange(4.0))
    assert model.output.bias.tolist() == [0.0, 1.0, 2.0, 3.0]
