"""A worker: takes parameters, computes on units of data, sends what its strategy makes of them."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.comm.compression import Compressor
from quadric.comm.message import Message
from quadric.loss.loss import Loss
from quadric.objective.objective import Objective
from quadric.options import check_whole
from quadric.parallel.exchange import Answer, Push, Vector, Verdict
from quadric.parallel.units import Units
from quadric.space import ParameterSpace

Flat = Float[Tensor, " n"]


class Link(ABC):
    """The way to the shards of a server."""

    @abstractmethod
    def pull(self) -> list[Answer]:
        """The parameters of each shard."""

    @abstractmethod
    def push(self, pushes: Sequence[Push]) -> list[Answer]:
        """Sends each shard its push; each is applied once, also where it has to be sent again."""


class Report(NamedTuple):
    """Of one unit.

    Attributes:
        worker: who did it.
        unit: its number.
        settled: whether nothing is left to be done about it.
        loss: the mean loss of its minibatches, before them.
        frames: of its data.
        staleness: the largest of its pushes.
        sent: bytes.
        verdicts: of the shards, by name.
        lives: of the shards.
    """

    worker: int
    unit: int
    settled: bool
    loss: float
    frames: int
    staleness: int
    sent: int
    verdicts: tuple[str, ...]
    lives: tuple[int, ...]


class Strategy(ABC):
    """What a worker does with a unit, and what it sends."""

    fresh = True
    """Whether a worker begins a unit at the server's parameters, and not at its own."""

    @abstractmethod
    def run(self, worker: Worker, unit: int) -> tuple[Flat, float]:
        """What is sent for the unit, and the mean loss."""

    def forget(self) -> None:  # noqa: B027
        """Begins anew, as what it has kept may not be finite."""


class Gradients(Strategy):
    """Sends gradients (asynchronous SGD; Dean et al., 2012).

    Of a unit of several minibatches it sends their sum, each computed after plain steps on those before, where the
    server takes plain steps as well; otherwise their mean, all computed at one point.
    """

    def run(self, worker: Worker, unit: int) -> tuple[Flat, float]:
        minibatches, total, value = worker.units[unit], None, 0.0
        for number, batches in enumerate(minibatches):
            value += worker.gradient(unit, number, batches) / len(minibatches)
            gradient = worker.space.flatten(_gradients(worker.space))
            total = gradient if total is None else total.add_(gradient)
            if worker.rate is not None and number + 1 < len(minibatches):
                worker.shift(gradient, -worker.rate)
        assert total is not None
        return (total if worker.rate is not None else total.div_(len(minibatches))), value


@dataclass
class Local(Strategy):
    """Steps of a worker's own optimiser, its rate moved on with the number of minibatches before, whoever did them."""

    inner: Callable[[nn.Module], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None = None

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._moved = 0

    def steps(self, worker: Worker, unit: int) -> float:
        """One for each minibatch of the unit; the mean loss."""
        if self._optimizer is None:
            self._optimizer = self.inner(worker.model)
            self._scheduler = self.schedule(self._optimizer) if self.schedule else None
        minibatches, value = worker.units[unit], 0.0
        for number, batches in enumerate(minibatches):
            self._move_to(unit * worker.units.every + number)
            value += worker.gradient(unit, number, batches) / len(minibatches)
            self._optimizer.step()
        return value

    def _move_to(self, minibatch: int) -> None:
        """The rate, without a word about the steps between, which others have taken."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            while self._scheduler is not None and self._moved < minibatch:
                self._scheduler.step()
                self._moved += 1


@dataclass
class Elastic(Local):
    """Elastic averaging (Zhang, Choromanska and LeCun, 2015), asynchronous.

    A worker keeps parameters x of its own. After each unit it is drawn to the server's, c, by d = alpha (x - c), and
    these to it: x <- x - d, c <- c + d. The server's rule is a plain step of rate one.

    Attributes:
        alpha: of the spring.
    """

    alpha: float = 0.5
    fresh = False

    def run(self, worker: Worker, unit: int) -> tuple[Flat, float]:
        value = self.steps(worker, unit)
        center = worker.pull()
        d = worker.space.point().sub_(center).mul_(self.alpha)
        worker.shift(d, -1.0)
        return d.neg_(), value


@dataclass
class OuterSteps(Local):
    """Local steps, whose sum is a gradient to the server (DiLoCo; Douillard et al., 2023), asynchronous.

    A worker moves from theta to theta_H by a step for each minibatch of a unit and sends theta - theta_H. The server's
    rule is Nesterov's momentum. DiLoCo's workers wait for each other, and the server steps along their mean; here it
    steps along each as it comes, so that N workers move it N times as far: give a smaller rate with more of them.
    """

    def run(self, worker: Worker, unit: int) -> tuple[Flat, float]:
        start = worker.space.point()
        value = self.steps(worker, unit)
        return start.sub_(worker.space.point()), value


class Worker:
    """Computes on the units that it is given.

    Args:
        model: of its own, whose parameters it moves.
        loss: of the model's output.
        units: the training's.
        link: to the shards.
        sizes: their numbers of parameters, in the order of the parameter vector.
        strategy: what is computed and sent.
        number, incarnation: of the worker, and of its process.
        clip: the largest norm of what is sent; longer vectors are shortened to it. None: they are sent as they are.
        compressors: one for each shard; None: vectors are sent as they are. Of what a shard refuses nothing stays in
            them: it is computed again, here or by another.
        whole: vectors of units below this number are sent as they are, also where there are compressors.
        autocast: as an `Objective` has it.
        seed: of random layers.

    Attributes:
        rate: by which the server would multiply a gradient, where it takes plain steps.
        compressors: with what is still to be sent.

    Raises:
        ValueError: ``sizes`` are not those of the model, ``compressors`` not one for each; ``clip`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        units: Units,
        link: Link,
        sizes: Sequence[int],
        *,
        strategy: Strategy | None = None,
        number: int = 0,
        incarnation: int = 1,
        clip: float | None = None,
        compressors: Sequence[Compressor] | None = None,
        whole: int = 0,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.loss, self.units = model, loss, units
        self.space = ParameterSpace(model)
        check_whole(number=number, incarnation=incarnation)
        if sum(sizes) != self.space.size:
            raise ValueError(f"sizes sum to {sum(sizes)}: the model has {self.space.size} parameters")
        if compressors is not None and len(compressors) != len(sizes):
            raise ValueError(f"compressors: {len(compressors)} for {len(sizes)} shards: give one for each")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip}: must be positive, or None")
        self.rate: float | None = None
        self._link, self._sizes, self._strategy = link, list(sizes), strategy or Gradients()
        self._number, self._incarnation, self._sequence = number, incarnation, 0
        self._clip, self.compressors, self._whole = clip, list(compressors or ()), whole
        self._autocast, self._seed = autocast, seed
        self._answers: list[Answer] | None = None
        self._begun = False

    def do(self, unit: int) -> Report:
        """Computes on a unit and sends it, again where it has grown too old meanwhile.

        Where even the second time it has, the unit is not settled.
        """
        if self._answers is None:
            self.pull()
        if self._strategy.fresh or not self._begun:
            self._load()
            self._begun = True
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        for _ in range(2):
            vector, value = self._strategy.run(self, unit)
            verdicts, staleness, sent = self._send(unit, vector)
            if Verdict.NOT_FINITE in verdicts:
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            if Verdict.STALE not in verdicts or not self._strategy.fresh:
                break
            self._load()
        assert self._answers is not None
        return Report(
            self._number,
            unit,
            all(verdict.settles for verdict in verdicts),
            value,
            self.units.frames(unit),
            staleness,
            sent,
            tuple(verdict.name for verdict in verdicts),
            tuple(answer.life for answer in self._answers),
        )

    def gradient(self, unit: int, number: int, batches: Sequence[tuple[object, ...]]) -> float:
        """Sets the gradients to those of a minibatch, by its number within a unit; returns the loss."""
        self.model.train()
        place = hash((self._seed, unit * self.units.every + number)) % 2**31
        objective = Objective(self.model, self.loss, batches, autocast=self._autocast, seed=place)
        return float(objective())

    def pull(self) -> Flat:
        """The server's parameters, which the next push is of; the worker's own stay."""
        self._hear(self._link.pull())
        return self._theirs()

    def shift(self, vector: Flat, factor: float) -> None:
        """Adds to the worker's own parameters."""
        with torch.no_grad():
            for parameter, part in zip(self.space.parameters, self.space.split(vector), strict=True):
                parameter.add_(part, alpha=factor)

    def _hear(self, answers: list[Answer]) -> None:
        self._answers, self.rate = answers, answers[0].rate

    def _theirs(self) -> Flat:
        assert self._answers is not None
        return torch.from_numpy(np.concatenate([answer.theta for answer in self._answers])).to(self.space.device)

    def _load(self) -> None:
        assign(self.space, self._theirs())

    def _send(self, unit: int, vector: Flat) -> tuple[list[Verdict], int, int]:
        """Sends each shard its part; the verdicts, the largest staleness, and the bytes."""
        assert self._answers is not None
        norm = float(torch.linalg.vector_norm(vector))
        if self._clip is not None and norm > self._clip:
            vector = vector.mul_(self._clip / norm)
        contents: Sequence[Vector | Message | None] = [None] * len(self._sizes)
        before = [copy.copy(compressor) for compressor in self.compressors]
        if math.isfinite(norm):
            parts = vector.cpu().split(self._sizes)
            contents = [part.numpy() for part in parts]
            if self.compressors and unit >= self._whole:
                contents = [each.compress(part) for each, part in zip(self.compressors, parts, strict=True)]
        else:
            self._strategy.forget()
            self._begun = False
        me = (self._number, self._incarnation, self._sequence, unit)
        pushes = [Push(*me, a.life, a.clock, c) for a, c in zip(self._answers, contents, strict=True)]
        self._sequence += 1
        self._hear(self._link.push(pushes))
        verdicts = [a.verdict for a in self._answers if a.verdict is not None]
        # What is refused is computed again, or was computed by another: nothing of it may be sent later.
        for place, (verdict, compressor) in enumerate(zip(verdicts, before, strict=False)):
            if not verdict.arrived:
                self.compressors[place] = compressor
        staleness = max(answer.staleness for answer in self._answers)
        return verdicts, staleness, sum(content.nbytes for content in contents if content is not None)


@torch.no_grad()
def assign(space: ParameterSpace, theta: Flat) -> None:
    """Gives the parameters of ``space`` these values."""
    for parameter, part in zip(space.parameters, space.split(theta.to(space.device)), strict=True):
        parameter.copy_(part)


def _gradients(space: ParameterSpace) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in space.parameters]
