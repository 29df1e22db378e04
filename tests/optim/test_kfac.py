from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cases import draw, padded_classes
from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.model.acoustic import TDNN
from quadric.model.recurrent import LSTM, RNN
from quadric.objective.objective import Objective
from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import Numbers, Seen
from quadric.optim.capture import Capture, examples
from quadric.optim.kfac import Kronecker, KroneckerFactors, KroneckerPatches, kfac
from quadric.optim.layers import find_layers
from quadric.optim.length import Natural
from reference import dense, kronecker


def observed(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    factors: KroneckerFactors,
    loss: Callable[[Tensor, Tensor], Tensor] = kronecker.wave,
) -> BlockDiagonal:
    optimizer = kfac(model, factors=factors, length=Natural(), momentum=0.0, damping=0.1)
    loss(model(x), y).backward()
    optimizer.observe()
    return optimizer


def lower(matrix: Tensor) -> Tensor:
    """A symmetric matrix from its lower half, as `inverse` reads it."""
    return matrix.tril() + matrix.tril(-1).T


def statistics(optimizer: BlockDiagonal, weight: Tensor) -> tuple[Tensor, Tensor]:
    numbers = optimizer.state[weight]
    return lower(numbers["statistics_A"]), lower(numbers["statistics_G"])


def in_order(block: Kronecker, A: Tensor) -> Tensor:
    """The rows and columns of A in the order of the weight's entries."""
    one = block.layer.weight[:1]
    order = block._matrix(torch.arange(one.numel()).view(one.shape))[0].argsort()
    order = torch.cat([order, torch.arange(one.numel(), len(A))])
    return A[order][:, order]


def weight_shaped(module: nn.Module) -> Tensor:
    """The gradient [D_W, D_b] of a layer."""
    D = module.weight.grad.flatten(1)
    return D if module.bias is None else torch.cat([D, module.bias.grad[:, None]], 1)


@pytest.mark.parametrize("name", kronecker.LAYERS)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    sharing=st.sampled_from(["expand", "reduce"]),
    pi=st.sampled_from(["trace", "one"]),
    damping=st.sampled_from([0.01, 2.0]),
)
def test_factors_and_direction_are_those_of_a_loop_over_examples(
    name: str, seed: int, sharing: str, pi: str, damping: float
) -> None:
    build, shape = kronecker.LAYERS[name]
    layer = build().double()
    model = nn.Sequential(layer)
    x = draw(*shape, seed=seed)
    y = draw(*model(x).shape, seed=seed + 1)
    optimizer = kfac(
        model,
        lr=1.0,
        damping=damping,
        momentum=0.0,
        length=Natural(),
        factors=KroneckerFactors(sharing=sharing, pi=pi),  # type: ignore[arg-type]
    )
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    kronecker.wave(model(x), y).backward()
    optimizer.step()
    D = weight_shaped(layer)
    moved = [before[key] - p.detach() for key, p in layer.named_parameters()]

    A, G = kronecker.factors(kronecker.uses(nn.Sequential(_put(layer, before)), "0", x, y, kronecker.wave), sharing)
    (block,) = optimizer._blocks
    made = statistics(optimizer, layer.weight)
    torch.testing.assert_close(in_order(block, made[0]), A)
    torch.testing.assert_close(made[1], G)
    step = torch.cat([moved[0].flatten(1), *(b[:, None] for b in moved[1:])], 1)
    torch.testing.assert_close(step, kronecker.direction(A, G, D, damping, pi))


def _put(layer: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    layer.load_state_dict(parameters)
    return layer


def test_large_convolutions_are_seen_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(5, 2, 6, 6), draw(5, 3, 6, 6, seed=1)
    made = []
    for chunk in (2**22, 100):
        monkeypatch.setattr("quadric.optim.convolution._CHUNK", chunk)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)).double()
        made.append(statistics(observed(model, x, y, KroneckerFactors()), model[0].weight)[0])
    torch.testing.assert_close(made[0], made[1])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("build", [RNN, LSTM, TDNN])
def test_layers_that_are_called_at_every_step_have_the_factors_of_all_calls(
    build: Callable[..., nn.Module], sharing: str
) -> None:
    torch.manual_seed(0)
    model = build(3, 4, [5, 4], **({"window": (2, 1)} if build is not TDNN else {"offsets": [(-2, 0), (-1, 1)]}))
    model.double()
    x, y = draw(3, 7, 3), draw(3, 7, 4, seed=1)[:, : model(draw(3, 7, 3)).shape[1]]
    optimizer = observed(model, x, y, KroneckerFactors(sharing=sharing))  # type: ignore[arg-type]
    assert all(type(block) is Kronecker for block in optimizer._serving)
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        expected = kronecker.factors(kronecker.uses(model, name, x, y, kronecker.wave), sharing)
        for made, right in zip(statistics(optimizer, module.weight), expected, strict=True):
            torch.testing.assert_close(made, right)


def test_of_one_example_the_product_is_the_fisher_matrix() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = observed(model, draw(1, 4), draw(1, 2, seed=1), KroneckerFactors())
    for k in (0, 2):
        A, G = statistics(optimizer, model[k].weight)
        D = weight_shaped(model[k]).flatten()
        torch.testing.assert_close(torch.kron(G, A), torch.outer(D, D))


def test_of_deep_linear_networks_the_product_is_the_gauss_newton_matrix() -> None:
    """With squared error and every output for once in the place of the residual: G is then no matter of the data."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False))
    model.double()
    x, layers = draw(6, 4), find_layers(model, model.parameters())
    with (capture := Capture(model, layers, lambda: False)).recording():
        output = model(x)
        for k in range(2):
            output[:, k].mean().backward(retain_graph=True)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole = dense.gauss_newton(model, SquaredError(), [(x, draw(6, 2))], theta)
    place, calls = 0, capture.take()
    for layer in layers:
        found = calls[layer]
        assert [call.number for call in found] == [0, 1] and examples(found) == 12
        block, numbers = KroneckerFactors()(layer), Numbers()
        block.observe(numbers, Seen([draw(*layer.weight.shape)], found, examples(found)), 1.0)
        A, G = lower(numbers["statistics_A"]), lower(numbers["statistics_G"])
        n = layer.weight.numel()
        # Each pass is the mean over 6 of the 12 examples, so its cotangents are twice those of a mean over all.
        torch.testing.assert_close(torch.kron(G / 4 * 2, A), whole[place : place + n, place : place + n])
        place += n


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_same_examples_twice_have_the_same_factors(sharing: str) -> None:
    for build, shape in kronecker.LAYERS.values():
        made = []
        for times in (1, 2):
            torch.manual_seed(0)
            model = nn.Sequential(build()).double()
            x = draw(*shape)
            y = draw(*model(x).shape, seed=1)
            x, y = torch.cat([x] * times), torch.cat([y] * times)
            made.append(statistics(observed(model, x, y, KroneckerFactors(sharing=sharing)), model[0].weight))
        for once, twice in zip(*made, strict=True):
            torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_accumulated_passes_are_one_batch(sharing: str) -> None:
    made = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
        optimizer = kfac(model, factors=KroneckerFactors(sharing=sharing))  # type: ignore[arg-type]
        for x, y in zip(draw(6, 2, 5).chunk(parts), draw(6, 4, seed=1).chunk(parts), strict=True):
            (kronecker.wave(model(x), y) / parts).backward()
        optimizer.observe()
        made.append([*statistics(optimizer, model[0].weight), *statistics(optimizer, model[3].weight)])
    for once, parted in zip(*made, strict=True):
        torch.testing.assert_close(once, parted)


def test_curvlinops_has_the_same_factors() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()
    x, y = draw(6, 2, 4, 4), torch.arange(6) % 4
    optimizer = observed(model, x, y, KroneckerFactors(), functional.cross_entropy)
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        [(x, y)],
        fisher_type="empirical",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        progressbar=False,
        check_deterministic=False,
    )
    size = sum(p.numel() for p in model.parameters())
    theirs = torch.as_tensor(operator @ torch.eye(size, dtype=torch.float64))
    place = 0
    for block in optimizer._blocks:
        A, G = statistics(optimizer, block.layer.weight)
        ours = torch.kron(G, in_order(block, A))
        n, inputs = block.outputs * block.inputs, block.inputs
        order = torch.arange(n).view(-1, inputs)  # theirs has the weight first, and then the bias
        order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
        torch.testing.assert_close(ours[order][:, order], theirs[place : place + n, place : place + n])
        place += n


class Odd(nn.Module):
    """Layers whose calls show all of their gradient, some of it, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.bypassed = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.norm(self.conv(x)).relu_()))
        x = self.encoder(self.lstm(x.flatten(1).unflatten(1, (-1, 6)))[0])
        return functional.linear(x.mean(1), self.bypassed.weight, self.bypassed.bias)


def test_every_layer_has_its_block_and_the_reason_and_no_parameter_stands_still() -> None:
    torch.manual_seed(0)
    model = Odd()
    optimizer = kfac(model, lr=0.02)
    x, y = torch.randn(8, 1, 7, 7), torch.arange(8) % 5
    start, values = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    for _ in range(15):
        optimizer.zero_grad()
        value = functional.cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
    assert all((p != start[name]).all() for name, p in model.named_parameters())
    found = {layer.parameters[0]: (layer.block, layer.why) for layer in optimizer.coverage}
    assert found == {
        "conv.weight": ("KroneckerPatches", "Conv2d: kernels"),
        "norm.weight": ("Entries", "BatchNorm2d: not known as a linear map"),
        "norm.bias": ("Entries", "BatchNorm2d: not known as a linear map"),
        "grouped.weight": ("Kernels", "Conv2d: kernels; its channels are in groups"),
        "up.weight": ("Kernels", "ConvTranspose2d: kernels; neither Conv1d nor Conv2d"),
        "lstm.weight_ih_l0": ("Kronecker", "LSTM: a matrix"),
        "lstm.weight_hh_l0": ("Kronecker", "LSTM: a matrix"),
        "encoder.self_attn.in_proj_weight": ("Kronecker", "MultiheadAttention: a matrix"),
        "encoder.self_attn.out_proj.weight": ("Kronecker", "NonDynamicallyQuantizableLinear: a matrix"),
        "encoder.linear1.weight": ("Kronecker", "Linear: a matrix"),
        "encoder.linear2.weight": ("Kronecker", "Linear: a matrix"),
        **{
            f"encoder.norm{k}.{part}": ("Entries", "LayerNorm: not known as a linear map")
            for k in (1, 2)
            for part in ("weight", "bias")
        },
        "bypassed.weight": ("Averaged", "Linear: a matrix; its module is not called"),
    }


def test_an_objective_records_the_pass_its_gradient_is_of() -> None:
    torch.manual_seed(0)
    model = TDNN(3, 4, [5], offsets=[(-1, 0, 1)])
    data = [(draw(2, 6, 3, seed=k).float(), padded_classes(4, 4, [4, 3])) for k in (0, 1)]
    optimizer, objective = kfac(model, lr=0.01), Objective(model, CrossEntropy(), data)
    objective()
    objective.value_and_grad(objective.space.point())  # at parameters of its own
    objective.value(objective.space.point())
    calls = optimizer._capture.take()
    assert {layer.name: [call.number for call in found] for layer, found in calls.items()} == {
        "hidden.0.linear.weight": [0, 1],
        "output.weight": [0, 1],
    }
    values = [float(optimizer.step(objective).detach()) for _ in range(20)]
    assert values[-1] < 0.9 * values[0]


def test_factors_of_drawn_targets_are_of_their_own_pass() -> None:
    made = []
    for fisher in ("sampled", "empirical"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        objective = Objective(model, CrossEntropy(), [(draw(6, 3, seed=k), torch.arange(6) % 2) for k in (0, 1)])
        optimizer = kfac(model, fisher=fisher)
        optimizer.step(objective)
        made.append([*statistics(optimizer, model[0].weight), *statistics(optimizer, model[2].weight)])
        assert not optimizer._capture._calls
    torch.manual_seed(0)
    model.load_state_dict(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).state_dict())
    with (capture := Capture(model, find_layers(model, model.parameters()), lambda: False)).recording():
        objective.sampled(0)
    expected = []
    for calls in capture.take().values():
        a = torch.cat([torch.cat([call.inputs, torch.ones(6, 1, dtype=torch.float64)], 1) for call in calls])
        g = torch.cat([call.cotangent * 12 for call in calls])
        expected += [a.T @ a / 12, g.T @ g / 12]
    torch.testing.assert_close(made[0], expected)
    assert torch.equal(made[0][0], made[1][0]) and not torch.allclose(made[0][3], made[1][3], rtol=0.1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_some_examples_are_those_of_a_batch_of_these(sharing: str) -> None:
    for build, shape in kronecker.LAYERS.values():
        made = []
        for every in (1, 2):
            torch.manual_seed(0)
            model = nn.Sequential(build()).double()
            x = draw(*shape)
            y = draw(*model(x).shape, seed=1)
            x, y = (x[::2], y[::2]) if every == 1 else (x, y)
            factors = KroneckerFactors(sharing=sharing, every=every)  # type: ignore[arg-type]
            made.append(statistics(observed(model, x, y, factors), model[0].weight))
        for fewer, some in zip(*made, strict=True):
            torch.testing.assert_close(fewer, some)


@pytest.mark.parametrize("option", [{"sharing": "mean"}, {"pi": "two"}, {"every": 0}])
def test_misuse(option: dict[str, str]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: give"):
        KroneckerFactors(**option)  # type: ignore[arg-type]


def test_reduced_positions_need_the_same_examples() -> None:
    model = nn.Linear(3, 2)
    optimizer = kfac(model, factors=KroneckerFactors(sharing="reduce"))
    (model(torch.ones(4, 3)).sum() + model(torch.ones(2, 3)).sum()).backward()
    with pytest.raises(ValueError, match=r"weight is called with \[2, 4\] examples in one pass.*sharing='expand'"):
        optimizer.step()


def test_the_scale_of_the_loss_is_no_matter_where_each_factor_has_its_share_of_damping() -> None:
    ends = []
    for scale in (1.0, 1e3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = kfac(model, lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            (scale * kronecker.wave(model(draw(8, 4, seed=step)), draw(8, 3, seed=9))).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1])


def test_patches_have_their_matrix_and_back() -> None:
    for module, shape in ((nn.Conv2d(2, 3, (3, 2)), (3, 2, 3, 2)), (nn.Conv1d(2, 3, 4), (3, 2, 4))):
        (layer,) = find_layers(module, [module.weight])
        block = KroneckerFactors()(layer)
        assert isinstance(block, KroneckerPatches)
        weight = draw(*shape)
        assert torch.equal(block._weight(block._matrix(weight)), weight)
