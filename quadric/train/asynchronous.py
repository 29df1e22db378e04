"""Asynchronous training as a job says it: what its workers send, and what its server does with that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.comm.compression import AdaComp, CLTk, Compressor, HalfPrecision, LowRank, bin_lengths
from quadric.parallel.shard import Bounds, Rule
from quadric.parallel.worker import Elastic, Gradients, OuterSteps, Strategy
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.method import FirstOrder, Method, SecondOrderMethod
from quadric.train.rules import NONE_OR_NOT_NEGATIVE, NONE_OR_POSITIVE, NOT_NEGATIVE, POSITIVE, SHARE, check, one_of

Sending = Literal["gradients", "elastic", "outer"]
Compression = Literal["none", "adacomp", "scalecom", "powersgd", "float16", "bfloat16"]

_SERVES = {
    "alpha": ("sends", ("elastic",)),
    "outer_lr": ("sends", ("outer",)),
    "outer_momentum": ("sends", ("outer",)),
    "whole": ("compression", get_args(Compression)[1:]),
    "share": ("compression", ("scalecom",)),
    "rank": ("compression", ("powersgd",)),
}
"""Options that have an effect with some values of another alone."""


@dataclass(frozen=True)
class Asynchronous:
    """Training by workers that wait for nobody, on a parameter server.

    Attributes:
        workers: processes that compute; a job may go on with another number.
        shards: of the server, each with some of the layers.
        every: minibatches between two exchanges with the server.
        sends: ``"gradients"`` of the minibatches, to which the server applies the training's optimiser; ``"elastic"``
            averaging (EASGD) or ``"outer"`` steps (DiLoCo), where the workers apply it to parameters of their own.
        alpha: of elastic averaging: how far a worker and the server are drawn to each other.
        outer_lr, outer_momentum: of the server's Nesterov steps along the workers' sums of steps.
        warm: exchanges of the first worker alone, before the others begin.
        clip: the largest norm of what is sent; none: any.
        staleness: gradients computed at parameters that were more pushes old are refused, and computed again; none:
            all are taken.
        scaled: divide a step by the staleness of its gradient.
        not_finite: a worker that has sent more gradients that are not finite is dropped.
        compression: of what is sent; what is left out is sent later.
        whole: exchanges of the training before compression begins.
        share: of the entries that ``"scalecom"`` sends.
        rank: of ``"powersgd"``.
    """

    workers: int = 2
    shards: int = 1
    every: int = 1
    sends: Sending = "gradients"
    alpha: float = 0.5
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    warm: int = 0
    clip: float | None = None
    staleness: int | None = None
    scaled: bool = False
    not_finite: int = 10
    compression: Compression = "none"
    whole: int = 0
    share: float = 0.01
    rank: int = 4

    def __post_init__(self) -> None:
        check(self, workers=POSITIVE, shards=POSITIVE, every=POSITIVE, sends=one_of(Sending), alpha=SHARE)
        check(self, outer_lr=POSITIVE, outer_momentum=SHARE, warm=NOT_NEGATIVE, clip=NONE_OR_POSITIVE)
        check(self, staleness=NONE_OR_NOT_NEGATIVE, not_finite=NOT_NEGATIVE, compression=one_of(Compression))
        check(self, whole=NOT_NEGATIVE)
        check(self, share=(lambda value: 0 < value <= 1, "must be more than 0 and at most 1"), rank=POSITIVE)
        for name in ("clip", "staleness", "scaled", "compression"):
            value = getattr(self, name)
            if self.sends == "elastic" and value != getattr(type(self), name):
                raise ValueError(
                    f"{name}={value}: elastic averaging draws both sides alike, by all of it; leave it out"
                )
        for name, (other, values) in _SERVES.items():
            value, given = getattr(self, name), getattr(self, other)
            if value != getattr(type(self), name) and given not in values:
                remedy = f"leave it out, or give {other}={'|'.join(values)}"
                raise ValueError(f"{name}={value} has no effect with {other}={given}: {remedy}")

    def strategy(self, method: Method, minibatches: int) -> Strategy:
        """What a worker does."""
        if self.sends == "gradients":
            return Gradients()
        local = (method.build, partial(method.schedule, updates=minibatches))
        return Elastic(*local, alpha=self.alpha) if self.sends == "elastic" else OuterSteps(*local)

    @property
    def bounds(self) -> Bounds:
        """What the server accepts."""
        return Bounds(self.staleness, self.scaled, self.not_finite)

    def rule(self, method: Method, updates: int) -> tuple[Rule, Callable[[Optimizer], LRScheduler] | None]:
        """What the server does: its optimiser, and the schedule of that."""
        if self.sends == "gradients":
            return method.build, partial(method.schedule, updates=updates)
        if self.sends == "elastic":
            return _Plain(1.0), None
        return _Plain(self.outer_lr, self.outer_momentum), None

    def compressor(self) -> Callable[[Sequence[torch.Size]], Compressor] | None:
        """Of a shard's part of what is sent."""
        return None if self.compression == "none" else _Compressed(self.compression, self.share, self.rank)


def asynchronous_key(options: Asynchronous | None) -> tuple[object, ...]:
    """What a training depends on: all options but the number of workers; nothing where it is not asynchronous."""
    return () if options is None else tuple(value for name, value in vars(options).items() if name != "workers")


def check_methods(options: Asynchronous | None, methods: Mapping[str, Method]) -> None:
    """Refuses methods that take steps no server can, or that workers cannot take by themselves.

    Raises:
        ValueError: naming them.
    """
    if options is None:
        return
    second = [name for name, method in methods.items() if isinstance(method, SecondOrderMethod)]
    if second:
        others = " ".join(f"{name}=none" for name in second)
        names = ", ".join(second)
        raise ValueError(f"asynchronous: {names} takes steps that no parameter server can: leave out with {others}")
    own = [name for name, method in methods.items() if _averages(method)]
    if options.sends != "gradients" and own:
        raise ValueError(
            f"asynchronous.sends={options.sends}: {', '.join(own)} averages where the server is, and workers step by "
            "themselves: leave out with averaged=none, and give first_order.optimizer=SGD or another"
        )


def _averages(method: Method) -> bool:
    """Whether its optimiser is judged elsewhere than where it steps."""
    optimizer = method.optimizer if isinstance(method, FirstOrder) else None
    switches = optimizer is not None and all(hasattr(optimizer, name) for name in ("train", "eval"))
    return isinstance(method, AveragedSGDMethod) or optimizer is torch.optim.ASGD or switches


@dataclass(frozen=True)
class _Plain:
    """Steps of SGD, by Nesterov's momentum where there is one."""

    lr: float
    momentum: float = 0.0

    def __call__(self, part: nn.Module) -> Optimizer:
        return SGD(part.parameters(), lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)


@dataclass(frozen=True)
class _Compressed:
    kind: Compression
    share: float
    rank: int

    def __call__(self, shapes: Sequence[torch.Size]) -> Compressor:
        sizes = [math.prod(shape) for shape in shapes]
        if self.kind == "adacomp":
            return AdaComp(sizes, bin_lengths(torch.empty(shape, device="meta") for shape in shapes))
        if self.kind == "scalecom":
            return CLTk(self.share)
        if self.kind == "powersgd":
            return LowRank(shapes, self.rank)
        return HalfPrecision(torch.float16 if self.kind == "float16" else torch.bfloat16)
