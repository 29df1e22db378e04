from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import draw
from quadric.comm.communicator import Communicator, Solo
from quadric.linalg.krylov import ConjugateGradient
from quadric.linalg.operator import Identity, Shifted
from quadric.linalg.solver import Iterate
from quadric.linalg.truncation import FixedIterations
from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.optim.block_inverse import BlockCurvature
from quadric.optim.descent import LocalModel
from quadric.optim.mini_block import MiniBlocks
from reference.ranks import run

FRAMES = 12


def data() -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of 12 frames each."""
    return [(draw(FRAMES, 5, seed=s), (torch.arange(FRAMES) * (s + 1)) % 3) for s in (3, 4)]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()


def operator(objective: Objective, damping: float, preconditioner: BlockCurvature) -> Tensor:
    """The inverse as a matrix."""
    theta = objective.space.point()
    local = LocalModel(theta, 0.0, torch.zeros_like(theta), Identity(objective.space.size))
    M = preconditioner.operator(objective, local, (), damping)
    assert M is not None and not callable(M)
    return torch.stack([M @ e for e in torch.eye(objective.space.size, dtype=theta.dtype)])


def of_frames(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """The gradient of each frame's loss."""
    gradients = []
    for x, y in batches:
        for f in range(len(x)):
            loss = nn.functional.cross_entropy(network(x[f : f + 1]), y[f : f + 1])
            gradients.append(list(torch.autograd.grad(loss, list(network.parameters()))))
    return gradients


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_kronecker_factors_of_all_frames(damping: float) -> None:
    """The first layer's A and G frame by frame; of the vectors, micro-batches as if of one frame each."""
    network, batches = model(), data()
    found = operator(Objective(network, CrossEntropy(), batches), damping, BlockCurvature(floor=1e-3))
    x = torch.cat([x for x, _ in batches])
    a = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    g = torch.stack([gradient[1] for gradient in of_frames(network, batches)])  # that of a bias is that of the output
    A, G = a.T @ a / len(a), g.T @ g / len(g)
    of_A, of_G = A.trace() / 6, G.trace() / 4
    share = max(1e-3, damping / float(of_A * of_G))
    P = torch.kron(
        torch.linalg.inv(G + share**0.5 * of_G * torch.eye(4, dtype=x.dtype)),
        torch.linalg.inv(A + share**0.5 * of_A * torch.eye(6, dtype=x.dtype)),
    )
    weights, biases = [6 * o + i for o in range(4) for i in range(5)], [6 * o + 5 for o in range(4)]
    torch.testing.assert_close(found[:24, :24], P[weights + biases][:, weights + biases])
    squares = torch.zeros(4, dtype=x.dtype)
    for x, y in batches:
        loss = nn.functional.cross_entropy(network(x), y, reduction="sum") / (2 * FRAMES)
        squares += 2 * FRAMES * torch.autograd.grad(loss, network[2].bias)[0] ** 2
    shift = max(damping, 1e-3 * float(squares.mean()))
    torch.testing.assert_close(found[28:32, 28:32], torch.diag(1 / (squares + shift)))
    assert not found[:24, 24:].any()


def test_nothing_is_left_behind() -> None:
    network = model()
    objective = Objective(network, CrossEntropy(), data())
    kept = [torch.ones_like(p) for p in network.parameters()]
    for p, gradient in zip(network.parameters(), kept, strict=True):
        p.grad = gradient
    before = objective.space.point()
    operator(objective, 0.1, BlockCurvature())
    assert all(p.grad is gradient for p, gradient in zip(network.parameters(), kept, strict=True))
    assert torch.equal(objective.space.point(), before)
    assert not any(module._forward_hooks for module in network.modules())


def test_conjugate_gradients_need_fewer_iterations() -> None:
    """On a layer whose inputs are of very different sizes: A x I is its curvature, A x G the preconditioner."""
    torch.manual_seed(0)
    network = nn.Linear(30, 3).double()
    x = draw(400, 30) * torch.logspace(0, 3, 30, dtype=torch.float64)
    objective = Objective(network, SquaredError(), [(x, network(x).detach() + draw(400, 3, seed=1))])
    theta = objective.space.point()
    value, gradient = objective.value_and_grad(theta)
    B = Shifted(objective.curvature(theta, Curvature.GAUSS_NEWTON), 1e-6)
    local = LocalModel(theta, value, gradient, B)
    M = BlockCurvature(floor=1e-12).operator(objective, local, (), 1e-6)
    matrix = torch.stack([B @ e for e in torch.eye(B.size, dtype=theta.dtype)])
    lowest = -0.5 * float(gradient @ torch.linalg.solve(matrix, gradient))

    def needed(inverse: Any) -> int:
        found = ConjugateGradient(400, FixedIterations(400)).iterates(B, -gradient, M=inverse)
        return next(point.step for point in found if isinstance(point, Iterate) and point.model <= 0.99 * lowest)

    assert needed(M) < 0.3 * needed(None)


def whole(communicator: Communicator = Solo()) -> bytes:
    batches = data()
    own = batches if communicator.size == 1 else batches[communicator.rank : communicator.rank + 1]
    objective = Objective(model(), CrossEntropy(), own, communicator=communicator)
    return operator(objective, 0.3, BlockCurvature()).numpy().tobytes()


@pytest.mark.distributed
def test_ranks_have_the_same_as_one(tmp_path: Path) -> None:
    first, second = run(tmp_path, 2, whole)
    assert first == second
    found, expected = (torch.frombuffer(bytearray(made), dtype=torch.float64) for made in (first, whole()))
    torch.testing.assert_close(found, expected)


def test_blocks_of_gradients_serve_too() -> None:
    found = operator(Objective(model(), CrossEntropy(), data()), 0.3, BlockCurvature(MiniBlocks()))
    assert bool((torch.linalg.eigvalsh((found + found.T) / 2) > 0).all())
    torch.testing.assert_close(found, found.T)


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"floor=0\.0: must be positive, or M is singular"):
        BlockCurvature(floor=0.0)
