"""The trainings of a job: a network, its data, and an optimiser, in a folder of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quadric.comm.communicator import Communicator, Solo
from quadric.data.stream import FrameStream
from quadric.loss.loss import CrossEntropy, Loss
from quadric.model.acoustic import AcousticModel
from quadric.progress import Progress
from quadric.speech.tree import untie
from quadric.train import checkpoint
from quadric.train.asynchronous import Asynchronous, asynchronous_key
from quadric.train.flat_start import Aligned, viterbi
from quadric.train.method import Method
from quadric.train.prepare import Prepared
from quadric.train.recipe import Job
from quadric.train.stages import Stages, digest, reading
from quadric.train.trainers import trainer_of
from quadric.train.units import Units

logger = logging.getLogger(__name__)


def trained(
    job: Job,
    name: str,
    method: Method,
    prepared: Prepared,
    units: Units,
    stages: Stages,
    progress: Progress,
    communicator: Communicator = Solo(),
) -> Path:
    """The folder of a training by all ranks, with the trained system in ``system``."""
    data = (prepared.key, digest(dict(units.train), dict(units.dev)), prepared.front)
    asynchronous = job.asynchronous if name in job.methods else None
    training: tuple[object, ...] = (job.network, job.augment, job.chunk, job.evaluations, job.autocast, job.seed)
    training += asynchronous_key(asynchronous)
    place = partial(stages.folder, name, method, *training, *data)
    folder = communicator.first_then_all(f"beginning {name}", place)
    torch.manual_seed(job.seed)
    model = job.network.build(prepared.dimension, units.tying.num_pdfs)
    model.initialise_output_bias(torch.from_numpy(units.log_prior))
    sets = Sets(prepared, units.train, units.dev)
    fit(
        job,
        name,
        method,
        model,
        CrossEntropy(),
        sets,
        folder,
        progress,
        communicator,
        chunk=job.chunk,
        asynchronous=asynchronous,
    )
    return folder


@dataclass(frozen=True)
class Sets:
    """What a network is trained on and judged by: targets of utterances, and where their features are."""

    prepared: Prepared
    train: Mapping[str, Any]
    dev: Mapping[str, Any]


def fit(
    job: Job,
    name: str,
    method: Method,
    model: AcousticModel,
    loss: Loss,
    sets: Sets,
    folder: Path,
    progress: Progress,
    communicator: Communicator,
    *,
    chunk: int | None,
    asynchronous: Asynchronous | None = None,
) -> None:
    """Trains ``model`` in ``folder`` on windows of ``chunk`` frames, or whole utterances, by all ranks or workers."""
    context = (model.left_context, model.right_context)
    stream = FrameStream(
        only(sets.prepared.features["train"], sets.train),
        sets.train,
        context=context,
        chunk=chunk,
        seed=job.seed,
        transform=job.augment if chunk else None,
        shard=(communicator.rank, communicator.size),
    )
    held_out = FrameStream(only(sets.prepared.features["dev"], sets.dev), sets.dev, context=context, chunk=None)
    trainer = trainer_of(
        method,
        model,
        loss,
        stream,
        held_out,
        folder,
        evaluations=job.evaluations,
        autocast=job.autocast,
        seed=job.seed,
        communicator=communicator,
        asynchronous=asynchronous,
    )
    best = trainer.fit(progress=progress, what=name)
    logger.info("%s: held-out loss %.4f", name, best["loss"])


def network(job: Job, prepared: Prepared, units: Units, trained: Path) -> AcousticModel:
    """The network in the folder of a training, with its best parameters."""
    model = job.network.build(prepared.dimension, units.tying.num_pdfs)
    with reading(trained):
        model.load_state_dict(checkpoint.load(trained / "model.pt")["model"])
    return model.eval()


def realigned(
    job: Job,
    method: Method,
    prepared: Prepared,
    aligned: Aligned,
    units: Units,
    stages: Stages,
    progress: Progress,
    communicator: Communicator = Solo(),
) -> Aligned:
    """Alignments by a network that was trained on those before: it sees more around a frame than what made them."""
    first = trained(job, "realign", method, prepared, units, stages, progress, communicator)

    def make(folder: Path) -> None:
        model = network(job, prepared, units, first)
        pdfs = viterbi(job, prepared, units.tying, model, units.log_prior, progress)
        states = {split: untie(found, aligned.tying, units.tying) for split, found in pdfs.items()}
        Aligned(aligned.tying, states["train"], states["dev"]).save(folder)

    made = partial(stages.make, "realigned", first.name, by=make)
    return Aligned.load(aligned.tying, communicator.first_then_all("aligning again", made))


def only(features: Mapping[str, np.ndarray], ids: Iterable[str]) -> dict[str, np.ndarray]:
    """The features of the utterances ``ids``."""
    return {id: features[id] for id in ids}
