"""Training by the block-diagonal family, as a job says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.comm.communicator import Communicator, Solo
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.fisher import Fisher
from quadric.optim.kbfgs import kbfgs, kbfgs_l
from quadric.optim.kfac import kfac
from quadric.optim.mini_block import mini_block_fisher
from quadric.optim.shampoo import shampoo
from quadric.optim.tnt import tnt
from quadric.train.method import Method, warm_cosine
from quadric.train.rules import NONE_OR_POSITIVE, NOT_NEGATIVE, POSITIVE, SHARE, check, one_of

Kind = Literal["mini_block_fisher", "kfac", "kbfgs", "kbfgs_l", "shampoo", "tnt"]

_KINDS: Mapping[Kind, Callable[..., BlockDiagonal]] = {
    "mini_block_fisher": mini_block_fisher,
    "kfac": kfac,
    "kbfgs": kbfgs,
    "kbfgs_l": kbfgs_l,
    "shampoo": shampoo,
    "tnt": tnt,
}


@dataclass(frozen=True)
class BlockDiagonalMethod(Method):
    """Training on minibatches by an inverse of the layers' curvature, its rate warmed up and falling by a cosine.

    Attributes:
        epochs, gradient_frames, patience: as in `Method`; ``gradient_frames`` is the minibatch.
        kind: ``"mini_block_fisher"``, ``"kfac"``, ``"kbfgs"``, ``"kbfgs_l"``, ``"shampoo"`` or ``"tnt"``; the training
            has its name.
        lr: the highest learning rate; it means what it does in Adam.
        momentum: of the gradients.
        weight_decay: decoupled, as AdamW has it.
        damping: as a share of a layer's mean curvature; None: the kind's own default.
        statistics, inverses: each is made every so many updates.
        fisher: at the targets of the data (``"empirical"``), or drawn from the model (``"sampled"``).
        warmup: the share of the updates over which the rate rises from zero.
        floor: the rate at the end, as a share of ``lr``.
    """

    kind: Kind = "mini_block_fisher"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    damping: float | None = None
    statistics: int = 1
    inverses: int = 20
    fisher: Fisher = "empirical"
    warmup: float = 0.05
    floor: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, kind=one_of(Kind), fisher=one_of(Fisher), lr=POSITIVE, damping=NONE_OR_POSITIVE)
        check(self, momentum=(lambda value: 0 <= value < 1, "must be at least 0 and less than 1"))
        check(self, weight_decay=NOT_NEGATIVE, statistics=POSITIVE, inverses=POSITIVE, warmup=SHARE, floor=SHARE)

    @property
    def name(self) -> str:
        return self.kind

    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        damping: dict[str, Any] = {} if self.damping is None else {"damping": self.damping}
        return _KINDS[self.kind](
            model,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=Schedule(statistics=self.statistics, inverses=self.inverses),
            fisher=self.fisher,
            communicator=communicator,
            **damping,
        )

    def schedule(self, optimizer: Optimizer, updates: int) -> LRScheduler:
        return warm_cosine(optimizer, updates, self.warmup, self.floor)
