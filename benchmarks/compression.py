"""What compressing gradients saves and costs: SGD on speech frames by several workers, each with its own residue.

    python benchmarks/compression.py an4 data=PATH/an4_mfcc --recipe-network [--epochs 8] [--methods none cltk-0.01]

The workers are simulated in one process: at every step each takes its own frames at the same parameters, compresses its
gradient and keeps the rest, and SGD with momentum goes along the mean of what was sent. All methods see the same frames
and start from the same network; the learning rate falls linearly to zero and is the same for all, chosen for none. The
workers of cltk lead in turn.

Columns: method, ratio (bytes of plain float32 gradients over bytes of messages, over the whole run), ratio in the last
epoch, held-out loss a frame, held-out frames right. The JSON rows also have both of every epoch. `--quick` is a small
network on made frames for a few steps, which shows that all this runs and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import Table
from frames import Speech, add_speech_options, load_speech
from quadric.comm.compression import AdaComp, CLTk, Compressor, HalfPrecision, LowRank
from quadric.comm.message import Message
from quadric.data.stream import FrameStream
from quadric.model.acoustic import TDNN
from quadric.optim.sampling import Sizes
from quadric.space import ParameterSpace

Build = Callable[[Sequence[Tensor]], Compressor]


def _adacomp(size: int, parameters: Sequence[Tensor]) -> AdaComp:
    return AdaComp([p.numel() for p in parameters], size)


def _cltk(share: float, parameters: Sequence[Tensor]) -> CLTk:
    return CLTk(share)


def _lowrank(rank: int, parameters: Sequence[Tensor]) -> LowRank:
    return LowRank([p.shape for p in parameters], rank)


METHODS: dict[str, Build | None] = {
    "none": None,
    "float16": lambda _: HalfPrecision(torch.float16),
    "bfloat16": lambda _: HalfPrecision(torch.bfloat16),
    **{f"adacomp-{size}": partial(_adacomp, size) for size in (50, 500)},
    **{f"cltk-{share:g}": partial(_cltk, share) for share in (0.03, 0.01, 0.003, 0.001)},
    "cltk-0.01-filtered": lambda _: CLTk(0.01, memory=0.1),
    **{f"lowrank-{rank}": partial(_lowrank, rank) for rank in (1, 2, 4)},
}
"""By name, for the parameters of a network."""


class Workers:
    """Several workers' gradients at one point, as messages, and the account of their bytes.

    Args:
        build: each worker's compressor; None: gradients travel as they are.
        parameters: of the network.
        count: of the workers.
    """

    def __init__(self, build: Build | None, parameters: Sequence[Tensor], count: int) -> None:
        self.compressors = [build(parameters) if build else None for _ in range(count)]
        self.plain, self.sent, self.steps = 0, 0, 0

    def mean(self, gradients: Sequence[Tensor], *, whole: bool = False) -> Tensor:
        """Of what all send: their messages, or gradients whole."""
        total, count = torch.zeros_like(gradients[0]), len(gradients)
        self.plain += sum(gradient.nbytes for gradient in gradients)
        for message in gradients if whole else self._messages(gradients):
            self.sent += message.nbytes
            if isinstance(message, Message):
                message.add_to(total, 1 / count)
            else:
                total.add_(message, alpha=1 / count)
        self.steps += 1
        return total

    def _messages(self, gradients: Sequence[Tensor]) -> list[Message | Tensor]:
        messages: list[Message | Tensor] = list(gradients)
        leader = self.steps % len(gradients)
        indices = None
        for rank in sorted(range(len(gradients)), key=lambda rank: rank != leader):
            compressor = self.compressors[rank]
            if isinstance(compressor, CLTk):
                first = compressor.compress(gradients[rank], indices)
                indices = first.indices
                messages[rank] = first
            elif compressor is not None:
                messages[rank] = compressor.compress(gradients[rank])
        return messages


def train(speech: Speech, chosen: argparse.Namespace, build: Build | None) -> dict[str, Any]:
    """One row: a run from the start."""
    model = speech.again()
    space = ParameterSpace(model)
    workers = Workers(build, space.parameters, chosen.workers)
    optimizer = torch.optim.SGD(model.parameters(), lr=chosen.lr, momentum=chosen.momentum)
    total = chosen.steps or round(chosen.epochs * speech.stream.total_frames / (chosen.batch * chosen.workers))
    each = -(-total // max(1, round(chosen.epochs)))
    found: list[dict[str, float]] = []
    before = (0, 0)
    for step in range(total):
        theta = space.point()
        objectives = [
            speech.objective(model, Sizes(chosen.batch, 0), step * chosen.workers + rank)
            for rank in range(chosen.workers)
        ]
        gradients = [objective.value_and_grad(theta)[1] for objective in objectives]
        mean = workers.mean(gradients, whole=step < chosen.whole * total)
        for parameter, gradient in zip(space.parameters, space.split(mean), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = chosen.lr * (1 - step / total)
        optimizer.step()
        if (step + 1) % each == 0 or step + 1 == total:
            ratio = (workers.plain - before[0]) / (workers.sent - before[1])
            before = (workers.plain, workers.sent)
            found.append({"step": step + 1, "ratio": ratio} | speech.look(model))
    return {"ratio": workers.plain / workers.sent, "steps": total, "epochs": found}


def made() -> Speech:
    """A small network, and frames whose class is to be read off the nearest ones."""
    rng = np.random.default_rng(0)

    def stream(utterances: int) -> FrameStream:
        features = {f"u{i}": rng.normal(size=(50, 6)).astype(np.float32) for i in range(utterances)}
        targets = {id: (x[:, 0] > 0) + 2 * (x[:, 1] > 0) for id, x in features.items()}
        return FrameStream(features, targets, context=(1, 1), seed=0)

    torch.manual_seed(0)
    return Speech(TDNN(6, 4, [24, 24], offsets=[(-1, 0, 1), (0,)]), stream(60), stream(10))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_speech_options(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--epochs", type=float, default=8, help="(default: 8)")
    parser.add_argument("--whole", type=float, default=0, help="share of the steps before compression (default: 0)")
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--batch", type=int, default=256, help="frames of a worker's gradient (default: 256)")
    parser.add_argument("--lr", type=float, default=0.1, help="at the start (default: 0.1)")
    parser.add_argument("--momentum", type=float, default=0.9, help="(default: 0.9)")
    parser.add_argument("--quick", action="store_true", help="made frames and 40 steps")
    return parser.parse_intermixed_args()


def main() -> None:
    """Prints the table, and writes it."""
    chosen = parsed()
    for name in ("workers", "epochs", "batch", "lr"):
        if not getattr(chosen, name) > 0:
            sys.exit(f"--{name} {getattr(chosen, name)}: must be positive")
    if chosen.quick:
        torch.set_num_threads(chosen.threads)
        chosen.batch, chosen.epochs, chosen.steps = 60, 2, 40
    speech = made() if chosen.quick else load_speech(chosen)
    columns = ("method", "ratio", "in the last epoch", "held-out loss", "frames right")
    table = Table(columns, chosen.json)
    start = speech.look(speech.model)
    table.add({"method": "start", **start}, ["start", "-", "-", f"{start['loss']:.4f}", f"{start['accuracy']:.1%}"])
    for name in chosen.methods:
        found = train(speech, chosen, METHODS[name])
        last = found["epochs"][-1]
        scores = [f"{found['ratio']:.1f}", f"{last['ratio']:.1f}", f"{last['loss']:.4f}", f"{last['accuracy']:.1%}"]
        table.add({"method": name} | found, [name, *scores])


if __name__ == "__main__":
    main()
