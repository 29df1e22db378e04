"""What every block of the block-diagonal family promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cases
from cases import draw
from quadric.optim.blocks import Block, Numbers, Seen

OF_GRADIENTS = {cls.__name__: make for cls, make in cases.BLOCKS.items() if not cls.wants_calls}


@pytest.fixture(params=OF_GRADIENTS.values(), ids=list(OF_GRADIENTS))
def block(request: pytest.FixtureRequest) -> Block:
    make: Callable[[], Block] = request.param
    return make()


def observed(block: Block) -> tuple[Numbers, list[torch.Tensor]]:
    numbers: Numbers = {}
    gradient = [draw(*p.shape, seed=k) for k, p in enumerate(block.layer.parameters)]
    block.observe(numbers, Seen(gradient), 1.0)
    return numbers, gradient


def test_the_mean_curvature_of_one_gradient_is_the_mean_of_its_squares(block: Block) -> None:
    numbers, gradient = observed(block)
    squares = torch.cat([g.flatten() for g in gradient]).square()
    torch.testing.assert_close(block.mean_curvature(numbers), squares.mean())


def test_the_inverse_is_symmetric_and_positive_definite(block: Block) -> None:
    numbers, _ = observed(block)
    block.refresh(numbers, 0.1)
    shapes = [p.shape for p in block.layer.parameters]
    size = sum(shape.numel() for shape in shapes)
    rows = []
    for e in torch.eye(size, dtype=torch.float64):
        pieces = [piece.view(shape) for piece, shape in zip(e.split([s.numel() for s in shapes]), shapes, strict=True)]
        rows.append(torch.cat([step.flatten() for step in block.apply(numbers, pieces)]))
    P = torch.stack(rows)
    torch.testing.assert_close(P, P.T)
    assert float(torch.linalg.eigvalsh(P).min()) > 0


def test_it_says_how_large_it_is(block: Block) -> None:
    """As many numbers as it keeps, statistics and inverses."""
    numbers, _ = observed(block)
    block.refresh(numbers, 0.1)
    assert block.elements == sum(x.numel() for x in numbers.values())
    assert block.work > 0 and block.shape
    assert {name for name in numbers if name.startswith("statistics_")} == {
        name.replace("inverse_", "statistics_") for name in numbers if name.startswith("inverse_")
    }
