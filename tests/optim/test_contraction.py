"""Shampoo and TNT: a layer's direction against the dense Kronecker product of its factors, and what both promise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quadric.optim.block_diagonal import Schedule
from quadric.optim.blocks import Numbers, Seen, power
from quadric.optim.contraction import Contracted, Flattening, Tensors
from quadric.optim.layers import find_layers
from quadric.optim.length import Natural
from quadric.optim.mini_block import Entries, MiniBlocks
from quadric.optim.shampoo import Shampoo, shampoo
from quadric.optim.tnt import TNT, tnt
from reference import contractions

Method = tuple[type[Contracted], Callable[..., Tensor]]
METHODS: dict[str, Method] = {
    "shampoo": (Shampoo, partial(contractions.shampoo, exponent=-0.5)),
    "shampoo, -1": (partial(Shampoo, exponent=-1.0), partial(contractions.shampoo, exponent=-1.0)),
    "tnt": (TNT, contractions.tnt),
}


class Bare(nn.Module):
    """A parameter that no known module holds."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


# A module, the flattening, and the shapes of the tensors that its parameters are.
MODULES: dict[str, tuple[Callable[[], nn.Module], Flattening, list[list[int]]]] = {
    "linear": (lambda: nn.Linear(7, 4), Flattening.FILTERS, [[4, 7], [4]]),
    "linear without bias": (lambda: nn.Linear(7, 4, bias=False), Flattening.NONE, [[4, 7]]),
    "1 x 1": (lambda: nn.Conv2d(5, 4, 1), Flattening.NONE, [[4, 5], [4]]),
    "filters": (lambda: nn.Conv2d(2, 3, (2, 3)), Flattening.FILTERS, [[3, 12], [3]]),
    "positions": (lambda: nn.Conv2d(2, 3, (2, 3)), Flattening.POSITIONS, [[3, 2, 6], [3]]),
    "all axes": (lambda: nn.Conv2d(2, 3, (2, 3)), Flattening.NONE, [[3, 2, 2, 3], [3]]),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, bias=False), Flattening.NONE, [[4, 3, 5]]),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, bias=False), Flattening.FILTERS, [[2, 12]]),
    "layer norm": (lambda: nn.LayerNorm(5), Flattening.FILTERS, [[5]]),
    "scalar": (lambda: Bare(), Flattening.FILTERS, [[1]]),
    "bare tensor": (lambda: Bare(3, 4, 2), Flattening.FILTERS, [[3, 4, 2]]),
}


def draws(shapes: list[torch.Size], count: int, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(count)]


def build(method: Method, module: nn.Module, **options: object) -> Contracted:
    return method[0](find_layers(module, module.parameters())[0], Tensors(**options))  # type: ignore[arg-type]


def learned(block: Contracted, seen: list[list[Tensor]], damping: float) -> Numbers:
    """The mean statistics of gradients, and their inverses."""
    numbers: Numbers = {}
    for n, gradient in enumerate(seen):
        block.observe(numbers, Seen(gradient), 1 / (n + 1))
    block.refresh(numbers, damping)
    return numbers


def width(n: int, largest: int) -> int:
    """Of n entries in as few blocks as may be, of about equal width."""
    return next(w for count in itertools.count(1) if (w := -(-n // count)) <= largest)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), largest=st.sampled_from([2, 3, 5, 100]), damping=st.sampled_from([0.01, 1.0]))
def test_the_direction_is_that_of_the_dense_product(
    name: str, method: str, seed: int, largest: int, damping: float
) -> None:
    make, flattening, tensors = MODULES[name]
    module = make().double()
    block = build(METHODS[method], module, flattening=flattening, largest=largest, vectors=3)
    *seen, momentum = draws([p.shape for p in block.layer.parameters], 4, seed)
    found = block.apply(learned(block, seen, damping), momentum)
    for t, shape in enumerate(tensors):
        widths = [1] if len(shape) == 1 and shape[0] > 3 else [width(n, largest) for n in shape]
        gradients = [gradient[t].view(shape) for gradient in seen]
        expected = METHODS[method][1](gradients, momentum[t].view(shape), widths=widths, damping=damping)
        torch.testing.assert_close(found[t], expected.view(found[t].shape), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_that_is_joined_is_a_column(method: str) -> None:
    block = build(METHODS[method], nn.Linear(7, 4).double(), joined=True, largest=5)
    *seen, momentum = draws([p.shape for p in block.layer.parameters], 4, 0)
    matrices = [torch.cat([W, b[:, None]], 1) for W, b in (*seen, momentum)]
    expected = METHODS[method][1](matrices[:-1], matrices[-1], widths=[4, 4], damping=0.1)
    weight, bias = block.apply(learned(block, seen, 0.1), momentum)
    torch.testing.assert_close(weight, expected[:, :-1])
    torch.testing.assert_close(bias, expected[:, -1])


def test_from_the_right_alone_and_without_its_root_shampoo_is_mini_block_fisher() -> None:
    """There a block is D'D / O for O outputs, and so is its damping."""
    module = nn.Linear(7, 4, bias=False).double()
    block = build(METHODS["shampoo, -1"], module)
    *seen, (M,) = draws([module.weight.shape], 4, 0)
    right = block.axes[0][1]
    vectors = Bare(7).double()
    P = build(METHODS["shampoo, -1"], vectors)  # exponent -1 of one factor
    H = learned(block, seen, 0.1)["statistics_0_1"]
    (inverse,) = P.inverted([H], [right], 0.1)
    averaged, numbers = MiniBlocks()(block.layer), {}
    for n, gradient in enumerate(seen):
        averaged.observe(numbers, Seen(gradient), 1 / (n + 1))
    averaged.refresh(numbers, 0.1)
    torch.testing.assert_close(right.times(inverse, M), averaged.apply(numbers, [M])[0])


@given(seed=st.integers(0, 2**31), damping=st.sampled_from([1e-3, 0.3]))
def test_the_factors_of_tnt_have_the_same_mean_diagonal(seed: int, damping: float) -> None:
    block = build(METHODS["tnt"], Bare(3, 4, 2).double())
    ((G,),) = draws([block.layer.weight.shape], 1, seed)
    numbers = learned(block, [[G]], damping)
    means = [torch.linalg.inv(numbers[f"inverse_0_{i}"][0]).trace() / n / (1 + damping) for i, n in enumerate(G.shape)]
    c = G.square().mean() ** (1 / 3)
    torch.testing.assert_close(torch.stack(means), c.expand(3))


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**31))
def test_a_rotation_of_an_axis_rotates_the_direction(method: str, seed: int) -> None:
    block = build(METHODS[method], Bare(3, 4, 5).double())
    shape = block.layer.weight.shape
    rotations = [torch.linalg.qr(draws([(n, n)], 1, seed + n)[0][0])[0] for n in shape]

    def rotated(G: Tensor) -> Tensor:
        return torch.einsum("abc,ia,jb,kc->ijk", G, *rotations)

    *seen, (M,) = draws([shape], 3, seed)
    (plain,) = block.apply(learned(block, seen, 0.1), [M])
    (turned,) = block.apply(learned(block, [[rotated(G)] for (G,) in seen], 0.1), [rotated(M)])
    torch.testing.assert_close(turned, rotated(plain), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 2**31),
    rank=st.integers(0, 2),
    size=st.sampled_from([1e-12, 1.0, 1e6]),
    damping=st.sampled_from([1e-4, 1e-2]),
)
def test_it_descends_whatever_the_rank_and_the_size(
    method: str, seed: int, rank: int, size: float, damping: float
) -> None:
    block = build(METHODS[method], nn.Linear(9, 6))
    left, right, b, M, c = (x.float() for x in draws([(6, rank), (rank, 9), (6,), (6, 9), (6,)], 1, seed)[0])
    gradient = [size * left @ right, size * b * bool(rank)]
    numbers = learned(block, [gradient], damping)
    for probe in (gradient, [M, c]):
        for d, g in zip(block.apply(numbers, probe), probe, strict=True):
            assert d.isfinite().all() and d.dtype == torch.float32
            assert float((d.double() * g.double()).sum()) > 0 or not g.any()


@pytest.mark.parametrize("exponent", [-0.125, -0.25, -0.5])
@pytest.mark.parametrize("sparse", [0.0, 0.5, 0.9])
def test_roots_of_float32_matrices_of_low_rank(sparse: float, exponent: float) -> None:
    """(v v' + e I)^x = e^x I + ((v'v + e)^x - e^x) v v' / v'v; a float32 eigensolver fails on some of them."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8, 250, generator=generator) * (torch.rand(8, 250, generator=generator) >= sparse)
    S = v.unsqueeze(2) * v.unsqueeze(1)
    shift = 0.03 * v.square().mean(1)
    found = power(S, shift, exponent)
    square, e = v.square().sum(1).double(), shift.double()
    along = ((square + e) ** exponent - e**exponent) / square
    expected = e[:, None, None] ** exponent * torch.eye(250).double() + along[:, None, None] * S.double()
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("build_optimiser", [shampoo, tnt])
def test_float32_is_near_float64(build_optimiser: Callable[..., torch.optim.Optimizer]) -> None:
    ends = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 5))
        x, y = torch.randn(20, 2, 6, 6).to(dtype), torch.randn(20, 5).to(dtype)
        model.to(dtype)
        optimiser = build_optimiser(model, lr=1e-2, schedule=Schedule(inverses=3))
        for _ in range(6):
            optimiser.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimiser.step()
        ends.append(torch.cat([p.detach().flatten().double() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build_optimiser", [shampoo, tnt])
def test_of_one_entry_shampoo_takes_the_sign_and_tnt_the_inverse(build_optimiser: Callable[..., object]) -> None:
    """Of one gradient g and without momentum: g (g^2 (1 + damping))^e, e = -1/2 or -1."""
    module = Bare(1).double()
    optimiser = build_optimiser(module, lr=1.0, momentum=0.0, damping=0.25, length=Natural())
    module.weight.grad = torch.full((1,), -4.0, dtype=torch.float64)
    optimiser.step()  # type: ignore[attr-defined]
    expected = 4 / (16 * 1.25) ** (0.5 if build_optimiser is shampoo else 1.0)
    assert module.weight.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_of_a_table_shampoo_takes_entries(exponent: float) -> None:
    model = nn.Embedding(3, 2).double()
    optimiser = shampoo(model, lr=1.0, momentum=0.0, damping=0.25, exponent=exponent, length=Natural())
    before = model.weight.detach().clone()
    g = model.weight.grad = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    optimiser.step()
    step = g * (g.square() + 0.25 * g.square().mean()) ** exponent
    torch.testing.assert_close(before - model.weight.detach(), step)


@pytest.mark.parametrize("build_optimiser", [shampoo, tnt])
def test_the_report_says_which_factors_are_cut(build_optimiser: Callable[..., object]) -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 600), nn.LayerNorm(600))
    table, matrix, *norm = (str(line) for line in build_optimiser(model).coverage)  # type: ignore[attr-defined]
    assert table.startswith("0.weight: Entries, 40 of 1 x 1 ")
    assert "3 of 200 x 200 by 1 of 4 x 4 and 600 of 1 x 1 (" in matrix
    assert all(", 600 of 1 x 1 (" in line for line in norm)
    assert isinstance(build_optimiser(model)._blocks[0], Entries)  # type: ignore[attr-defined]


@pytest.mark.parametrize("build_optimiser", [shampoo, tnt])
def test_what_the_state_takes_is_what_the_report_says(build_optimiser: Callable[..., torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 10))
    optimiser = build_optimiser(model, momentum=0.0, tensors=Tensors(Flattening.NONE, largest=7, vectors=5))
    model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    optimiser.step()
    held = sum(x.numel() * x.itemsize for state in optimiser.state.values() for x in state.values())
    assert held == sum(layer.bytes for layer in optimiser.coverage)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flattening": "filters"}, "Flattening.FILTERS"),
        ({"largest": 0}, "largest=0"),
        ({"vectors": 0}, "vectors=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tensors(**options)  # type: ignore[arg-type]


def test_an_exponent_that_is_none_of_the_two_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exponent=-0\.25: give -0\.5"):
        shampoo(nn.Linear(2, 2), exponent=-0.25)
