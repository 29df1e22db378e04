"""Where the time of an NGHF step on a sequence criterion goes, what its choice of an iterate needs, what ranks save.

    python benchmarks/sequence_step.py an4 data=PATH/an4_mfcc [OPTION=VALUE ...] [--work exp/an4] [--steps 6]
        [--gradient-frames 50000] [--curvature-frames 6000] [--ranks 1 2] [--json FILE]

From the network that ``quadric train RECIPE OPTION=VALUE --work FOLDER`` trained by cross-entropy, which is run first,
on the lattices of `sequence`, whose options are the recipe's too. Every part runs on one thread a rank.

The first table is of ``--steps`` steps from there with each matrix in output space: seconds of a step; shares of it in
gradients, in products with both matrices (making ready included) and in candidates; the share of these products, and of
all of the step, in sums over lattices; and the criterion on dev before and after.

The second goes along the first kind of step with all iterates of run 2 evaluated, and tells what going backwards from
the last until the value rises would have chosen: as good a value, how often; and evaluations of both.

The third is of ranks that share the gradient's data and the curvature's: seconds of a gradient, and of a product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from common import Table
from quadric.cli import make_speech_job
from quadric.comm.collective import Collective
from quadric.comm.communicator import Communicator, Solo
from quadric.data.stream import FrameStream
from quadric.loss import sequence_loss
from quadric.loss.sequence import SequenceLoss
from quadric.model.acoustic import AcousticModel
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.optim.damping import AfterRejection
from quadric.optim.descent import LocalModel
from quadric.optim.search import BestIterate, Step, Value
from quadric.optim.second_order import nghf
from quadric.progress import silent
from quadric.train.console import bar
from quadric.train.criterion import Matrix
from quadric.train.pipeline import run
from quadric.train.prepare import Prepared, prepare
from quadric.train.recipe import Job
from quadric.train.sequence import compete, targets
from quadric.train.sources import Split
from quadric.train.stages import Stages
from quadric.train.system import System
from quadric.train.trainer import evaluate
from quadric.train.training import only

ITERATIONS, PRODUCTS = 8, 8
KINDS: tuple[Matrix, ...] = ("same_frame", "surrogate", "lattice")


@dataclass(frozen=True)
class Material:
    """What is trained, from where, on what."""

    job: Job
    prepared: Prepared
    system: System
    loss: SequenceLoss
    train: dict[str, Any]
    dev: dict[str, Any]

    def model(self) -> AcousticModel:
        model = self.job.network.build(self.prepared.dimension, self.system.tying.num_pdfs)
        model.load_state_dict(self.system.model.state_dict())
        return model

    def stream(self, model: AcousticModel, split: Split, communicator: Communicator) -> FrameStream:
        wanted = self.train if split == "train" else self.dev
        return FrameStream(
            only(self.prepared.features[split], wanted),
            wanted,
            context=(model.left_context, model.right_context),
            chunk=None,
            shard=(communicator.rank, communicator.size),
        )


def material(chosen: argparse.Namespace, kind: Matrix = "same_frame") -> Material:
    """All that ``run`` left in the working folder, read again."""
    job = _job(chosen)
    options = job.sequence
    assert options is not None
    stages = Stages(chosen.work)
    prepared = prepare(job, stages, silent)
    name = next(iter(job.methods))
    system = System.load(chosen.work / name / "system")
    scale = options.criterion.scale or 1 / system.lm_weight
    loss = replace(options.criterion, curvature=kind).loss(torch.from_numpy(system.log_prior), scale, 1)
    key = (chosen.work / name).resolve().name
    competing = compete(options.competitors, prepared, system, scale, key, stages, silent, jobs=1)
    sharpness = options.criterion.sharpness
    sets = {
        split: targets(each, loss, options.competitors.missing, silent, split, sharpness=sharpness).targets
        for split, each in competing.items()
    }
    return Material(job, prepared, system, loss, dict(sets["train"]), dict(sets["dev"]))


def _job(chosen: argparse.Namespace) -> Job:
    options = [f"name={chosen.recipe}", "hessian_free=none", "sequence.criterion.kind=mpe", "jobs=1", *chosen.options]
    return make_speech_job(chosen.recipe, options)


@dataclass
class LatticeClock:
    """Seconds in sums over lattices."""

    seconds: float = 0.0

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return counted

    @contextmanager
    def running(self) -> Iterator[None]:
        sums, along = sequence_loss.path_sums_batch, SequenceLoss._along
        sequence_loss.path_sums_batch = self.timed(sums)
        SequenceLoss._along = self.timed(along)  # type: ignore[method-assign]
        try:
            yield
        finally:
            sequence_loss.path_sums_batch, SequenceLoss._along = sums, along  # type: ignore[method-assign]


@dataclass(frozen=True)
class Watched(BestIterate):
    """Every iterate is evaluated; ``seen`` has, for each step, their values from the last backwards."""

    clock: LatticeClock = field(default_factory=LatticeClock)
    seen: list[list[float]] = field(default_factory=list)
    lattices: list[float] = field(default_factory=list)

    def select(self, local: LocalModel, path: Any, value: Value) -> Step | None:
        values: list[float] = []
        start = self.clock.seconds

        def watched(theta: torch.Tensor) -> float:
            values.append(value(theta))
            return values[-1]

        step = super().select(local, path, watched)
        self.seen.append(values[: sum(p.step > 0 or bool(p.x.any()) for p in path.points)])
        self.lattices.append(self.clock.seconds - start)
        return step


def draw(model: AcousticModel, loss: SequenceLoss, stream: FrameStream, chosen: argparse.Namespace, step: int,
         communicator: Communicator, autocast: bool) -> Objective:  # fmt: skip
    return Objective(
        model,
        loss,
        stream.draw(chosen.gradient_frames),
        stream.sample(chosen.curvature_frames, key=step),
        autocast=torch.bfloat16 if autocast else None,
        communicator=communicator,
        clock=time.perf_counter,
    )


def steps(chosen: argparse.Namespace, kind: Matrix) -> dict[str, Any]:
    """Steps with one matrix in output space."""
    given = material(chosen, kind)
    model = given.model()
    stream, dev = (given.stream(model, split, Solo()) for split in ("train", "dev"))
    clock = LatticeClock()
    search = Watched(clock=clock)
    optimizer = nghf(model.parameters(), iterations=ITERATIONS, damping=AfterRejection(initial=0.01), search=search)
    before = evaluate(model, given.loss, dev, autocast=given.job.autocast)
    seconds: dict[str, float] = {"all": 0.0}
    with clock.running():
        for step in range(chosen.steps):
            model.train()
            start = time.perf_counter()
            optimizer.step(draw(model, given.loss, stream, chosen, step, Solo(), given.job.autocast))
            seconds["all"] += time.perf_counter() - start
            assert optimizer.diagnosis is not None
            for name, part in optimizer.diagnosis.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + part
        lattices = clock.seconds
    after = evaluate(model, given.loss, dev, autocast=given.job.autocast)
    return {
        "kind": kind,
        "arcs_a_frame": sum(u.lattice.num_arcs for u in given.train.values()) / sum(map(len, given.train.values())),
        "seconds": seconds,
        "lattices": lattices,
        "lattices_of_candidates": sum(search.lattices),
        "values": search.seen,
        "before": before["accuracy"],
        "after": after["accuracy"],
    }


def iteration(chosen: argparse.Namespace, kind: Matrix) -> dict[str, float]:
    """Products for themselves, and what of them and of making them ready is sums over lattices."""
    given = material(chosen, kind)
    model = given.model().train()
    stream = given.stream(model, "train", Solo())
    clock = LatticeClock()
    objective = draw(model, given.loss, stream, chosen, 0, Solo(), given.job.autocast)
    theta = objective.space.point()
    with clock.running():
        start = time.perf_counter()
        matrix = objective.curvature(theta, Curvature.GAUSS_NEWTON)
        vector = torch.randn_like(theta)
        matrix @ vector
        ready, begun, first = time.perf_counter() - start, time.perf_counter(), clock.seconds
        for _ in range(PRODUCTS):
            matrix @ vector
        products = time.perf_counter() - begun
    return {"run": ready + products, "lattices": clock.seconds, "product": products / PRODUCTS,
            "lattices_of_a_product": (clock.seconds - first) / PRODUCTS}  # fmt: skip


def backwards(values: list[float]) -> tuple[float, int]:
    """The value that going back until it rises ends at, and the evaluations of that."""
    best = values[0]
    for count, value in enumerate(values[1:], 2):
        if value > best:
            return best, count
        best = value
    return best, len(values)


def rank(number: int, size: int, meeting: str, chosen: argparse.Namespace) -> dict[str, list[float]]:
    """One process: seconds of gradients and of products."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    given = material(chosen)
    found: dict[str, list[float]] = {"gradient": [], "product": []}
    with Solo() if size == 1 else Collective(number, size, meeting, timeout=600.0) as communicator:
        model = given.model().train()
        stream = given.stream(model, "train", communicator)
        for step in range(chosen.steps + 1):
            objective = draw(model, given.loss, stream, chosen, step, communicator, given.job.autocast)
            theta = objective.space.point()
            communicator.sum_(torch.zeros(1))
            start = time.perf_counter()
            _, gradient = objective.value_and_grad(theta)
            middle = time.perf_counter()
            matrix = objective.curvature(theta, Curvature.GAUSS_NEWTON)
            for _ in range(PRODUCTS):
                matrix @ gradient
            if step:
                found["gradient"].append(middle - start)
                found["product"].append((time.perf_counter() - middle) / PRODUCTS)
    return found


def ranks(size: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The slowest rank's medians."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, get_context("spawn")) as processes:
        futures = [processes.submit(rank, r, size, f"file://{folder}/meeting", chosen) for r in range(size)]
        found = [future.result() for future in futures]
    slowest = {name: statistics.median(map(max, zip(*(r[name] for r in found), strict=True))) for name in found[0]}
    return {"ranks": size, "cores": len(os.sched_getaffinity(0)), **slowest}


def main() -> None:
    chosen = _arguments()
    torch.set_num_threads(1)
    run(replace(_job(chosen), sequence=None), chosen.work, progress=bar)
    material(chosen)
    table = Table(
        ("matrix", "s a step", "gradients", "products", "candidates", "lattices, of a run of CG", "of a product",
         "of the step", "on dev before", "after"),
        None,
    )  # fmt: skip
    tables = [table]
    chosen_values: list[list[float]] = []
    for kind in KINDS:
        found = steps(chosen, kind) | {"iteration": iteration(chosen, kind)}
        chosen_values = chosen_values or found["values"]
        seconds, alone = found["seconds"], found["iteration"]
        whole = seconds["all"]
        shares = [seconds.get(name, 0.0) / whole for name in ("gradient", "products", "evaluation")]
        shares += [alone["lattices"] / alone["run"], alone["lattices_of_a_product"] / alone["product"]]
        shares += [found["lattices"] / whole]
        cells = [kind, f"{whole / chosen.steps:.2f}", *(f"{share:.1%}" for share in shares)]
        table.add(found, [*cells, f"{found['before']:.2%}", f"{found['after']:.2%}"])
    print()
    table = Table(("step", "iterates", "lowest at, from the last", "backwards: evaluations", "as low"), None)
    tables.append(table)
    for step, values in enumerate(chosen_values, 1):
        value, count = backwards(values)
        row = {"step": step, "values": values, "evaluations": count, "as_low": value <= min(values)}
        cells = [f"{step}", f"{len(values)}", f"{values.index(min(values)) + 1}", f"{count}", f"{row['as_low']}"]
        table.add(row, cells)
    print()
    table = Table(("ranks", "gradient, s", "speed-up", "product, s", "speed-up"), None)
    tables.append(table)
    single: dict[str, Any] = {}
    for size in chosen.ranks:
        found = ranks(size, chosen)
        single = single or found
        cells = [f"{size}"]
        for name in ("gradient", "product"):
            cells += [f"{found[name]:.3f}", f"{single[name] / found[name]:.2f}"]
        table.add(found, cells)
    if chosen.json:
        names = ("steps", "candidates", "ranks")
        chosen.json.write_text(
            json.dumps({name: each.rows for name, each in zip(names, tables, strict=True)}, indent=1)
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument("--work", type=Path, default=Path("exp/sequence_step"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gradient-frames", type=int, default=50_000)
    parser.add_argument("--curvature-frames", type=int, default=6_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
