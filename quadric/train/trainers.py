"""The trainer of a method: one optimiser's on one or several ranks, or an asynchronous one's on a parameter server."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from quadric.comm.communicator import Communicator, Solo
from quadric.data.examples import Stream
from quadric.loss.loss import Loss
from quadric.train.asynchronous import Asynchronous
from quadric.train.asynchronous_trainer import AsynchronousTrainer
from quadric.train.method import Method, settled
from quadric.train.plan import Plan
from quadric.train.trainer import Trainer


def trainer_of(
    method: Method,
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    held_out: Stream,
    folder: Path,
    *,
    evaluations: int = 20,
    autocast: bool = False,
    seed: int = 0,
    communicator: Communicator = Solo(),
    asynchronous: Asynchronous | None = None,
) -> Trainer | AsynchronousTrainer:
    """A trainer in ``folder``, with what the method leaves to be found from the data found.

    Raises:
        ValueError: asynchronous training on several ranks, or by an optimiser that needs more than gradients.
    """
    if asynchronous is not None and communicator.size > 1:
        raise ValueError(f"{communicator.size} ranks: asynchronous training has workers of its own; start it on one")
    delay = 0 if asynchronous is None else (asynchronous.workers - 1) * asynchronous.every
    method = settled(method, model, loss, stream, folder, autocast=autocast, delay=delay, communicator=communicator)
    if asynchronous is not None:
        return AsynchronousTrainer(
            model,
            loss,
            method,
            stream,
            held_out,
            asynchronous,
            folder,
            evaluations=evaluations,
            autocast=autocast,
            seed=seed,
        )
    return Trainer(
        model,
        loss,
        method.build(model, communicator),
        stream,
        held_out,
        Plan(method.epochs, method.sampler, evaluations, autocast, seed, method.patience),
        folder,
        schedule=method.schedule,
        communicator=communicator,
    )
