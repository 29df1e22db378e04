"""Jobs for several ranks that train by the block-diagonal family, and the same for one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import cases
from cases import draw
from quadric.comm.communicator import Communicator, Solo
from quadric.loss.loss import CrossEntropy
from quadric.objective.objective import Objective
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.kbfgs import kbfgs
from quadric.optim.kfac import KroneckerFactors, kfac
from quadric.optim.length import Natural
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher

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


NATURAL = {
    "kfac": partial(kfac, factors=KroneckerFactors(pi="one")),
    "kfac, reduce": partial(kfac, factors=KroneckerFactors(sharing="reduce", pi="one")),
    "kbfgs": kbfgs,
    "per example": partial(mini_block_fisher, blocks=MiniBlocks(per_example=True)),
    "per example, rows": partial(mini_block_fisher, blocks=MiniBlocks(False, per_example=True)),
}
"""Members whose steps of this length follow the size of statistics of calls."""


def parts_of(step: int, equal: bool) -> list[tuple[Tensor, Tensor]]:
    """Of a batch, for two ranks; only the first has any in the third step of parts that are not equal."""
    x, y = draw(BATCH, 2, 5, seed=step), torch.arange(BATCH) % 4
    first = BATCH // 2 if equal else (7, 2, BATCH)[step % 3]
    return [(x[:first], y[:first]), (x[first:], y[first:])]


def natural(communicator: Communicator, name: str, way: str) -> tuple[bytes, bytes]:
    """The parameters and the statistics after three steps of parts of a batch, on one rank or on two."""
    model: nn.Module = network()
    alone = communicator.size == 1
    wrapped = model if alone or way != "ddp" else nn.parallel.DistributedDataParallel(model)
    optimizer = NATURAL[name](
        model,
        lr=1e-3,
        length=Natural(),
        schedule=Schedule(statistics=1, inverses=2),
        communicator=communicator,
        fisher="sampled" if way == "sampled" else "empirical",
    )
    for step in range(3):
        parts = parts_of(step, equal=way == "ddp")
        if not alone:
            parts = parts[communicator.rank :][:1]
        if way != "ddp":
            batches = [part for part in parts if len(part[0])]
            optimizer.step(Objective(model, CrossEntropy(), batches, communicator=communicator))
            continue

        def closure(parts: list[tuple[Tensor, Tensor]] = parts) -> Tensor:
            optimizer.zero_grad()
            x, y = (torch.cat(own) for own in zip(*parts, strict=True))
            value = functional.cross_entropy(wrapped(x), y)
            value.backward()
            return value

        optimizer.step(closure)
    statistics = [
        x.tril() for p in model.parameters() for name, x in optimizer.state[p].items() if "statistics" in name
    ]
    flat = [torch.cat([x.detach().flatten() for x in xs]) for xs in (model.parameters(), statistics)]
    return flat[0].numpy().tobytes(), flat[1].numpy().tobytes()


def natural_trainings(communicator: Communicator = Solo()) -> dict[tuple[str, str], tuple[bytes, bytes]]:
    return {
        (name, way): natural(communicator, name, way) for name in NATURAL for way in ("objective", "sampled", "ddp")
    }


def strangers(communicator: Communicator) -> str:
    """What an optimiser says that knows of no ranks, of an objective of several."""
    model = network()
    optimizer = kfac(model)
    objective = Objective(model, CrossEntropy(), [share(communicator, 0)], communicator=communicator)
    try:
        optimizer.step(objective)
    except ValueError as error:
        return str(error)
    return ""


def refused_shards(communicator: Communicator) -> str:
    """What an optimiser says of parameters that FSDP has sharded."""
    model = network().float()
    fully_shard(model, mesh=init_device_mesh("cpu", (communicator.size,)))
    try:
        mini_block_fisher(model)
    except ValueError as error:
        return str(error)
    return ""


def refusals(communicator: Communicator) -> tuple[str, str]:
    return strangers(communicator), refused_shards(communicator)
