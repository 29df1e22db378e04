"""A job from recordings to word error rate and report; each stage is done once."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from quadric.comm.communicator import Communicator, Solo
from quadric.files import new_file
from quadric.progress import Progress, silent
from quadric.speech import scoring
from quadric.train.criterion import SequenceTraining
from quadric.train.decode import write_decoded
from quadric.train.finished import describe, describe_data, environment, report, scores
from quadric.train.flat_start import Aligned, flat_start
from quadric.train.left_out import lines
from quadric.train.prepare import Prepared, prepare
from quadric.train.recipe import Job
from quadric.train.sequence import SequenceSet, compete, targets
from quadric.train.sources import Split
from quadric.train.stages import Stages, alone_in, plain, point, reading, write_json
from quadric.train.system import System
from quadric.train.training import Sets, fit, network, realigned, trained
from quadric.train.units import Units, choose_units
from quadric.train.weights import choose_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a job ends with: lines in Kaldi's form, and the page."""

    lines: tuple[str, ...]
    report: Path


def run(job: Job, work: Path, *, progress: Progress = silent, communicator: Communicator = Solo()) -> Result:
    """Does the whole job in ``work``; what was done there before is not done again.

    Several ranks share the trainings. All else is done by rank 0; the others wait for it and read what it has made, so
    that ``work`` has to be the same folder for all.
    """
    with ExitStack() as held:
        communicator.first(f"taking {work}", partial(held.enter_context, alone_in(work)))
        return _run(job, work, progress, communicator)


def _run(job: Job, work: Path, progress: Progress, communicator: Communicator) -> Result:
    stages, by_first = Stages(work), communicator.first_then_all
    prepared = by_first("preparing the data", partial(prepare, job, stages, progress))
    aligned = by_first("aligning", partial(flat_start, job, prepared, stages, progress))
    units = by_first("making the graph", partial(choose_units, job, prepared, aligned, stages, progress))
    if job.realign is not None:
        aligned = realigned(job, job.realign, prepared, aligned, units, stages, progress, communicator)
        units = by_first("making the graph again", partial(choose_units, job, prepared, aligned, stages, progress))
    for name, method in job.methods.items():
        folder = trained(job, name, method, prepared, units, stages, progress, communicator)
        tested = partial(_tested, job, work / name, prepared, units, folder, progress)
        communicator.first(f"decoding by {name}", tested)
    competitors: dict[str, object] = {}
    if job.sequence is not None:
        competitors = _train_sequences(job, job.sequence, work, prepared, units, stages, progress, communicator)
    communicator.first("writing the report", partial(_finished, job, work, prepared, aligned, units, competitors))
    lines = [
        f"{score.total.line} {name} {split}"
        for name in _runs(job)
        for split, score in scores(work / name / "decoded").items()
    ]
    return Result(tuple(lines), work / "report.html")


def _runs(job: Job) -> list[str]:
    """The names of all trainings that are decoded."""
    return [*job.methods, *(job.sequence.methods if job.sequence else ())]


def _train_sequences(
    job: Job,
    options: SequenceTraining,
    work: Path,
    prepared: Prepared,
    units: Units,
    stages: Stages,
    progress: Progress,
    communicator: Communicator,
) -> dict[str, object]:
    """The trainings by a sequence criterion, from the parameters of one by cross-entropy; facts about their sets."""
    start = work / (options.start or next(iter(job.methods)))
    name = start.resolve().name
    with reading(start):
        system = System.load(start / "system")
    scale = options.criterion.scale or 1 / system.lm_weight
    network = replace(job.network, dropout=options.dropout)
    key = (network, options.criterion, options.competitors, scale, name, job.autocast, job.seed, prepared.key)

    def begun() -> tuple[dict[str, Path], list[str]]:
        folders = {training: stages.folder(training, method, *key) for training, method in options.methods.items()}
        return folders, [training for training, folder in folders.items() if not (folder / _FACTS).is_file()]

    folders, unfinished = communicator.first_then_all("beginning sequence training", begun)
    if unfinished:
        loss = options.criterion.loss(torch.from_numpy(units.log_prior), scale, job.jobs)

        def making() -> dict[Split, SequenceSet]:
            given = (prepared, system, scale, name, stages, progress)
            competing = compete(options.competitors, *given, jobs=job.jobs, rank=communicator.rank)
            missing, sharpness = options.competitors.missing, options.criterion.sharpness
            return {
                split: targets(each, loss, missing, progress, split, sharpness=sharpness)
                for split, each in competing.items()
            }

        sets = communicator.first_then_all("making lattices", making)
        data = Sets(prepared, sets["train"].targets, sets["dev"].targets)
        facts = {name: value for split, found in sets.items() for name, value in found.facts(split).items()}
        for training in unfinished:
            torch.manual_seed(job.seed)
            model = network.build(prepared.dimension, units.tying.num_pdfs)
            model.load_state_dict(system.model.state_dict())
            method, folder = options.methods[training], folders[training]
            fit(job, training, method, model, loss, data, folder, progress, communicator, chunk=None)
            communicator.first(f"ending {training}", partial(_ended, folder, facts, sets))
    for training, folder in folders.items():
        tested = partial(_tested, job, work / training, prepared, units, folder, progress)
        communicator.first(f"decoding by {training}", tested)
    first = next(iter(folders.values()))
    with reading(first):
        return dict(json.loads((first / _FACTS).read_text()))


_FACTS = "sets.json"
"""In the folder of a finished sequence training: what its sets were."""


def _ended(folder: Path, facts: Mapping[str, object], sets: Mapping[Split, SequenceSet]) -> None:
    """Writes who was left out and why, a line each, and then the facts, which say that the training is done."""
    with new_file(folder / "left_out") as temporary:
        told = (lines(found.left_out, f"{split} ") for split, found in sets.items())
        temporary.write_text("".join(told), encoding="utf-8")
    write_json(folder / _FACTS, facts)


def _finished(
    job: Job, work: Path, prepared: Prepared, aligned: Aligned, units: Units, competitors: Mapping[str, object]
) -> None:
    """Writes ``job.json`` and the report."""
    summary = {
        "title": job.name,
        "recipe": plain(job),
        "runs": _runs(job),
        "criteria": dict.fromkeys(job.sequence.methods, job.sequence.criterion.kind) if job.sequence else {},
        "perplexity": {split: round(value, 2) for split, value in prepared.perplexity.items()},
        "outputs": units.tying.num_pdfs,
        "data": describe_data(prepared),
        "alignment": describe(aligned, prepared),
        "sequence": competitors,
        "environment": plain(environment(job.seed)),
    }
    write_json(work / "job.json", summary)
    report(work)


def _tested(job: Job, link: Path, prepared: Prepared, units: Units, folder: Path, progress: Progress) -> None:
    """Decodes the sets and tunes the system of the training in ``folder``, to which ``link`` is then a link."""

    def make(out: Path) -> None:
        system = System(
            front=prepared.front,
            inputs=prepared.dimension,
            network=job.network,
            model=network(job, prepared, units, folder),
            log_prior=units.log_prior,
            tying=units.tying,
            lexicon=prepared.lexicon,
            graph=units.graph,
            decoding=job.decoding,
        )
        with reading(units.graph.parent):
            decoding = system.decoder(jobs=job.jobs)
        with decoding as decoder:
            system = _tuned(job, prepared, system, out, progress)
            for split in ("dev", "test"):
                corpus = prepared.corpora[split]
                scores = system.likelihoods(prepared.features[split], autocast=job.autocast)
                found = system.recognise(decoder, {u.id: scores[u.id] for u in corpus}, progress=progress)
                words = {id: hypothesis.words for id, hypothesis in found.items()}
                scoring.write_text(out / split / "text", words)
                write_decoded(out / split, corpus, words)
        system.save(out / "system")

    key = (job.decoding, units.graph.parent.name, prepared.key, prepared.test_key)
    decoded = Stages(folder).make("decoded", *key, by=make)
    point(folder / "decoded", decoded)
    point(folder / "system", decoded / "system")
    point(link, folder)


def _tuned(job: Job, prepared: Prepared, system: System, out: Path, progress: Progress) -> System:
    """The system with the weights that make the fewest errors on the development set."""
    corpus, features = prepared.corpora["dev"], prepared.features["dev"]
    best = choose_weights(system, corpus, features, autocast=job.autocast, jobs=job.jobs, progress=progress)
    rows = [{"lm_weight": w, "word_penalty": p, **asdict(errors)} for (w, p), errors in best.tried.items()]
    chosen = {"lm_weight": best.lm_weight, "word_penalty": best.word_penalty}
    write_json(out / "sweep.json", {"chosen": chosen, "tried": rows})
    return system.tuned(best.lm_weight, best.word_penalty)
