"""Training by averaged stochastic gradient descent, as a job says it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.comm.communicator import Communicator, Solo
from quadric.data.examples import Stream
from quadric.loss.loss import Loss
from quadric.optim.averaged import AveragedSGD, averaged_sgd
from quadric.optim.rate import search_rate, sgd_cost
from quadric.train.method import Method
from quadric.train.rules import NONE_OR_POSITIVE, NOT_NEGATIVE, POSITIVE, Rule, check

_START: Rule = (lambda value: 0 <= value < 1, "must be at least 0 and less than 1")


@dataclass(frozen=True)
class AveragedSGDMethod(Method):
    """Training in one pass by small steps of SGD, whose average is the result (You and Xu, 2014).

    Attributes:
        epochs, gradient_frames, patience: as in `Method`; ``gradient_frames`` is the minibatch, a small one: a pass has
            to have many steps.
        lr: the first rate; None: it is searched on the first ``search_frames`` of the training, and the training's
            folder remembers it.
        a, power: of the rate's fall, lr (1 + a lr t)^-power in update t.
        start: the share of the updates before averaging begins.
        every: one of so many updates is averaged.
        weight_decay: the weight of L2.
        search_frames: for each rate that is tried, SGD makes one pass over so many frames.
    """

    epochs: float = 1.0
    gradient_frames: int = 64
    lr: float | None = None
    a: float = 1e-3
    power: float = 0.75
    start: float = 0.7
    every: int = 1
    weight_decay: float = 0.0
    search_frames: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, lr=NONE_OR_POSITIVE, a=NOT_NEGATIVE, power=NOT_NEGATIVE, start=_START, every=POSITIVE)
        check(self, weight_decay=NOT_NEGATIVE, search_frames=POSITIVE)

    @property
    def name(self) -> str:
        return "averaged_sgd"

    def search(
        self,
        model: nn.Module,
        loss: Loss,
        stream: Stream,
        *,
        autocast: bool = False,
        delay: int = 0,
        communicator: Communicator = Solo(),
    ) -> dict[str, float]:
        """The rate, unless it is given."""
        if self.lr is not None:
            return {}
        place, minibatches = stream.state_dict(), []
        end = stream.frames_seen + min(self.search_frames, stream.total_frames)
        while stream.frames_seen < end:
            minibatches.append(stream.draw(self.gradient_frames))
        stream.load_state_dict(place)
        low = torch.bfloat16 if autocast else None
        cost = sgd_cost(model, loss, minibatches, autocast=low, delay=delay, communicator=communicator)
        return {"lr": search_rate(cost)}

    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        if self.lr is None:
            raise ValueError("lr=None: give a rate, or the method that quadric.train.method.settled makes of this")
        return averaged_sgd(
            model.parameters(),
            lr=self.lr,
            a=self.a,
            power=self.power,
            every=self.every,
            weight_decay=self.weight_decay,
        )

    def schedule(self, optimizer: Optimizer, updates: int) -> LRScheduler:
        """The rate has its own; the number of updates tells when averaging begins."""
        assert isinstance(optimizer, AveragedSGD)
        optimizer.average_after(round(self.start * updates))
        return super().schedule(optimizer, updates)
