"""Jobs for several ranks that train by the block-diagonal family, and the same for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import cases
from cases import draw
from quadric.comm.communicator import Communicator, Solo
from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective
from quadric.optim.block_diagonal import BlockDiagonal, Schedule

BATCH = 12


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)
    ).double()


def share(communicator: Communicator, step: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a batch."""
    x, y = draw(BATCH, 2, 5, seed=step), torch.arange(BATCH) % 4
    return x[communicator.rank :: communicator.size], y[communicator.rank :: communicator.size]


class Counted:
    """A block's refreshes, counted."""

    def __init__(self, optimizer: BlockDiagonal) -> None:
        self.calls = 0
        for block in optimizer._blocks:
            block.refresh = self._counting(block.refresh)  # type: ignore[method-assign]

    def _counting(self, refresh: Any) -> Any:
        def counted(*args: Any) -> None:
            self.calls += 1
            refresh(*args)

        return counted


def train(communicator: Communicator = Solo(), name: str = "", way: str = "objective") -> tuple[bytes, int]:
    """The parameters after six steps, and how many blocks this rank has inverted."""
    model: nn.Module = network()
    wrapped = nn.parallel.DistributedDataParallel(model) if way == "ddp" and communicator.size > 1 else model
    schedule = Schedule(statistics=2, inverses=4)
    optimizer = cases.FAMILY[name](model, lr=0.01, schedule=schedule, communicator=communicator)
    counted = Counted(optimizer)
    for step in range(6):
        x, y = share(communicator, step)
        if way == "objective":
            optimizer.step(Objective(model, CrossEntropy(), [(x, y)], communicator=communicator))
        else:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                value = functional.cross_entropy(wrapped(x), y)
                value.backward()
                return value

            if optimizer.wants_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes(), counted.calls


def trainings(communicator: Communicator = Solo()) -> dict[tuple[str, str], tuple[bytes, int]]:
    """Of every member, by an objective and by DistributedDataParallel."""
    return {(name, way): train(communicator, name, way) for name in cases.FAMILY for way in ("objective", "ddp")}
