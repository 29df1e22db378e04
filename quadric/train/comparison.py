"""A job that is not speech, from its data to a page that compares its trainings; each is done once."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quadric.comm.communicator import Communicator, Solo
from quadric.progress import Progress, silent
from quadric.train import checkpoint
from quadric.train.asynchronous import asynchronous_key
from quadric.train.finished import environment
from quadric.train.metrics import MetricsLog
from quadric.train.pipeline import Result
from quadric.train.report import Environment, Report, Run, write_report
from quadric.train.stages import Stages, alone_in, plain, point, reading, write_json
from quadric.train.task import Material, TaskJob
from quadric.train.trainer import evaluate
from quadric.train.trainers import trainer_of

logger = logging.getLogger(__name__)

JOB = "comparison.json"
"""In the working folder: what the job was and what came of it."""


def compare(job: TaskJob, work: Path, *, progress: Progress = silent, communicator: Communicator = Solo()) -> Result:
    """Does the whole job in ``work``; what was done there before is not done again.

    Several ranks share the trainings; ``work`` has to be the same folder for all.

    Raises:
        Interrupted: it was asked to stop, and has saved its state.
        ValueError: data or folder are not as they should be.
    """
    with ExitStack() as held:
        communicator.first(f"taking {work}", partial(held.enter_context, alone_in(work)))
        material = job.task.load(job.place, seed=job.seed, shard=(communicator.rank, communicator.size))
        results = {name: _trained(job, name, work, material, progress, communicator) for name in job.methods}
        summary = {"title": job.name, "recipe": plain(job), "results": results}
        summary["environment"] = plain(environment(job.seed))
        communicator.first("writing the report", partial(_write, summary, work))
        return Result(tuple(_line(name, result) for name, result in results.items()), work / "report.html")


def _trained(
    job: TaskJob, name: str, work: Path, material: Material, progress: Progress, communicator: Communicator
) -> dict[str, float]:
    """What a training ended with, on all sets."""
    method = job.methods[name]
    key = (
        method,
        job.task,
        job.evaluations,
        job.place.type,
        job.autocast,
        job.seed,
        *asynchronous_key(job.asynchronous),
    )
    folder = communicator.first_then_all(f"beginning {name}", partial(Stages(work).folder, name, *key))
    torch.manual_seed(job.seed)
    model = material.build().to(job.place)
    start = material.train.state_dict()
    trainer = trainer_of(
        method,
        model,
        material.loss,
        material.train,
        material.dev,
        folder,
        evaluations=job.evaluations,
        autocast=job.autocast,
        seed=job.seed,
        communicator=communicator,
        asynchronous=job.asynchronous,
    )
    best = trainer.fit(progress=progress, what=name)
    material.train.load_state_dict(start)  # every training begins where the data does
    communicator.first(f"ending {name}", partial(point, work / name, folder))
    results = folder / "results.json"
    if results.exists():
        with reading(folder):
            return dict(json.loads(results.read_text()))
    score = partial(evaluate, model, material.loss, autocast=job.autocast, communicator=communicator)
    with trainer.at_result():
        found = {f"last_train_{what}": value for what, value in score(material.seen).items()}
        found |= {f"last_dev_{what}": value for what, value in score(material.dev).items()}
    model.load_state_dict(best["model"])
    for split, stream in (("dev", material.dev), ("test", material.test)):
        if stream is not None:
            found |= {f"{split}_{what}": value for what, value in score(stream).items()}
    found |= {"updates": trainer.update, "seconds": trainer.seconds}
    communicator.first(f"keeping {name}", partial(write_json, results, found))
    return found


def _line(name: str, result: dict[str, float]) -> str:
    """A result for the reader."""
    told = [f"training loss {result['last_train_loss']:.4f}", f"held-out loss {result['dev_loss']:.4f}"]
    if "test_loss" in result:
        told.append(f"test loss {result['test_loss']:.4f}")
    if "test_accuracy" in result:
        told.append(f"test accuracy {100 * result['test_accuracy']:.2f} %")
    told.append(f"{result['updates']:.0f} updates, {result['seconds']:.1f} s")
    return f"{name}: {', '.join(told)}"


def _write(summary: dict[str, Any], work: Path) -> None:
    write_json(work / JOB, summary)
    report(work)


def report(work: Path) -> Path:
    """Writes ``report.html`` of the finished job in ``work`` again."""
    with reading(work / JOB):
        summary = json.loads((work / JOB).read_text())
        environment = Environment(**summary["environment"])
        runs = [_run(name, work / name, result) for name, result in summary["results"].items()]
    lines = [_line(name, result) for name, result in summary["results"].items()]
    page = Report(
        title=summary["title"], runs=runs, summary="; ".join(lines), recipe=summary["recipe"], environment=environment
    )
    write_report(page, work / "report.html")
    return work / "report.html"


def _run(name: str, folder: Path, result: dict[str, float]) -> Run:
    best = checkpoint.load(folder / "model.pt")
    return Run(
        name=name,
        curves=MetricsLog(folder / "metrics.jsonl").records(),
        scores={},
        updates=int(result["updates"]),
        seconds=result["seconds"],
        parameters=sum(value.numel() for value in best["model"].values() if value.is_floating_point()),
        notes=_line(name, result),
        criterion="the loss",
    )
