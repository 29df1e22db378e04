"""The block-diagonal family on its papers' tasks, beside Adam, SGD and Muon, each tuned by the same search.

    python benchmarks/block_tasks.py --task mnist --data FOLDER [--methods adam mini_block_fisher] [--narrow]
        [--seconds 60] [--trials 8] [--seeds 5] [--rates cosine|constant] [--clock wall|cpu] [--json FILE]

mnist, curves and faces are the autoencoders 784-1000-500-250-30, 784-400-200-100-50-25-6 and 625-2000-1000-500-30 and
back, of rectified linear units, on minibatches of 1,000: logistic loss summed over pixels, on faces half the squared
error. cifar and cifar_vgg are ResNet32 and VGG16 with batch normalisation on CIFAR-10, minibatches of 128 cropped and
mirrored; at the full rate a step takes 5e-4 off the weights, whatever the method, as decoupled weight decay of
5e-4 / lr would. cora and citeseer are the graph convolutional network of Kipf and Welling (2017), on the whole graph,
with their penalty of 5e-4, here on both layers. ``--narrow`` halves the autoencoders' layers and ResNet32's (a quarter
of those of faces and of VGG16's), for machines of few cores. ``--data`` is the folder that holds ``mnist/``,
``orl_faces/``, ``cifar10/`` and ``planetoid/``: the parent of what the recipes' ``data=`` names.

Each method is tuned by ``--trials`` of a random search, log-uniform in the ranges of the table ``METHODS``, each for
the same seconds of training (drawing the data included, evaluation excluded) from the start of seed 0: the k-th trial
is at the same place of the range for every method. The trial that ends best, by the training loss, or with classes by
the accuracy on validation data, is run again from seeds 1, 2, ...; medians over these, and the least and the greatest,
are the method's row. By default all learning rates fall to zero with the cosine of the seconds gone by. ``VARIANTS``
of the methods, with one option changed, are compared where they are named.

``--clock cpu`` counts the seconds of the process on its core, for machines that do other work besides: with
``--threads 1`` alone. With ``--json``, what is finished is not trained again when the same command is given again, and
Ctrl-C costs the training under way; remove the file when the code has changed. The file has all trials, and the curve
of each seed: seconds, steps, and what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common import check_machine, now
from quadric.files import new_file
from quadric.objective.anchor import Anchor
from quadric.objective.objective import Objective
from quadric.optim.block_diagonal import Schedule
from quadric.optim.kbfgs import kbfgs, kbfgs_l
from quadric.optim.kfac import KroneckerFactors, kfac
from quadric.optim.mini_block import MiniBlocks, mini_block_fisher
from quadric.optim.shampoo import shampoo
from quadric.optim.tnt import tnt
from quadric.space import ParameterSpace
from tasks import TASKS, Task

Ranges = Mapping[str, tuple[float, float]]
Values = dict[str, float]
Run = dict[str, Any]

CLOCKS: dict[str, Callable[[], float]] = {"wall": now, "cpu": time.process_time}


@dataclass(frozen=True)
class Method:
    """How to build an optimiser, or several that share a model, and where its options are looked for.

    Attributes:
        build: of a model, the schedule of statistics and inverses, and a value for each range.
        ranges: by the names of the options.
    """

    build: Callable[..., Sequence[Optimizer]]
    ranges: Ranges


def _adam(model: nn.Module, schedule: Schedule, *, lr: float, eps: float) -> list[Optimizer]:
    return [torch.optim.Adam(model.parameters(), lr=lr, eps=eps)]


def _sgd(model: nn.Module, schedule: Schedule, *, lr: float) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)]


def _muon(model: nn.Module, schedule: Schedule, *, lr: float, eps: float) -> list[Optimizer]:
    """Muon for matrices, its steps as long as Adam's, and Adam for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no Muon")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.Adam(rest, lr=lr, eps=eps)] if rest else [muon]


FAMILY: Ranges = {"lr": (1e-5, 1e-1), "damping": (1e-3, 1.0)}
TNT_RANGES: Ranges = {"lr": (1e-5, 1e-1), "damping": (1e-2, 10.0)}
"""Of `tnt`, whose damping acts on every factor, and is 1 by default."""


def family(make: Callable[..., Optimizer], ranges: Ranges = FAMILY, **options: Any) -> Method:
    """One of the functions of `quadric.optim`, with options that are not tuned."""
    return Method(lambda model, schedule, **tuned: [make(model, **{"schedule": schedule, **tuned, **options})], ranges)


METHODS: dict[str, Method] = {
    "adam": Method(_adam, {"lr": (1e-5, 1e-1), "eps": (1e-8, 1e-2)}),
    "sgd": Method(_sgd, {"lr": (1e-4, 1.0)}),
    "muon": Method(_muon, {"lr": (1e-5, 1e-1), "eps": (1e-8, 1e-2)}),
    "mini_block_fisher": family(mini_block_fisher),
    "kfac": family(kfac),
    "kbfgs": family(kbfgs),
    "kbfgs_l": family(kbfgs_l),
    "shampoo": family(shampoo),
    "tnt": family(tnt, TNT_RANGES),
}
"""What is compared, and where each is looked for."""
VARIANTS: dict[str, Method] = {
    "mini_block_fisher_separate": family(mini_block_fisher, blocks=MiniBlocks(averaged=False, largest=64)),
    "mini_block_fisher_averaged_64": family(mini_block_fisher, blocks=MiniBlocks(largest=64)),
    "mini_block_fisher_whole": family(mini_block_fisher, blocks=MiniBlocks(largest=4096)),
    "mini_block_fisher_per_example": family(mini_block_fisher, blocks=MiniBlocks(per_example=True)),
    "mini_block_fisher_root": family(mini_block_fisher, blocks=MiniBlocks(exponent=-0.5)),
    "mini_block_fisher_2_25": family(mini_block_fisher, schedule=Schedule(statistics=2, inverses=25)),
    "mini_block_fisher_10_100": family(mini_block_fisher, schedule=Schedule(statistics=10, inverses=100)),
    "kfac_sampled": family(kfac, fisher="sampled"),
    "kfac_pi_one": family(kfac, factors=KroneckerFactors(pi="one")),
    "tnt_sampled": family(tnt, TNT_RANGES, fisher="sampled"),
}
"""What the methods are with one option changed; compared when they are named."""


def drawn(ranges: Ranges, trial: int) -> Values:
    """Log-uniform; of one trial, all methods have the same places in their ranges."""
    numbers = random.Random(f"trial {trial}")
    return {name: low * (high / low) ** numbers.random() for name, (low, high) in ranges.items()}


class Runs:
    """Finished trainings, by what was asked for, in a file that is whole at all times.

    Args:
        file: None: they are forgotten at the end.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self.runs, self.rows = file, list[Run](), list[dict[str, Any]]()
        if file is not None and file.exists():
            try:
                self.runs = json.loads(file.read_text())["runs"]
            except (json.JSONDecodeError, KeyError, TypeError):
                sys.exit(f"{file} was not written by this benchmark: give --json another file")

    def found(self, asked: dict[str, Any]) -> Run | None:
        return next((run for run in self.runs if run["asked"] == asked), None)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.write()

    def add_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        if self.file is not None:
            with new_file(self.file) as temporary:
                temporary.write_text(json.dumps({"rows": self.rows, "runs": self.runs}, indent=1))


class Trainer:
    """A model at work, and its seconds.

    Args:
        task: what is trained.
        method: by what.
        values: of its options.
        seed: of the start and of the data.
        chosen: the options of the command.
    """

    def __init__(self, task: Task, method: Method, values: Values, seed: int, chosen: argparse.Namespace) -> None:
        torch.manual_seed(seed)
        self.task, self.chosen, self.clock = task, chosen, CLOCKS[chosen.clock]
        self.model = task.build().to(chosen.device)
        self.optimizers = method.build(self.model, task.schedule, **values)
        self.rates = [(group, group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups]
        self.batches = task.batches(torch.Generator().manual_seed(seed))
        self.seconds, self.steps = 0.0, 0

    @property
    def over(self) -> bool:
        return self.seconds >= self.chosen.seconds

    def step(self) -> float:
        """One step on the next minibatch; returns the loss before it."""
        start = self.clock()
        gone = self.seconds / self.chosen.seconds
        factor = (1 + math.cos(math.pi * gone)) / 2 if self.chosen.rates == "cosine" else 1.0
        for group, rate in self.rates:
            group["lr"] = rate * factor
        self.model.train()
        self._shrink(self.task.decay * factor)
        objective = self._objective(next(self.batches))
        loss = float(self.optimizers[0].step(objective))  # type: ignore[arg-type]
        for optimizer in self.optimizers[1:]:
            optimizer.step()
        self.seconds += self.clock() - start
        self.steps += 1
        return loss

    def _objective(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Objective:
        anchor = None
        if self.task.penalty:
            anchor = Anchor(torch.zeros_like(ParameterSpace(self.model).point()), self.task.penalty)
        return Objective(self.model, self.task.loss, [batch], seed=self.steps, anchor=anchor)

    @torch.no_grad()
    def _shrink(self, by: float) -> None:
        if by:
            torch._foreach_mul_([p for p in self.model.parameters() if p.ndim > 1], 1 - by)

    def train(self, looks: int) -> Run:
        """What the training came to; its measures are None where it diverged.

        Args:
            looks: for the curve; without one, nothing is tested.
        """
        curve: list[dict[str, float]] = []
        measures = None
        try:
            while not self.over:
                if looks and self.seconds >= len(curve) * self.chosen.seconds / looks:
                    self._look(curve)
                if not math.isfinite(self.step()):
                    raise FloatingPointError("the loss is not finite")
            measures = {**self._look(curve), **(self.task.test(self.model) if looks else {})}
        except FloatingPointError:
            pass
        return {"seconds": self.seconds, "steps": self.steps, "measures": measures, "curve": curve if looks else []}

    def _look(self, curve: list[dict[str, float]]) -> dict[str, float]:
        found = self.task.measure(self.model)
        if not all(map(math.isfinite, found.values())):
            raise FloatingPointError(f"the model is at {found}")
        curve.append({"seconds": round(self.seconds, 3), "steps": self.steps, **found})
        return found


MEASURES = {False: ["training_loss", "held_out_loss"], True: ["training_loss", "validation_accuracy", "test_accuracy"]}
"""The columns, by whether a task is judged by its accuracy."""


class Benchmark:
    """A task, its finished trainings, and the options of the command."""

    def __init__(self, task: Task, runs: Runs, chosen: argparse.Namespace) -> None:
        self.task, self.runs, self.chosen = task, runs, chosen

    def run(self, name: str, values: Values, seed: int, what: str, *, looks: int = 0) -> Run:
        """A training, or what is known of it."""
        kept = ("task", "narrow", "seconds", "rates", "clock", "threads", "device")
        asked = {key: getattr(self.chosen, key) for key in kept}
        asked |= {"method": name, "values": values, "seed": seed, "looks": looks}
        run, known = self.runs.found(asked), "known"
        if run is None:
            trained = Trainer(self.task, (METHODS | VARIANTS)[name], values, seed, self.chosen).train(looks)
            run, known = {"asked": asked, **trained}, f"{trained['steps']} steps"
            self.runs.add(run)
        measures = "diverged" if run["measures"] is None else shown(run["measures"])
        print(f"{name}, {what}: {shown(values)}: {measures} ({known})", file=sys.stderr, flush=True)
        return run

    def row(self, name: str) -> dict[str, Any]:
        """Tunes a method, and runs what is best from all seeds."""
        chosen, ranges = self.chosen, (METHODS | VARIANTS)[name].ranges
        trials = [
            self.run(name, drawn(ranges, k), 0, f"trial {k + 1} of {chosen.trials}")
            for k in range(0 if chosen.set else chosen.trials)
        ]
        sound = [run for run in trials if run["measures"] is not None]
        row = {"task": chosen.task, "method": name, "trials": len(trials), "diverged": len(trials) - len(sound)}
        if trials and not sound:
            return {**row, "values": None}
        if trials:
            best = min(sound, key=lambda run: self.task.rank(run["measures"]))["asked"]["values"]
        else:
            best = {option: value for option, value in chosen.set if option in ranges}
        finals = [
            self.run(name, best, seed, f"seed {seed} of {chosen.seeds}", looks=chosen.looks)
            for seed in range(1, chosen.seeds + 1)
        ]
        ended = [run for run in finals if run["measures"] is not None]
        row |= {"values": best, "seeds": len(finals), "seeds_diverged": len(finals) - len(ended)}
        if ended:
            row |= {"steps": statistics.median(run["steps"] for run in ended)}
            row |= {"milliseconds": statistics.median(1000 * run["seconds"] / run["steps"] for run in ended)}
            for measure in ended[0]["measures"]:
                found = [run["measures"][measure] for run in ended]
                row[measure] = [statistics.median(found), min(found), max(found)]
        return row


def shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def cells(row: Mapping[str, Any], measures: Sequence[str]) -> list[str]:
    """A row for the reader."""
    if row["values"] is None:
        return [row["method"], "all diverged", *["-"] * (4 + len(measures))]
    lost = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    seeds = f" ({row['seeds_diverged']} diverged)" if row["seeds_diverged"] else ""
    found = [row.get(name) for name in measures]
    return [
        row["method"],
        shown(row["values"]),
        f"{row['trials']}{lost}",
        f"{row['seeds']}{seeds}",
        f"{row['steps']:.0f}" if "steps" in row else "-",
        f"{row['milliseconds']:.1f}" if "milliseconds" in row else "-",
        *("-" if number is None else "{:.2f} ({:.2f} to {:.2f})".format(*number) for number in found),
    ]


def _value(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    return name, float(number)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the parent of mnist/, orl_faces/, cifar10/ and planetoid/")
    parser.add_argument("--task", default="mnist", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *VARIANTS])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each training")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--set", nargs="+", type=_value, default=[], metavar="NAME=VALUE",
        help="instead of the search: of every method that has the option",
    )  # fmt: skip
    parser.add_argument("--rates", default="cosine", choices=["cosine", "constant"])
    parser.add_argument("--looks", type=int, default=10, help="evaluations for a seed's curve, beside the last one")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where trainings are kept")
    chosen = parser.parse_args()
    if chosen.data is None and chosen.task != "curves":
        sys.exit(f"--task {chosen.task} is read from files: give their folder with --data")
    if chosen.data is not None and not chosen.data.is_dir():
        sys.exit(f"--data {chosen.data}: there is no such folder")
    if chosen.clock == "cpu" and (chosen.threads != 1 or chosen.device != "cpu"):
        sys.exit("--clock cpu counts the seconds of one core: give --threads 1 and --device cpu with it")
    if min(chosen.trials, chosen.seeds) <= 0 or not 0 < chosen.seconds < math.inf:
        sys.exit("--trials, --seeds and --seconds must be positive numbers")
    check_machine(chosen)
    given = {name for name, _ in chosen.set}
    for name in chosen.methods if given else ():
        if lacking := [option for option in (METHODS | VARIANTS)[name].ranges if option not in given]:
            sys.exit(f"--set: {name} has {' and '.join(lacking)} as well; give a value")
    return chosen


def compare(chosen: argparse.Namespace) -> None:
    """Prints the table, and writes it."""
    runs = Runs(chosen.json)
    try:
        task = TASKS[chosen.task](chosen.data, chosen.narrow, torch.device(chosen.device))
    except (OSError, ValueError) as error:
        sys.exit(f"--data {chosen.data}: {error}; give the parent of mnist/, orl_faces/, cifar10/ and planetoid/")
    warm = task.build().to(chosen.device)  # what torch sets up at its first steps is nobody's cost
    Objective(warm, task.loss, [next(task.batches(torch.Generator()))])()
    benchmark, measures = Benchmark(task, runs, chosen), MEASURES[task.accuracy]
    columns = ["method", "best of the trials", "trials", "seeds", "steps", "ms a step"]
    columns += [name.replace("_", " ") for name in measures]
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in chosen.methods:
        try:
            row = benchmark.row(name)
        except ImportError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr, flush=True)
            continue
        runs.add_row(row)
        table.append(f"| {' | '.join(cells(row, measures))} |")
    print("\n".join(table), flush=True)


def main() -> None:
    """Runs the command."""
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    try:
        compare(chosen)
    except KeyboardInterrupt:
        kept = f"what was finished is in {chosen.json}" if chosen.json else "without --json nothing is kept"
        print(f"\nstopped; {kept}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
