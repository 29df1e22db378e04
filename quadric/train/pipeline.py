"""A job from recordings to word error rate and report; each stage is done once."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from quadric.comm.communicator import Communicator, Solo
from quadric.data.stream import FrameStream
from quadric.files import new_file
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import AcousticModel, log_priors
from quadric.progress import Progress, silent
from quadric.speech import scoring
from quadric.speech.corpus import Corpus
from quadric.speech.decoding import Decoder, search
from quadric.speech.graph import decoding_graph, write_graph
from quadric.speech.scoring import Errors, Score
from quadric.speech.topology import Tying
from quadric.speech.tree import ContextStatistics, grow, retie, untie
from quadric.train import checkpoint
from quadric.train.decode import write_decoded
from quadric.train.flat_start import Aligned, Targets, flat_start, viterbi
from quadric.train.method import Method
from quadric.train.metrics import MetricsLog
from quadric.train.plan import Plan
from quadric.train.prepare import Prepared, prepare
from quadric.train.recipe import Job
from quadric.train.report import Environment, Report, Run, Sweep, write_report
from quadric.train.stages import Stages, alone_in, digest, plain, reading
from quadric.train.system import System
from quadric.train.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a job ends with: lines in Kaldi's form, and the page."""

    lines: tuple[str, ...]
    report: Path


@dataclass(frozen=True)
class Units:
    """What the network's outputs are, and which of them each frame is."""

    tying: Tying
    train: Targets
    dev: Targets
    graph: Path

    @cached_property
    def log_prior(self) -> Float[np.ndarray, " C"]:
        """Of the outputs, by how often they occur in the training set."""
        counts = np.bincount(np.concatenate(list(self.train.values())), minlength=self.tying.num_pdfs)
        return log_priors(torch.from_numpy(counts)).float().numpy()


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
        aligned = _realigned(job, job.realign, prepared, aligned, units, stages, progress, communicator)
        units = by_first("making the graph again", partial(choose_units, job, prepared, aligned, stages, progress))
    for name, method in job.methods.items():
        folder = _trained(job, name, method, prepared, units, stages, progress, communicator)
        tested = partial(_tested, job, work / name, prepared, units, folder, progress)
        communicator.first(f"decoding by {name}", tested)
    communicator.first("writing the report", partial(_finished, job, work, prepared, aligned, units))
    lines = [
        f"{score.total.line} {name} {split}"
        for name in job.methods
        for split, score in _scores(work / name / "decoded").items()
    ]
    return Result(tuple(lines), work / "report.html")


def _finished(job: Job, work: Path, prepared: Prepared, aligned: Aligned, units: Units) -> None:
    """Writes ``job.json`` and the report."""
    summary = {
        "title": job.name,
        "recipe": plain(job),
        "runs": list(job.methods),
        "perplexity": {split: round(value, 2) for split, value in prepared.perplexity.items()},
        "outputs": units.tying.num_pdfs,
        "alignment": _describe(aligned, prepared),
        "environment": plain(_environment(job.seed)),
    }
    with new_file(work / "job.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    report(work)


def choose_units(job: Job, prepared: Prepared, aligned: Aligned, stages: Stages, progress: Progress) -> Units:
    """Monophone states, or triphone states tied by a tree; and the graph over them."""
    tying, train, dev = aligned.tying, aligned.train, aligned.dev
    if job.tree is not None:
        key = digest(dict(train), prepared.key)

        def make_tree(folder: Path) -> None:
            assert job.tree is not None
            statistics = ContextStatistics.accumulate(
                train, prepared.features["train"], tying, cepstra=job.tree.cepstra, progress=progress
            )
            grow(statistics, job.tree).save(folder / "tying.npz")

        folder = stages.make("tree", key, job.tree, by=make_tree)
        with reading(folder):
            tied = Tying.load(folder / "tying.npz")
        train, dev = retie(train, tying, tied), retie(dev, tying, tied)
        tying = tied

    def make_graph(folder: Path) -> None:
        logger.info("composing the decoding graph: %d words, %d outputs", len(prepared.lexicon.words), tying.num_pdfs)
        write_graph(decoding_graph(prepared.lexicon, prepared.arpa, tying), folder / "graph.fst")

    graph = stages.make(
        "graph", prepared.lexicon, prepared.arpa.read_text(encoding="utf-8"), tying.table, tying.phones, by=make_graph
    )
    return Units(tying, train, dev, graph / "graph.fst")


def _realigned(
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
    trained = _trained(job, "realign", method, prepared, units, stages, progress, communicator)

    def make(folder: Path) -> None:
        model = _network(job, prepared, units, trained)
        pdfs = viterbi(job, prepared, units.tying, model, units.log_prior, progress)
        states = {split: untie(found, aligned.tying, units.tying) for split, found in pdfs.items()}
        Aligned(aligned.tying, states["train"], states["dev"]).save(folder)

    made = partial(stages.make, "realigned", trained.name, by=make)
    return Aligned.load(aligned.tying, communicator.first_then_all("aligning again", made))


def _network(job: Job, prepared: Prepared, units: Units, trained: Path) -> AcousticModel:
    """The network in the folder of a training, with its best parameters."""
    model = job.network.build(prepared.dimension, units.tying.num_pdfs)
    with reading(trained):
        model.load_state_dict(checkpoint.load(trained / "model.pt")["model"])
    return model.eval()


def _trained(
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
    training = (job.network, job.augment, job.chunk, job.autocast, job.seed)
    place = partial(stages.folder, name, method, *training, *data)
    folder = communicator.first_then_all(f"beginning {name}", place)
    torch.manual_seed(job.seed)
    model = job.network.build(prepared.dimension, units.tying.num_pdfs)
    model.initialise_output_bias(torch.from_numpy(units.log_prior))
    context = (model.left_context, model.right_context)
    stream = FrameStream(
        _only(prepared.features["train"], units.train),
        units.train,
        context=context,
        chunk=job.chunk,
        seed=job.seed,
        transform=job.augment,
        shard=(communicator.rank, communicator.size),
    )
    held_out = FrameStream(_only(prepared.features["dev"], units.dev), units.dev, context=context, chunk=None)
    plan = Plan(method.epochs, method.sampler, autocast=job.autocast, seed=job.seed, patience=method.patience)
    trainer = Trainer(
        model,
        CrossEntropy(),
        method.build(model.parameters()),
        stream,
        held_out,
        plan,
        folder,
        schedule=method.schedule,
        communicator=communicator,
    )
    best = trainer.fit(progress=progress, what=name)
    logger.info("%s: held-out loss %.4f, frames right %.4f", name, best["loss"], best["accuracy"])
    return folder


def _tested(job: Job, link: Path, prepared: Prepared, units: Units, folder: Path, progress: Progress) -> None:
    """Decodes the sets and tunes the system of the training in ``folder``, to which ``link`` is then a link."""

    def make(out: Path) -> None:
        system = System(
            front=prepared.front,
            inputs=prepared.dimension,
            network=job.network,
            model=_network(job, prepared, units, folder),
            log_prior=units.log_prior,
            tying=units.tying,
            lexicon=prepared.lexicon,
            graph=units.graph,
            decoding=job.decoding,
        )
        with reading(units.graph.parent):
            decoding = system.decoder(jobs=job.jobs)
        with decoding as decoder:
            system = _tuned(job, prepared, system, decoder, out, progress)
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
    _point(folder / "decoded", decoded)
    _point(folder / "system", decoded / "system")
    _point(link, folder)


def _tuned(job: Job, prepared: Prepared, system: System, decoder: Decoder, out: Path, progress: Progress) -> System:
    """The system with the weights that make the fewest errors on (a part of) the development set."""
    corpus = _spread(prepared.corpora["dev"], job.decoding.sweep_utterances)
    likelihoods = system.likelihoods(prepared.features["dev"], autocast=job.autocast)
    scores = {u.id: likelihoods[u.id] for u in corpus}
    references = {u.id: u.words for u in corpus}
    tried: dict[tuple[float, float], Errors] = {}

    def errors_at(lm_weight: float, word_penalty: float) -> int:
        found = system.tuned(lm_weight, word_penalty).recognise(decoder, scores, progress=progress)
        total = scoring.score(references, {id: hypothesis.words for id, hypothesis in found.items()}).total
        tried[lm_weight, word_penalty] = total
        return total.errors

    best = search(errors_at, lm_weights=job.decoding.lm_weights, word_penalties=job.decoding.word_penalties).best
    rows = [{"lm_weight": w, "word_penalty": p, **asdict(errors)} for (w, p), errors in tried.items()]
    chosen = {"lm_weight": best.lm_weight, "word_penalty": best.word_penalty}
    (out / "sweep.json").write_text(json.dumps({"chosen": chosen, "tried": rows}, indent=1))
    return system.tuned(best.lm_weight, best.word_penalty)


def report(work: Path) -> Path:
    """Writes ``report.html`` of the finished job in ``work``.

    Raises:
        FileNotFoundError: no finished job is there.
    """
    if not (work / "job.json").is_file():
        raise FileNotFoundError(f"work={work}: no finished job there; run quadric train first")
    with reading(work / "job.json"):
        summary = json.loads((work / "job.json").read_text())
        environment = Environment(**summary["environment"])
    runs, sweeps = [], []
    for name in summary["runs"]:
        folder = work / name
        with reading(folder.resolve()):
            runs.append(_run_of(name, folder))
            sweeps.append(_sweep_of(name, folder))
    page = Report(
        title=summary["title"],
        runs=runs,
        summary=_summary(summary),
        recipe=summary["recipe"],
        environment=environment,
        sweeps=sweeps,
        alignment=summary["alignment"],
    )
    write_report(page, work / "report.html")
    return work / "report.html"


def _run_of(name: str, folder: Path) -> Run:
    best = checkpoint.load(folder / "model.pt")
    curves = MetricsLog(folder / "metrics.jsonl").records()
    if not curves:
        raise ValueError("metrics.jsonl holds no record")
    notes = [f"lowest held-out loss {best['loss']:.4f} after update {best['update']}"]
    notes += [str(record["ended"]) for record in curves if "ended" in record]
    return Run(
        name=name,
        curves=curves,
        scores=_scores(folder / "decoded"),
        updates=int(str(curves[-1]["update"])),
        seconds=float(str(curves[-1]["seconds"])),
        parameters=sum(value.numel() for value in best["model"].values()),
        notes="; ".join(notes),
    )


def _sweep_of(name: str, folder: Path) -> Sweep:
    sweep = json.loads((folder / "decoded" / "sweep.json").read_text())
    tried = {(row.pop("lm_weight"), row.pop("word_penalty")): Errors(**row) for row in sweep["tried"]}
    return Sweep(f"{name} dev", tried, tuple(sweep["chosen"].values()))


def _scores(decoded: Path) -> dict[str, Score]:
    scores = {}
    for split in ("dev", "test"):
        files = {name: scoring.read_text(decoded / split / name) for name in ("ref", "text", "utt2spk")}
        speakers = {id: speaker[0] for id, speaker in files["utt2spk"].items()}
        scores[split] = scoring.score(files["ref"], files["text"], speakers=speakers)
    return scores


def _summary(summary: Mapping[str, Any]) -> str:
    perplexity = ", ".join(f"{value:.1f} on {split}" for split, value in summary["perplexity"].items())
    return f"{summary['outputs']} network outputs. Perplexity of the language model: {perplexity}."


def _describe(aligned: Aligned, prepared: Prepared) -> dict[str, object]:
    frames = np.concatenate(list(aligned.train.values()))
    silence = aligned.tying.phone_of_pdf[frames] == 0
    return {
        "training utterances aligned": len(aligned.train),
        "training utterances left out": len(prepared.perturbed) - len(aligned.train),
        "training frames": len(frames),
        "silence, share of the frames": round(float(silence.mean()), 3),
    }


def _environment(seed: int) -> Environment:
    packages = ("torch", "numpy", "kaldifst", "kaldi-decoder", "kaldi-native-fbank", "kaldialign", "quadric")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = {"processors": os.cpu_count() or 1, "memory": f"{memory:.0f} GiB", "threads": torch.get_num_threads()}
    return Environment(versions, machine, {"job": seed})


def _only(features: Mapping[str, np.ndarray], ids: Iterable[str]) -> dict[str, np.ndarray]:
    return {id: features[id] for id in ids}


def _spread(corpus: Corpus, count: int) -> Corpus:
    """``count`` evenly spaced utterances, or all."""
    places = np.linspace(0, len(corpus) - 1, min(count, len(corpus))).round().astype(int)
    return Corpus(corpus.name, tuple(corpus.utterances[place] for place in places))


def _point(link: Path, folder: Path) -> None:
    """Makes ``link`` a relative link to ``folder``, which lies beside or below it."""
    target = folder.relative_to(link.parent)
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
