from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quadric.optim.blocks import Numbers, Seen, inverse, power
from quadric.optim.layers import find_layers
from quadric.optim.mini_block import MiniBlocks, gram_
from reference import mini_blocks

MODULES = {
    "linear": lambda: nn.Linear(7, 4),
    "linear without bias": lambda: nn.Linear(7, 4, bias=False),
    "1 x 1": lambda: nn.Conv2d(7, 4, 1),
    "conv1d": lambda: nn.Conv1d(3, 2, 5),
    "conv2d": lambda: nn.Conv2d(3, 2, (2, 3)),
    "grouped": lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 2, bias=False),
    "layer norm": lambda: nn.LayerNorm(5, bias=False),
    "embedding": lambda: nn.Embedding(6, 3),
}


def kind_of(name: str, averaged: bool) -> str:
    if name in ("linear", "linear without bias", "1 x 1"):
        return "averaged" if averaged else "rows"
    return "kernels" if name in ("conv1d", "conv2d", "grouped", "transposed") else "entries"


def gradients(module: nn.Module, count: int, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in module.parameters()] for _ in range(count)
    ]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", MODULES)
@given(
    seed=st.integers(0, 2**31),
    averaged=st.booleans(),
    exponent=st.sampled_from([-1.0, -0.5]),
    largest=st.sampled_from([2, 3, 100]),
    damping=st.sampled_from([0.01, 1.0]),
)
def test_the_direction_is_that_of_the_dense_matrix(
    name: str, seed: int, averaged: bool, exponent: float, largest: int, damping: float
) -> None:
    module = MODULES[name]().double()
    (layer,) = find_layers(module, module.parameters())
    block = MiniBlocks(averaged=averaged, largest=largest, exponent=exponent)(layer)
    *seen, momentum = gradients(module, 4, seed)
    numbers: Numbers = {}
    for n, gradient in enumerate(seen):
        block.observe(numbers, Seen(gradient), 1 / (n + 1))
    block.refresh(numbers, damping)
    found = flat(list(block.apply(numbers, momentum)))

    kind, shape, bias = kind_of(name, averaged), tuple(layer.weight.shape), layer.bias is not None
    inputs = layer.weight[0].numel()
    count = -(-inputs // largest)
    widths = [inputs // count + (k < inputs % count) for k in range(count)]
    widths[-1] += bias
    blocks = mini_blocks.groups(kind, shape, bias, widths)
    vectors = [flat(gradient) for gradient in seen]
    shift = damping * float(torch.stack(vectors).square().mean())
    alike = len(widths) if kind == "averaged" else 0
    expected = mini_blocks.direction(vectors, flat(momentum), blocks, alike, shift, exponent)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_averaged_blocks_are_shampoo_from_the_right_without_its_root() -> None:
    """D (D'D / O + lambda I)^-1, by a solve."""
    module = nn.Linear(7, 4, bias=False).double()
    (layer,) = find_layers(module, module.parameters())
    block, numbers = MiniBlocks(largest=7)(layer), {}
    ((D,), (M,)) = gradients(module, 2, 0)
    block.observe(numbers, Seen([D]), 1.0)
    block.refresh(numbers, 0.1)
    S = D.T @ D / 4
    damped = S + 0.1 * S.trace() / 7 * torch.eye(7, dtype=S.dtype)
    torch.testing.assert_close(block.apply(numbers, [M])[0], torch.linalg.solve(damped, M.T).T)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), columns=st.integers(1, 600))
def test_a_gram_matrix_in_stripes(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    S = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    expected = (0.3 * S + 0.7 * D.T @ D).tril()
    gram_(S, D, 0.3, 0.7)
    torch.testing.assert_close(S.tril(), expected)


@given(seed=st.integers(0, 2**31), rank=st.integers(0, 4), damping=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_inverses_of_low_rank_by_the_lower_half_alone(seed: int, rank: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(3, rank, 5, generator=generator, dtype=torch.float64)
    S = D.mT @ D
    shift = torch.full((3,), damping, dtype=S.dtype)
    halves = S.tril() + torch.full_like(S, torch.nan).triu(1)
    expected = torch.linalg.inv(S + damping * torch.eye(5, dtype=S.dtype))
    for found in (inverse(halves, shift), power(halves, shift, -1.0)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    root = power(S, shift, -0.5)
    torch.testing.assert_close(root @ root, expected, rtol=1e-6, atol=1e-6)


def test_where_cholesky_fails_eigenvalues_serve() -> None:
    """In float32, damping far below the rounding of S: what is asked for is still what is got where it can be."""
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(40, 3, generator=generator)
    S = torch.stack([D @ D.T, 2 * torch.eye(40)])
    shift = torch.tensor([1e-9, 1.0])
    assert torch.linalg.cholesky_ex(S[0] + 1e-9 * torch.eye(40)).info > 0
    found = inverse(S, shift)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], torch.eye(40) / 3)
    free = torch.linalg.svd(D).U[:, 3:]
    assert (free.T @ found[0] @ free).diagonal().min() > 1e3  # the null space of S is hardly damped


def test_layers_without_curvature_move_by_their_gradient() -> None:
    module = nn.Linear(3, 2).double()
    (layer,) = find_layers(module, module.parameters())
    block, numbers = MiniBlocks()(layer), {}
    block.observe(numbers, Seen([torch.zeros_like(p) for p in layer.parameters]), 1.0)
    block.refresh(numbers, 0.5)
    momentum = [torch.ones_like(p) for p in layer.parameters]
    for found, m in zip(block.apply(numbers, momentum), momentum, strict=True):
        torch.testing.assert_close(found, 2 * m)


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"exponent=-0.25: give -1 .* or -0.5"):
        MiniBlocks(exponent=-0.25)
    with pytest.raises(ValueError, match="largest=0: a block has at least one input"):
        MiniBlocks(largest=0)
