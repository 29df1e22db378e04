"""What a finished job says of itself: its facts, its scores, and the report."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quadric.speech import scoring
from quadric.speech.alignment import min_frames
from quadric.speech.corpus import Corpus
from quadric.speech.scoring import Errors, Score
from quadric.train import checkpoint
from quadric.train.flat_start import Aligned, Targets
from quadric.train.left_out import LeftOut, counts, too_short, unaligned
from quadric.train.metrics import MetricsLog
from quadric.train.prepare import Prepared
from quadric.train.report import Environment, Report, Run, Sweep, write_report
from quadric.train.sources import Split
from quadric.train.stages import reading

logger = logging.getLogger(__name__)


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
            runs.append(_run_of(name, folder, summary.get("criteria", {}).get(name, "cross-entropy")))
            sweeps.append(_sweep_of(name, folder))
    page = Report(
        title=summary["title"],
        runs=runs,
        summary=_summary(summary),
        recipe=summary["recipe"],
        environment=environment,
        sweeps=sweeps,
        data=summary.get("data", {}),
        alignment=summary["alignment"],
        sequence=summary.get("sequence", {}),
    )
    write_report(page, work / "report.html")
    return work / "report.html"


def _run_of(name: str, folder: Path, criterion: str) -> Run:
    best = checkpoint.load(folder / "model.pt")
    curves = MetricsLog(folder / "metrics.jsonl").records()
    if not curves:
        raise ValueError("metrics.jsonl holds no record")
    notes = [f"lowest held-out loss {best['loss']:.4f} after update {best['update']}"]
    notes += [str(record["ended"]) for record in curves if "ended" in record]
    return Run(
        name=name,
        curves=curves,
        scores=scores(folder / "decoded"),
        updates=int(str(curves[-1]["update"])),
        seconds=float(str(curves[-1]["seconds"])),
        parameters=sum(value.numel() for value in best["model"].values()),
        notes="; ".join(notes),
        criterion=criterion,
    )


def _sweep_of(name: str, folder: Path) -> Sweep:
    sweep = json.loads((folder / "decoded" / "sweep.json").read_text())
    tried = {(row.pop("lm_weight"), row.pop("word_penalty")): Errors(**row) for row in sweep["tried"]}
    return Sweep(f"{name} dev", tried, tuple(sweep["chosen"].values()))


def scores(decoded: Path) -> dict[str, Score]:
    """What was recognised on dev and test, scored."""
    scores = {}
    for split in ("dev", "test"):
        files = {name: scoring.read_text(decoded / split / name) for name in ("ref", "text", "utt2spk")}
        speakers = {id: speaker[0] for id, speaker in files["utt2spk"].items()}
        scores[split] = scoring.score(files["ref"], files["text"], speakers=speakers)
    return scores


def _summary(summary: Mapping[str, Any]) -> str:
    perplexity = ", ".join(f"{value:.1f} on {split}" for split, value in summary["perplexity"].items())
    return f"{summary['outputs']} network outputs. Perplexity of the language model: {perplexity}."


def describe_data(prepared: Prepared) -> dict[str, object]:
    """Facts about the sets, for the report: how many utterances are used, and how many are not, and why."""
    facts = dict[str, object]()
    for split, features in prepared.features.items():
        told = {"utterances": len(features), **counts(prepared.left_out.get(split, {}))}
        facts |= {f"{split}: {name}": value for name, value in told.items()}
    return facts


def describe(aligned: Aligned, prepared: Prepared) -> dict[str, object]:
    """Facts about the alignment, for the report. What has no features is left out before, and told with the data."""
    facts = dict[str, object]()
    sets: dict[Split, tuple[Corpus, Targets]] = {
        "train": (prepared.perturbed, aligned.train),
        "dev": (prepared.corpora["dev"], aligned.dev),
    }
    for split, (corpus, pdfs) in sets.items():
        features = prepared.features[split]
        left = [u for u in corpus if u.id in features and u.id not in pdfs]
        why = {u.id: _not_aligned(len(features[u.id]), min_frames(u.words, prepared.lexicon)) for u in left}
        told = {"utterances aligned": len(pdfs), **counts(why), "frames": sum(map(len, pdfs.values()))}
        facts |= {f"{split}: {name}": value for name, value in told.items()}
    frames = np.concatenate(list(aligned.train.values()))
    silence = aligned.tying.phone_of_pdf[frames] == 0
    return facts | {"train: silence, share of the frames": round(float(silence.mean()), 3)}


def _not_aligned(frames: int, least: int) -> LeftOut:
    return too_short(frames, least) if frames < least else unaligned("")


def environment(seed: int) -> Environment:
    """Where a job ran, and with what."""
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
