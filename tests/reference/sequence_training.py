"""A job for several ranks, and the same for one, that trains a sequence loss on whole utterances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quadric.comm.communicator import Communicator, Solo
from quadric.loss.sequence import MMI, SMBR
from quadric.loss.sequence_loss import SequenceLoss
from quadric.loss.sequence_target import SequenceTarget
from quadric.objective.objective import Objective
from quadric.optim.second_order import hessian_free, nghf
from reference.sequence import PDFS, utterance

FRAMES = [9, 4, 7, 12, 5, 6]
JOBS = {"sMBR": (SMBR, hessian_free), "MMI": (MMI, nghf)}

MicroBatch = tuple[Tensor, list[SequenceTarget]]


def micro_batches(loss: SequenceLoss, own: slice) -> list[MicroBatch]:
    """Two utterances each, the shorter one padded; ``own``: which of the three."""
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(frames, 3, dtype=torch.float64, generator=generator) for frames in FRAMES]
    targets = [loss.target(*utterance(seed, frames)[:2]) for seed, frames in enumerate(FRAMES)]
    pairs = [slice(first, first + 2) for first in range(0, len(FRAMES), 2)]
    return [(nn.utils.rnn.pad_sequence(inputs[pair], batch_first=True), targets[pair]) for pair in pairs][own]


def train(communicator: Communicator = Solo(), name: str = "sMBR", steps: int = 6) -> tuple[list[float], list[float]]:
    """The mean loss before each step, and the parameters after the last."""
    cls, method = JOBS[name]
    loss = cls(torch.zeros(PDFS, dtype=torch.float64), scale=0.8, smoothing=0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, PDFS)).double()
    optimizer = method(model.parameters())
    data = micro_batches(loss, slice(communicator.rank, None, communicator.size))
    values = [
        float(optimizer.step(Objective(model, loss, data, data, communicator=communicator))) for _ in range(steps)
    ]
    return values, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()
