"""Shards without processes: a small part of a model, pushes to it, and a way to several of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from quadric.optim.averaged import averaged_sgd
from quadric.optim.mini_block import mini_block_fisher
from quadric.parallel.exchange import NO_UNIT, Answer, Push
from quadric.parallel.partition import hollow, partition
from quadric.parallel.shard import Bounds, Rule, Shard, begin
from quadric.parallel.worker import Link

UNITS, SIZE = 6, 11
XU = {"lr": 0.3, "a": 0.5, "power": 0.75}


def part(kind: torch.dtype = torch.float64) -> nn.Module:
    """Of `SIZE` parameters."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).to(kind)


def shard(folder: Path, rule: Rule | None = None, *, module: nn.Module | None = None, **options: Any) -> Shard:
    """Of a part, as a process has it: without the numbers."""
    module = module or part()
    begin(module, folder, units=UNITS)
    return Shard(hollow(module), rule or xu, folder=folder, **options)


def vector(seed: int, kind: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(kind)


def push(sequence: int, content: Any, *, unit: int = NO_UNIT, worker: int = 0, of: Shard | None = None) -> Push:
    """At the first parameters, or those that a shard has now."""
    life, clock = (of.life, of.clock) if of else (1, 0)
    return Push(worker, 1, sequence, unit, life, clock, content)


def theta(of: Shard) -> np.ndarray:
    return of.pull().theta.copy()


def xu(module: nn.Module) -> Optimizer:
    return averaged_sgd(module.parameters(), **XU)


def late_average(module: nn.Module) -> Optimizer:
    return averaged_sgd(module.parameters(), **XU, start=2, every=2, weight_decay=0.1)


def nesterov(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


def adam(module: nn.Module) -> Optimizer:
    return Adam(module.parameters(), lr=0.05, amsgrad=True)


def family(module: nn.Module) -> Optimizer:
    return mini_block_fisher(module, lr=0.05)


def cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=8)


class Served(Link):
    """The shards of a model in this process. Answers are copies, as they are of other processes.

    ``heard`` are the pushes and the answers to them, in their order.
    """

    def __init__(
        self, model: nn.Module, rule: Rule, folder: Path, *, units: int, shards: int = 1, bounds: Bounds = Bounds()
    ) -> None:
        self.shards: list[Shard] = []
        self.heard: list[tuple[list[Push], list[Answer]]] = []
        for number, piece in enumerate(partition(model, shards)):
            begin(piece, folder / str(number), units=units)
            self.shards.append(Shard(hollow(piece), rule, folder=folder / str(number), bounds=bounds))

    @property
    def sizes(self) -> list[int]:
        return [shard.size for shard in self.shards]

    @property
    def theta(self) -> np.ndarray:
        return np.concatenate([theta(shard) for shard in self.shards])

    @property
    def average(self) -> np.ndarray:
        return np.concatenate([shard.average() for shard in self.shards])

    def pull(self) -> list[Answer]:
        return [_copied(shard.pull()) for shard in self.shards]

    def push(self, pushes: Sequence[Push]) -> list[Answer]:
        answers = [_copied(shard.push(push)) for shard, push in zip(self.shards, pushes, strict=True)]
        self.heard.append((list(pushes), answers))
        return answers


def _copied(answer: Answer) -> Answer:
    return answer._replace(theta=answer.theta.copy())
