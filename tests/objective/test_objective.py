from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cases import MicroBatch, draw, padded_classes
from quadric.loss.loss import CrossEntropy, Loss, SquaredError
from quadric.objective.anchor import Anchor
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.space import ParameterSpace
from reference import dense

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4)).double()


def data(rows: int = 6) -> tuple[Tensor, Tensor]:
    """``rows`` utterances of five frames, each of another length."""
    return draw(rows, 5, 3), padded_classes(5, 4, [5 - b % 4 for b in range(rows)])


def split(inputs: Tensor, target: Tensor, sizes: list[int]) -> list[MicroBatch]:
    return list(zip(inputs.split(sizes), target.split(sizes), strict=True))


class Weighing(CrossEntropy):
    """Its frames weigh so much each."""

    def __init__(self, each: float) -> None:
        super().__init__()
        self.each = each

    def weight(self, target: Tensor) -> Tensor:
        return self.each * super().weight(target)


def test_value_and_gradient_equal_the_twin() -> None:
    model, batches = net(), split(*data(), [1, 3, 2])
    objective = Objective(model, CrossEntropy(), batches)
    theta = objective.space.point().requires_grad_()
    expected = dense.mean_loss(model, CrossEntropy(), batches, theta)
    (gradient,) = torch.autograd.grad(expected, theta)
    value, found = objective.value_and_grad(theta.detach())
    assert value == pytest.approx(float(expected.detach()), rel=1e-13)
    assert objective.value(theta.detach()) == value
    torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_split_into_micro_batches_changes_nothing(sizes: list[int], device: str) -> None:
    model = net().to(device)
    whole = Objective(model, CrossEntropy(), split(*data(), [6]))
    parts = Objective(model, CrossEntropy(), split(*data(), sizes))
    theta, v = whole.space.point(), draw(whole.space.size, seed=4).to(device)
    assert parts.value(theta) == pytest.approx(whole.value(theta), rel=1e-12)
    torch.testing.assert_close(parts.value_and_grad(theta)[1], whole.value_and_grad(theta)[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.curvature(theta) @ v, whole.curvature(theta) @ v, rtol=1e-12, atol=1e-14)


def test_the_frames_weigh_alike_whatever_the_padding() -> None:
    """The mean is over frames, not over utterances or micro-batches."""
    model = net()
    (x, y), theta = data(2), ParameterSpace(model).point()
    parts = [Objective(model, CrossEntropy(), [(x[b : b + 1], y[b : b + 1])]) for b in range(2)]
    both = Objective(model, CrossEntropy(), split(x, y, [1, 1]))
    assert (parts[0].frames, parts[1].frames, both.frames) == (5, 4, 9)
    assert both.value(theta) == pytest.approx((5 * parts[0].value(theta) + 4 * parts[1].value(theta)) / 9, rel=1e-13)


def test_as_a_closure_it_gives_the_same_value_and_gradient() -> None:
    model = net(dropout=0.4)
    objective = Objective(model, CrossEntropy(), split(*data(), [2, 4]))
    value, gradient = objective.value_and_grad(objective.space.point())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # what an earlier step left behind
    for _ in range(2):
        with torch.no_grad():
            closed = objective()
        assert float(closed) == pytest.approx(value, rel=1e-13)
        left = objective.space.flatten(p.grad for p in model.parameters() if p.grad is not None)
        torch.testing.assert_close(left, gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda params: torch.optim.Adam(params, lr=0.05),
        lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=5),
        lambda params: torch.optim.SGD(params, lr=0.3),
    ],
    ids=["Adam", "LBFGS", "SGD"],
)
def test_every_torch_optimiser_can_be_stepped_with_it(optimiser) -> None:  # type: ignore[no-untyped-def]
    model = net()
    objective = Objective(model, CrossEntropy(), split(*data(), [3, 3]))
    first, step = objective.value(objective.space.point()), optimiser(model.parameters())
    for _ in range(10):
        step.step(objective)
    assert objective.value(objective.space.point()) < 0.9 * first


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_dropout_draws_one_mask_for_value_gradient_and_products(device: str) -> None:
    model = net(dropout=0.5).to(device)
    batches = split(*data(), [2, 4])
    objective = Objective(model, CrossEntropy(), batches, seed=3)
    theta, v = objective.space.point(), draw(objective.space.size, seed=4).to(device)
    value, gradient = objective.value_and_grad(theta)
    torch.randn(17, device=device)  # other draws in between have no say
    assert objective.value(theta) == value
    slope = (objective.value(theta + 1e-6 * v) - objective.value(theta - 1e-6 * v)) / 2e-6
    assert slope == pytest.approx(float(gradient @ v), rel=1e-5)
    other = Objective(model, CrossEntropy(), batches, seed=4)
    assert other.value(theta) != value
    product = objective.curvature(theta) @ v
    assert torch.equal(objective.curvature(theta) @ v, product)
    assert not torch.allclose(other.curvature(theta) @ v, product)


def test_curvature_under_dropout_is_that_of_the_function_the_value_is_of() -> None:
    """Squared error through the fixed mask is quadratic in the last layer, so the product is a second difference."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).double()
    objective = Objective(model, SquaredError(), [(draw(8, 3), draw(8, 2, seed=1)), (draw(4, 3, seed=2), draw(4, 2))])
    theta, v = objective.space.point(), draw(8, seed=5)
    second = objective.value(theta + v) - 2 * objective.value(theta) + objective.value(theta - v)
    assert float(v @ (objective.curvature(theta) @ v)) == pytest.approx(second, rel=1e-10)


def test_the_random_numbers_outside_go_on_as_if_nothing_was_drawn() -> None:
    objective = Objective(net(dropout=0.5), CrossEntropy(), split(*data(), [6]))
    torch.manual_seed(11)
    expected = torch.randn(4)
    torch.manual_seed(11)
    objective.value_and_grad(objective.space.point())
    objective()
    assert torch.equal(torch.randn(4), expected)


def test_nothing_but_the_closure_touches_the_model() -> None:
    model = net()
    objective = Objective(model, CrossEntropy(), split(*data(), [6]))
    before, theta = objective.space.point(), draw(objective.space.size)
    objective.value_and_grad(theta)
    objective.curvature(theta) @ theta
    assert torch.equal(objective.space.point(), before)
    assert all(p.grad is None for p in model.parameters())


def test_the_curvature_may_see_other_data() -> None:
    model, loss = net(), CrossEntropy()
    small = split(*data(2), [2])
    both = Objective(model, loss, split(*data(), [6]), small)
    theta, v = both.space.point(), draw(both.space.size, seed=1)
    assert (both.frames, both.curvature_frames) == (23, 9)
    assert torch.equal(both.curvature(theta) @ v, Objective(model, loss, small).curvature(theta) @ v)
    assert both.value(theta) == Objective(model, loss, split(*data(), [6])).value(theta)


def test_an_unused_parameter_has_a_zero_gradient_and_product() -> None:
    model = net()
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    objective = Objective(model, CrossEntropy(), split(*data(), [6]))
    theta = objective.space.point()
    _, gradient = objective.value_and_grad(theta)
    product = objective.curvature(theta) @ torch.ones_like(theta)
    for vector in (gradient, product):
        views = objective.space.views(vector)
        assert not views["idle"].any() and views["0.weight"].any()


def test_low_precision_products_stay_close_and_results_in_the_parameters_type() -> None:
    model = net().float()
    batches = [(x.float(), y) for x, y in split(*data(), [2, 4])]
    exact, fast = (Objective(model, CrossEntropy(), batches, autocast=kind) for kind in (None, torch.bfloat16))
    theta = exact.space.point()
    v = torch.ones_like(theta)
    assert 0 < abs(fast.value(theta) - exact.value(theta)) < 0.02
    product = fast.curvature(theta) @ v
    assert product.dtype == torch.float32 == fast.value_and_grad(theta)[1].dtype
    assert float((product - exact.curvature(theta) @ v).norm() / product.norm()) < 0.05


def test_half_precision_products_stay_close_where_nothing_is_too_small_for_it() -> None:
    model = net().float()
    batches = [(x.float(), y) for x, y in split(*data(), [2, 4])]
    exact, fast = (Objective(model, CrossEntropy(), batches, autocast=kind) for kind in (None, torch.float16))
    theta = exact.space.point()
    (value, gradient), (expected, wanted) = fast.value_and_grad(theta), exact.value_and_grad(theta)
    assert 0 < abs(value - expected) < 2e-3
    products = [o.curvature(theta, kind) @ gradient for o in (fast, exact) for kind in Curvature]
    pairs = [(gradient, wanted), *zip(products[: len(Curvature)], products[len(Curvature) :], strict=True)]
    for rough, right in pairs:
        assert rough.dtype == torch.float32
        assert 0 < float((rough - right).norm()) < 5e-3 * float(right.norm())


def test_a_layer_that_is_looked_up_by_whole_numbers() -> None:
    """The inputs are indices: they take no gradient, and some rows of the table are not used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Tanh(), nn.Linear(3, 4)).double()
    inputs = torch.tensor([[1, 2, 2, 5, 0], [5, 1, 3, 0, 0]])
    batches = split(inputs, padded_classes(5, 4, [5, 3]), [1, 1])
    objective = Objective(model, CrossEntropy(), batches)
    theta = objective.space.point().requires_grad_()
    (expected,) = torch.autograd.grad(dense.mean_loss(model, CrossEntropy(), batches, theta), theta)
    theta = theta.detach()
    gradient = objective.value_and_grad(theta)[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)
    assert not objective.space.views(gradient)["0.weight"][[0, 4, 6]].any()
    matrix = dense.matrix_of(objective.curvature(theta))
    assert matrix.any() and not matrix[:3].any()  # the row of padding
    used = [i for i in range(len(theta)) if i >= 3]
    twin = dense.gauss_newton(model, CrossEntropy(), batches, theta)
    torch.testing.assert_close(matrix[used][:, used], twin[used][:, used], rtol=1e-10, atol=1e-13)
    assert float(objective()) == pytest.approx(objective.value(theta), rel=1e-13)


def test_data_that_is_of_both_sets_is_weighed_once() -> None:
    class Counting(CrossEntropy):
        calls = 0

        def weight(self, target: Tensor) -> Tensor:
            Counting.calls += 1
            return super().weight(target)

    batches = split(*data(), [2, 4])
    for curvature, calls in ((None, 2), (batches, 2), (batches[:1], 3)):
        Counting.calls = 0
        objective = Objective(net(), Counting(), batches, curvature)
        assert (objective.frames, Counting.calls) == (23, calls)
        assert objective.curvature_frames == (9 if calls == 3 else 23)


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match="model=Sequential has no trainable parameter: nothing to optimise"):
        Objective(net().requires_grad_(False), CrossEntropy(), [data()])
    with pytest.raises(ValueError, match=r"gradient holds 0 micro-batches and no frame.*give it data"):
        Objective(net(), CrossEntropy(), [])
    nothing = (draw(1, 2, 3), torch.full((1, 2), -1))
    with pytest.raises(ValueError, match="curvature holds 1 micro-batches and no frame"):
        Objective(net(), CrossEntropy(), split(*data(), [6]), [nothing])
    with pytest.raises(
        ValueError, match=r"^loss=CrossEntropyLoss\(\): sums .* such as quadric\.loss\.loss\.CrossEntropy"
    ):
        Objective(net(), torch.nn.CrossEntropyLoss(), [data()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gradient holds tensors: give a list of micro-batches, such as \[\(inputs"):
        Objective(net(), CrossEntropy(), data())
    with pytest.raises(ValueError, match="curvature holds tensors: give a list"):
        Objective(net(), CrossEntropy(), [data()], data())
    negative = Weighing(-1.0)
    with pytest.raises(ValueError, match=r"gradient weighs -\d+\.\d+ frames by loss=Weighing.*must not be negative"):
        Objective(net(), negative, [data()])
    with pytest.raises(ValueError, match=r"gradient weighs nan frames"):
        Objective(net(), Weighing(math.nan), [data()])
    with pytest.raises(ValueError, match=r"gradient=<generator.* is read many times, each time the same: give a list"):
        Objective(net(), CrossEntropy(), (batch for batch in [data()]))  # type: ignore[arg-type]


class Unmoved(CrossEntropy):
    """Draws the very targets of the data."""

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return target


def test_at_the_targets_of_the_data_the_drawn_gradient_is_the_closures() -> None:
    """But for the anchor; running statistics do not move a second time, and dropout drops the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 4)).double()
    batches = [(draw(5, 3, seed=s), torch.arange(5) % 4) for s in (0, 1)]
    objective = Objective(model, Unmoved(), batches)
    value = objective()
    expected = [p.grad for p in model.parameters()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    anchored = Objective(model, Unmoved(), batches, anchor=Anchor(torch.zeros(objective.space.size).double(), 1.0))
    assert float(anchored.sampled()) == float(value)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    anchored()
    assert not torch.equal(model[0].weight.grad, expected[0])


def test_the_second_moment_of_drawn_gradients_is_the_fisher_matrix() -> None:
    """Over the number of frames; each draw has targets of its own, and the same ones again."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    objective = Objective(
        model, CrossEntropy(), [(draw(2, 3, 2), padded_classes(3, 3, [3, 1])), (draw(2, 2), 0 * draw(2).long())]
    )
    theta = objective.space.point()

    def drawn(number: int) -> Tensor:
        objective.sampled(number)
        return model[0].weight.grad.flatten()

    gradients = torch.stack([drawn(number) for number in range(800)])
    assert torch.equal(drawn(7), gradients[7]) and len(gradients.unique(dim=0)) > 100
    found = objective.frames * gradients.T @ gradients / len(gradients)
    expected = dense.matrix_of(objective.curvature(theta, Curvature.GAUSS_NEWTON))  # the Fisher matrix of a softmax
    assert float((found - expected).norm()) < 0.12 * float(expected.norm())
    assert float(gradients.mean(0).norm()) < 0.1 * float(gradients.square().sum(1).mean().sqrt())


def test_a_loss_that_is_no_distribution_draws_nothing() -> None:
    class Absolute(SquaredError):
        sample = Loss.sample

    with pytest.raises(NotImplementedError, match="empirical Fisher matrix"):
        Objective(nn.Linear(2, 2).double(), Absolute(), [(draw(3, 2), draw(3, 2))]).sampled()
