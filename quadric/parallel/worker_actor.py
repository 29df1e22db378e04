"""A worker as a Ray actor: what its process needs, and no more, as another has to be there soon after one has died."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quadric.comm.compression import Compressor
from quadric.loss.loss import Loss
from quadric.parallel.actors import ActorLink
from quadric.parallel.engine import ray
from quadric.parallel.units import Units
from quadric.parallel.worker import Gradients, Report, Strategy, Worker
from quadric.space import ParameterSpace


@dataclass(frozen=True)
class Work:
    """What every worker needs.

    Attributes:
        model, loss, units, strategy, clip, whole, autocast, seed: as in `Worker`.
        compressor: makes that of a shard, from the shapes of its parameters.
    """

    model: nn.Module
    loss: Loss
    units: Units
    strategy: Strategy = field(default_factory=Gradients)
    clip: float | None = None
    compressor: Callable[[Sequence[torch.Size]], Compressor] | None = None
    whole: int = 0
    autocast: torch.dtype | None = None
    seed: int = 0


class Done(NamedTuple):
    """Of a lease: a report of each unit, and the running statistics of the worker's model."""

    reports: list[Report]
    buffers: list[Tensor]
    seconds: float


@ray.remote
class WorkerActor:
    """A `Worker` in a process of its own."""

    def __init__(self, work: Work, shards: Sequence[Any], sizes: Sequence[int], number: int) -> None:
        torch.set_num_threads(1)
        self._work, self._link, self._sizes, self._number = work, ActorLink(shards), sizes, number

    def begin(self, incarnation: int, buffers: Sequence[Tensor]) -> int:
        """Makes the worker, with these running statistics; the number of the process."""
        work, model = self._work, copy.deepcopy(self._work.model)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        compressors = None
        if work.compressor is not None:
            compressors = [work.compressor(shapes) for shapes in _shapes(work.model, self._sizes)]
        self._worker = Worker(
            model,
            work.loss,
            work.units,
            self._link,
            self._sizes,
            strategy=copy.deepcopy(work.strategy),
            number=self._number,
            incarnation=incarnation,
            clip=work.clip,
            compressors=compressors,
            whole=work.whole,
            autocast=work.autocast,
            seed=work.seed,
        )
        return os.getpid()

    def do(self, units: Sequence[int]) -> Done:
        start = time.monotonic()
        reports = [self._worker.do(unit) for unit in units]
        return Done(reports, [b.cpu().clone() for b in self._worker.model.buffers()], time.monotonic() - start)


def _shapes(model: nn.Module, sizes: Sequence[int]) -> list[list[torch.Size]]:
    """Of each shard, those of its parameters."""
    left = [p.shape for p in ParameterSpace(model).parameters]
    found: list[list[torch.Size]] = []
    for size in sizes:
        found.append([])
        while sum(map(math.prod, found[-1])) < size:
            found[-1].append(left.pop(0))
    return found
