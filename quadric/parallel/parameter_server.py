"""A parameter server of Ray actors: shards that Ray starts again where they die, and that go on from their checkpoints.

They are detached and have names: a driver that is started again finds them.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.parallel.actors import heard
from quadric.parallel.engine import cloudpickle, ray
from quadric.parallel.exchange import Answer, Push
from quadric.parallel.partition import hollow, partition
from quadric.parallel.shard import Bounds, Rule, Shard, begin
from quadric.parallel.worker import assign
from quadric.space import ParameterSpace


class ParameterServer:
    """The shards of a model's parameters, found by their names or started.

    Args:
        name: of the training, unique in the cluster.
        model: whose parameters, of one type, are served; they are where training starts.
        rule: makes the optimiser of a part of the model. Those that see calls or losses cannot be it.
        folder: of the checkpoints, which all nodes with a shard see.
        shards: how many.
        units: of data that the training has.
        schedule: of the rule's learning rate.
        bounds: what is accepted.

    Attributes:
        shards: the actors.
        sizes: their numbers of parameters.

    Raises:
        ValueError: ``shards`` does not fit the model, or its parameters are neither float32 nor float64; the
            checkpoints are of another training.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        rule: Rule,
        *,
        folder: Path,
        shards: int = 1,
        units: int = 0,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        bounds: Bounds = Bounds(),
    ) -> None:
        parts = partition(model, shards)
        self.sizes = [ParameterSpace(part).size for part in parts]
        places = [folder / f"shard-{number}" for number in range(len(parts))]
        for part, place in zip(parts, places, strict=True):  # all are sound before the first actor starts
            begin(part, place, units=units)
        self.shards = []
        for number, (part, place) in enumerate(zip(parts, places, strict=True)):
            options = {"folder": place.resolve(), "schedule": schedule, "bounds": bounds}
            actor = _ShardActor.options(  # type: ignore[attr-defined]
                name=f"{name}-{number}", lifetime="detached", get_if_exists=True, num_cpus=0,
                max_restarts=-1, max_task_retries=-1,
            )  # fmt: skip
            self.shards.append(actor.remote(packed(part), rule, options))

    def theta(self) -> Float[Tensor, " n"]:
        """What the rule is to be judged by: the average, where it keeps one."""
        return torch.cat([torch.from_numpy(part.copy()) for part in self._ask("average")])

    def load_into(self, model: nn.Module) -> None:
        """Gives a model the parameters that the rule is to be judged by."""
        assign(ParameterSpace(model), self.theta())

    def applied(self) -> list[Tensor]:
        """Of each shard, which units it has applied."""
        return self._ask("applied")

    def counts(self) -> list[Mapping[str, Any]]:
        """Of each shard, as `Shard.counts`, and of its process ``pid`` and ``cpu``, the seconds it has computed."""
        return self._ask("counts")

    def save(self) -> None:
        """Makes the state of all shards their checkpoints."""
        self._ask("save")

    def stop(self) -> None:
        """Ends the shards, without a checkpoint."""
        for shard in self.shards:
            ray.kill(shard, no_restart=True)

    def _ask(self, what: str) -> list[Any]:
        return [heard(call) for call in [partial(getattr(shard, what).remote) for shard in self.shards]]


def packed(part: nn.Module) -> bytes:
    """A part without its numbers, in few bytes: Ray keeps those with the actor, for each of its starts.

    What is larger than 100 kB it would keep with the driver, which may be gone when a shard is started again.
    """
    return zlib.compress(cloudpickle.dumps(hollow(part)))


@ray.remote
class _ShardActor:
    """A `Shard` in a process of its own."""

    def __init__(self, part: bytes, rule: Rule, options: dict[str, Any]) -> None:
        self._shard = Shard(cloudpickle.loads(zlib.decompress(part)), rule, **options)

    def pull(self) -> Answer:
        return self._shard.pull()

    def push(self, push: Push) -> Answer:
        return self._shard.push(push)

    def average(self) -> Any:
        return self._shard.average()

    def applied(self) -> Tensor:
        return self._shard.applied

    def counts(self) -> Mapping[str, Any]:
        return {**self._shard.counts(), "cpu": time.process_time(), "pid": os.getpid()}

    def save(self) -> int:
        return self._shard.save()
