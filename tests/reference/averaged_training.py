"""What several ranks find of averaged SGD before they train, and one."""

from __future__ import annotations

from pathlib import Path

from quadric.comm.communicator import Communicator
from quadric.data.stream import FrameStream
from quadric.loss.loss import CrossEntropy
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.method import settled
from reference import training


def speech(communicator: Communicator | None = None) -> FrameStream:
    shard = (communicator.rank, communicator.size) if communicator else (0, 1)
    return training.speech(shard=shard)


def found_by(communicator: Communicator, folder: Path, method: AveragedSGDMethod) -> float | None:
    """The rate, by the shards of all ranks."""
    folder.mkdir(exist_ok=True)
    stream = speech(communicator)
    found = settled(method, training.network(), CrossEntropy(), stream, folder, communicator=communicator)
    assert isinstance(found, AveragedSGDMethod)
    return found.lr
