"""What benchmarks share: trainings that count their work, and tables that grow row by row.

No benchmark by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from quadric.objective.objective import Data, Objective
from quadric.optim.sampling import Sampler, Seen, Sizes
from quadric.optim.second_order import SecondOrder
from quadric.outcome import Outcome


def now() -> float:
    """Seconds, read when all work given to a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def check_machine(chosen: argparse.Namespace) -> None:
    """Ends the command with a sentence where its ``--threads``, ``--device`` or ``--json`` cannot be."""
    if chosen.threads < 1:
        sys.exit(f"--threads {chosen.threads}: must be at least 1")
    try:
        device = torch.device(chosen.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        sys.exit(f"--device {chosen.device}: give cpu, cuda, cuda:1 and the like")
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        sys.exit(
            f"--device {chosen.device}: torch finds {there or 'no'} GPU{'s' * (there > 1)} here; give another, or cpu"
        )
    if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
        sys.exit(f"--json {chosen.json}: there is no folder {chosen.json.parent}; make it first")
    if chosen.json is not None and chosen.json.is_dir():
        sys.exit(f"--json {chosen.json}: is a folder; give the file in it")


@dataclass
class Cost:
    """What a training has cost so far.

    Attributes:
        seconds: of the updates, drawing their data included.
        updates: of the optimiser.
        accepted: those of a second-order optimiser that moved the model.
        solver_steps: iterations of conjugate gradients in the last run of every update.
        products: with a curvature, of all runs.
        touched: data that went through the model: once for a gradient and once for a product, which is about as dear,
            a third for an evaluation of the search. Recording a curvature, once an update, is not in it.
    """

    seconds: float = 0.0
    updates: int = 0
    accepted: int = 0
    solver_steps: int = 0
    products: int = 0
    touched: float = 0.0


class Training:
    """An optimiser at work, on as much data as a sampler says, and the account of it.

    Args:
        optimizer: first-order or second-order.
        sampler: of the data that updates see.
        total: frames of the training set.
        objective: draws data of these sizes for the update of this number.
    """

    def __init__(
        self, optimizer: Optimizer, sampler: Sampler, total: int, objective: Callable[[Sizes, int], Objective]
    ) -> None:
        self.optimizer, self.sampler, self.total, self.objective = optimizer, sampler, total, objective
        self.cost = Cost()
        self._seen = Seen(0, total)
        self._gradients = 0

    def update(self) -> None:
        """One step on new data."""
        start, cost = now(), self.cost
        sizes = self.sampler.sizes(self._seen)
        objective = self.objective(sizes, cost.updates)
        self.optimizer.step(objective)  # type: ignore[arg-type]
        cost.updates += 1
        cost.touched += self._new_gradients() * objective.frames
        self._seen = Seen(cost.updates, self.total, sizes, objective.gradient_noise)
        if isinstance(self.optimizer, SecondOrder) and (found := self.optimizer.diagnosis):
            judged = objective.frames if self.optimizer.search.on is Data.GRADIENT else objective.curvature_frames
            cost.accepted += found.outcome is Outcome.ACCEPTED
            cost.solver_steps += found.solver_steps
            cost.products += found.products
            cost.touched += found.products * objective.curvature_frames + found.evaluations * judged / 3
        cost.seconds += now() - start

    def _new_gradients(self) -> int:
        """How many the last update took: one, but for torch's L-BFGS, which counts its own."""
        if not isinstance(self.optimizer, torch.optim.LBFGS):
            return 1
        before, first = self._gradients, self.optimizer.param_groups[0]["params"][0]
        self._gradients = self.optimizer.state[first]["func_evals"]
        return self._gradients - before


class Table:
    """Rows as they come: printed in Markdown, and kept in a file of JSON."""

    def __init__(self, columns: Sequence[str], file: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = file
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def add(self, row: dict[str, Any], cells: Sequence[str]) -> None:
        """``row`` for the file, ``cells`` for the reader."""
        self.rows.append(row)
        print(f"| {' | '.join(cells)} |", flush=True)
        if self._file is not None:
            self._file.write_text(json.dumps(self.rows, indent=1))
