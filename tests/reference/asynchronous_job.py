"""A process that trains asynchronously and tells what happens, a line of JSON each: ``python FILE FOLDER OPTIONS``.

OPTIONS, in JSON, are those of `Asynchronous` and: ``seconds`` that a minibatch takes at least until there is
a file FOLDER/../hurry, ``rows`` of data,
``bad`` rows at their beginning that are not finite, ``optimizer`` of torch instead of averaged SGD, ``norm`` for batch
normalisation, ``last_kill``: whether a shard is killed when its last push is applied, and ``silent``: the seconds after
which a person is told.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quadric.data.examples import ExampleStream
from quadric.loss.loss import CrossEntropy
from quadric.train import asynchronous_trainer
from quadric.train.asynchronous import Asynchronous
from quadric.train.asynchronous_trainer import AsynchronousTrainer
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.method import FirstOrder, Method
from quadric.train.trainer import Interrupted


class Slow(CrossEntropy):
    """Takes its time, until there is a file."""

    def __init__(self, seconds: float, until: Path) -> None:
        super().__init__()
        self.seconds, self.until = seconds, until

    def __repr__(self) -> str:
        return "Slow()"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.seconds and not self.until.exists():
            time.sleep(self.seconds)
        return super().forward(output, target)


class Told(AsynchronousTrainer):
    """Prints its ticks."""

    last_kill = False
    silent: float | None = None

    def _counted(self, crew: Any) -> Iterator[Any]:
        if self.silent is not None:
            sys.modules[type(crew).__module__].SILENT_SECONDS = self.silent  # type: ignore[attr-defined]
        for tick in super()._counted(crew):
            if self.last_kill and not crew.ledger.left:
                self.last_kill = False
                os.kill(crew._server.counts()[0]["pid"], signal.SIGKILL)
            counts = crew._server.counts() if not crew.ledger.left or tick.news else []
            say(
                reports=[(report.worker, report.unit, report.verdicts) for report in tick.reports],
                news=tick.news,
                workers={number: hand.pid for number, hand in crew.hands.items()},
                counts=counts,
                lost=crew.lost,
                statistics=[float(buffer.float().sum()) for buffer in crew.buffers()],
            )
            yield tick


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    asynchronous_trainer.LIVE_SECONDS = 0.5
    options = json.loads(sys.argv[2])
    seconds, rows, bad = options.pop("seconds", 0.01), options.pop("rows", 2000), options.pop("bad", 0)
    norm, last_kill, silent = (options.pop(name, None) for name in ("norm", "last_kill", "silent"))
    method: Method = AveragedSGDMethod(gradient_frames=10, lr=0.5)
    if optimizer := options.pop("optimizer", None):
        method = FirstOrder(epochs=1, gradient_frames=10, optimizer=getattr(torch.optim, optimizer), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    y = (x @ torch.randn(6, 4, generator=generator)).argmax(1)
    held_out = ExampleStream(x[-500:].clone(), y[-500:])
    x[:bad] = torch.nan
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.Tanh(), nn.Linear(16, 4))
    trainer = Told(
        model,
        Slow(seconds, Path(sys.argv[1]).parent / "hurry"),
        method,
        ExampleStream(x, y),
        held_out,
        Asynchronous(**options),
        Path(sys.argv[1]),
        evaluations=2,
    )
    trainer.last_kill, trainer.silent = bool(last_kill), silent
    try:
        best = trainer.fit()
    except Interrupted as stop:
        say(interrupted=str(stop))
    except (RuntimeError, ValueError) as error:
        say(error=str(error))
    else:
        say(
            best={name: value for name, value in best.items() if name != "model"},
            units=len(trainer.units),
            lost=trainer._state["lost"],
        )


if __name__ == "__main__":
    main()
