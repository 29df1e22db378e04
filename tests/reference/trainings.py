"""Jobs for several ranks that train through `Trainer`, and the same for one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import quadric.train.trainer
from quadric.comm.communicator import Communicator, Solo
from quadric.loss.full_sum import FullSum
from quadric.loss.loss import Bernoulli, CrossEntropy
from quadric.optim.damping import AfterRejection, Fixed
from quadric.optim.precondition import Preconditioner, SharedCounts
from quadric.optim.sampling import FixedSizes, GeometricSizes
from quadric.optim.search import Backtracking
from quadric.optim.second_order import hessian_free, natural_gradient
from quadric.train.plan import Plan
from quadric.train.trainer import Trainer, evaluate
from reference.ranks import die
from reference.training import CLASSES, network, parameters, speech

METHODS: dict[str, tuple[Callable[..., Any], Plan]] = {
    "AdamW": (lambda params: torch.optim.AdamW(params, lr=1e-2), Plan(4, FixedSizes(130), evaluations=5)),
    "hessian_free": (
        lambda params: hessian_free(params, damping=10.0, max_steps=5),
        Plan(5, GeometricSizes(300, 150, 1.1, 1.1), evaluations=5),
    ),
}
UTTERANCES = "SGD, an utterance at a time"
"""Of two ranks, one then has nothing in every update."""
PATIENT = "SGD, patient"
"""Its steps are too long for every look to be better."""
SPECIAL: dict[str, tuple[Callable[..., Any], Plan]] = {
    UTTERANCES: (lambda params: torch.optim.SGD(params, lr=0.1), Plan(2, FixedSizes(1), evaluations=3)),
    PATIENT: (lambda params: torch.optim.SGD(params, lr=2.0), Plan(20, FixedSizes(130), evaluations=40, patience=2)),
}


class Trained(NamedTuple):
    """What a rank knows at the end: the first four are the same on all.

    Attributes:
        opened: files in the folder that it has opened to write.
        judged: minibatches that its model has seen outside training.
    """

    parameters: bytes
    updates: int
    best: float
    scores: dict[str, float]
    buffers: list[Tensor]
    opened: list[str]
    judged: int


class Normalised(nn.Module):
    """Normalises each feature by the statistics of the minibatch, and keeps running ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


class Precisely(nn.Module):
    """Has what follows compute in float64: there a rounding does not change which iterate or step a search takes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def trainer(
    communicator: Communicator,
    folder: Path,
    method: str,
    *,
    normalise: bool = False,
    precise: bool = False,
    lr: float | None = None,
) -> Trainer:
    model = network()
    if precise:
        model = nn.Sequential(Precisely(), *model).double()
    if normalise:
        model[0] = nn.Sequential(model[0], Normalised())
    build, plan = (METHODS | SPECIAL)[method]
    optimizer = build(model.parameters())
    if lr is not None:
        optimizer.param_groups[0]["lr"] = lr
    stream = speech(None if method == UTTERANCES else 10, shard=(communicator.rank, communicator.size))
    schedule: Callable[..., LambdaLR] = lambda o, n: LambdaLR(o, lambda u: 1 - 0.5 * u / n)  # noqa: E731
    return Trainer(
        model, CrossEntropy(), optimizer, stream, speech(), plan, folder, schedule=schedule, communicator=communicator
    )


def trains(
    communicator: Communicator,
    folder: Path,
    method: str,
    at: tuple[int, int, Callable[[], None]] | None = None,
    often: bool = False,
    **options: Any,
) -> Trained:
    """Trains to the end; where given, ``at = (rank, update, event)`` happens before that update on that rank."""

    def progress(items: Iterable[int], *, total: int | None, what: str) -> Iterable[int]:
        for item in items:
            if at is not None and at[:2] == (communicator.rank, item):
                at[2]()
            yield item

    if often:
        quadric.train.trainer.CHECKPOINT_SECONDS = 0.0
    opened: list[str] = []
    if communicator.size > 1:
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if _writes(event, args, folder) else None)
    training = trainer(communicator, folder, method, **options)
    judged: list[None] = []
    training.model.register_forward_hook(lambda model, *_: None if model.training else judged.append(None))
    best = training.fit(progress=progress)
    assert training.held_out is not None
    scores = evaluate(training.model, training.loss, training.held_out, communicator=communicator)
    buffers = [buffer.clone() for buffer in training.model.buffers()]
    return Trained(parameters(training.model), training.update, best["loss"], scores, buffers, opened, len(judged))


def _writes(event: str, args: tuple[Any, ...], folder: Path) -> bool:
    return event == "open" and str(args[0]).startswith(str(folder)) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))


def trains_alone(folder: Path, method: str, **options: Any) -> Trained:
    return trains(Solo(), folder, method, **options)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    die()


class Unscaled(Preconditioner):
    """None at all, and without a description."""

    def operator(self, *_: Any) -> None:
        return None


OPTIMISERS: dict[str, tuple[Callable[..., Any], ...]] = {
    "method": (torch.optim.AdamW, torch.optim.NAdam),
    "lr": tuple(partial(torch.optim.AdamW, lr=torch.tensor(lr)) for lr in (0.01, 0.0100001)),
    "max_steps": tuple(partial(hessian_free, max_steps=n) for n in (5, 6)),
    "search": tuple(partial(natural_gradient, search=Backtracking(shrink=a)) for a in (0.5, 0.7)),
    "rule": tuple(partial(natural_gradient, damping=rule) for rule in (AfterRejection(initial=0.1), Fixed(0.1))),
    "preconditioner": tuple(partial(natural_gradient, preconditioner=M) for M in (None, SharedCounts())),
    "address": tuple(partial(hessian_free, preconditioner=M) for M in (Unscaled(), Unscaled())),
}


def trains_otherwise(communicator: Communicator, folder: Path, how: str) -> None:
    """Rank 1 has another plan, layer, loss or optimiser, or the same part at another address."""
    training, rank = trainer(communicator, folder, "AdamW"), communicator.rank
    if how == "plan":
        training.plan = Plan(4, FixedSizes((130, 131)[rank]), evaluations=5)
    elif how == "activation":
        training.model[2] = (nn.Tanh(), nn.ReLU())[rank]
    elif how == "dropout":
        training.model[3] = nn.Dropout((0.25, 0.5)[rank])
    elif how == "scale":
        training.loss = FullSum(torch.zeros(CLASSES), scale=(0.5, 0.6)[rank])
    elif how == "loss":
        training.loss = (CrossEntropy(), Bernoulli())[rank]
    else:
        training.optimizer = OPTIMISERS[how][rank](training.model.parameters())
    training.fit()


def refusals(communicator: Communicator, folder: Path, ways: list[str]) -> list[str]:
    """What the rank is told when the ranks train otherwise in each of the ways."""
    told = []
    for how in ways:
        try:
            trains_otherwise(communicator, folder / how, how)
        except ValueError as error:
            told.append(str(error))
    return told


def trains_with_the_shard_of_rank_0(communicator: Communicator, folder: Path) -> None:
    training = trainer(communicator, folder, "AdamW")
    if communicator.rank == 1:
        Trainer(
            training.model, training.loss, training.optimizer, speech(), None, training.plan, folder,
            communicator=communicator,
        )  # fmt: skip
    training.fit()
