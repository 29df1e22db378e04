"""Jobs that go on by a sequence criterion: done once, the same after any interruption, and from the right start."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quadric.comm import checkpoint as together
from quadric.comm.communicator import Solo
from quadric.data.stream import FrameStream
from quadric.loss.sequence import MPE
from quadric.model.acoustic import AcousticModel
from quadric.speech.lattices import Lattices
from quadric.train import pipeline
from quadric.train.metrics import MetricsLog
from quadric.train.pipeline import run
from quadric.train.system import System
from quadric.train.trainer import evaluate
from reference.whole_job import (
    PROGRAM,
    RANKS,
    Finished,
    assert_equal,
    contents,
    job,
    only,
    parameters,
    start,
    wait_for,
    without_time,
)

pytestmark = [pytest.mark.speech, pytest.mark.demo, pytest.mark.slow]

MPE_NGHF = (
    "hessian_free=none",
    "sequence.criterion.kind=mpe",
    "sequence.nghf.epochs=2",
    "sequence.nghf.gradient_frames=3000",
    "sequence.nghf.curvature_frames=1000",
    "sequence.nghf.iterations=3",
)
MMI_SGD = (
    "hessian_free=none",
    "sequence.criterion.kind=mmi",
    "sequence.nghf=none",
    "sequence.sgd.epochs=1",
    "sequence.sgd.lr=0.001",
)
SLOWLY = (
    "import time; from functools import partial; import quadric.train.sequence as s\n"
    "from quadric.lattice.generate import Generator; from quadric.train.trainer import Trainer\n"
    "s.make_lattices = partial(s.make_lattices, shard_size=3)\n"
    "make, step = Generator.__call__, Trainer._step\n"
    "Generator.__call__ = lambda self, scores: time.sleep(0.1) or make(self, scores)\n"
    "Trainer._step = lambda self: time.sleep(0.5) or step(self)\n"
) + PROGRAM
"""So that there is time for a kill."""


@pytest.fixture(scope="module")
def sequenced(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The tiny job with a sequence training behind it, and its lines."""
    work = tmp_path_factory.mktemp("sequenced") / "digits"
    shutil.copytree(finished.work, work, symlinks=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Finished(work, run(job(*MPE_NGHF), work).lines)
    torch.set_num_threads(threads)


def copied(sequenced: Finished, exp: Path, *without: str) -> Path:
    """The working folder without some of what was done."""
    work = exp / "digits"
    shutil.copytree(sequenced.work, work, symlinks=True)
    for pattern in ("mpe_nghf", "job.json", "report.html", *without):  # the link before what it leads to
        for path in work.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return work


def test_a_training_by_a_criterion_is_told_as_the_others_are(sequenced: Finished, finished: Finished) -> None:
    work, lines = sequenced
    assert lines[:2] == finished.lines[:2]
    assert [re.fullmatch(r"%WER .* (\S+ \S+)", line)[1] for line in lines[2:]] == ["mpe_nghf dev", "mpe_nghf test"]  # type: ignore[index]
    page, summary = (work / "report.html").read_text(), json.loads((work / "job.json").read_text())
    assert summary["runs"] == ["adamw", "mpe_nghf"]
    sets = summary["sequence"]
    for split, utterances in (("train", 48), ("dev", 12)):
        made = Lattices(only(work, f"lattices-{split}-*") / "store")
        assert sets[f"{split}: utterances"] == utterances == len(made)
        assert sets[f"{split}: utterances left out"] == 0
        assert sets[f"{split}: arcs a frame of the lattices"] == round(made.arcs / made.frames, 1) > 1
    for name, value in sets.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    for line in lines[2:]:
        assert line.split()[1] in page
    assert (work / "mpe_nghf" / "system").is_dir() and "mpe_nghf" in page
    losses = [record["dev_loss"] for record in without_time(work, "mpe_nghf") if "dev_loss" in record]
    assert min(losses[1:]) < losses[0]


def test_it_starts_from_the_network_of_cross_entropy(
    sequenced: Finished, monkeypatch: pytest.MonkeyPatch, one_thread: object
) -> None:
    """And what is done is not done again; the criterion of that network is the first that is told."""
    starts: list[tuple[AcousticModel, Any, Any]] = []

    def fit(job: Any, name: str, method: Any, model: Any, loss: Any, sets: Any, *rest: Any, **options: Any) -> None:
        if isinstance(loss, MPE):
            starts.append((model, loss, sets))

    before = contents(sequenced.work)
    monkeypatch.setattr(pipeline, "fit", fit)
    assert run(job(*MPE_NGHF), sequenced.work).lines == sequenced.lines
    assert contents(sequenced.work) == before and starts == []
    ended = sequenced.work / "mpe_nghf" / "sets.json"
    facts = ended.read_text()
    ended.unlink()  # as of a run that was killed between its last update and its end
    assert run(job(*MPE_NGHF), sequenced.work).lines == sequenced.lines
    assert ended.read_text() == facts
    ((model, loss, sets),) = starts
    assert_equal(model.state_dict(), parameters(sequenced.work, "adamw"))
    system = System.load(sequenced.work / "adamw" / "system")
    assert loss.scale == 1 / system.lm_weight
    context = (model.left_context, model.right_context)
    held_out = FrameStream(sets.prepared.features["dev"], sets.dev, context=context, chunk=None)
    found = evaluate(model, loss, held_out)
    first = MetricsLog(sequenced.work / "mpe_nghf" / "metrics.jsonl").records()[0]
    assert first["update"] == 0
    assert found == {"loss": pytest.approx(first["dev_loss"]), "accuracy": pytest.approx(first["dev_accuracy"])}
    # The lattices of a network that is nearly right hold few errors.
    assert 0.5 < found["accuracy"] < 1.0


def test_another_criterion_takes_the_same_lattices(sequenced: Finished, tmp_path: Path, one_thread: object) -> None:
    work = copied(sequenced, tmp_path)
    shutil.rmtree(work / "cache" / "features")  # their names hold the places of the audio
    before = contents(work)
    result = run(job(*MMI_SGD, "sequence.competitors.missing=skip"), work)
    assert [line.split()[-2:] for line in result.lines[2:]] == [["mmi_sgd", "dev"], ["mmi_sgd", "test"]]
    after = contents(work)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0].rsplit("-", 1)[0] for name in after.keys() - before.keys()} == {"mmi_sgd"}
    records = without_time(work, "mmi_sgd")
    assert records[-1]["update"] == 48  # one an utterance
    assert records[-1]["dev_loss"] < records[0]["dev_loss"] and "dev_accuracy" not in records[0]
    again = run(job(*MPE_NGHF), work)
    assert again.lines == sequenced.lines
    assert contents(work) == after


def test_the_search_of_another_makes_lattices_of_its_own(
    sequenced: Finished, tmp_path: Path, one_thread: object
) -> None:
    work = copied(sequenced, tmp_path)
    before = {split: only(work, f"lattices-{split}-*") for split in ("train", "dev")}
    run(job(*MMI_SGD, "sequence.competitors.backend=kaldi"), work)
    for split, folder in before.items():
        (other,) = set(work.glob(f"lattices-{split}-*")) - {folder}
        assert json.loads((other / "store" / "key.json").read_text())["backend"] == "kaldi"
        own, made = Lattices(folder / "store"), Lattices(other / "store")
        assert list(own) == list(made) and made.arcs == pytest.approx(own.arcs, rel=0.05)
    shared = {path.name for name in ("competitors", "references") for path in work.glob(f"{name}-*")}
    assert len(shared) == 3 and all((sequenced.work / name).is_dir() for name in shared)
    assert without_time(work, "mmi_sgd")[-1]["update"] == 48


@pytest.mark.timeout(300)
def test_kill_while_lattices_are_made_and_in_training(sequenced: Finished, tmp_path: Path, one_thread: object) -> None:
    work = copied(sequenced, tmp_path, "competitors-*", "references-*", "lattices-*", "mpe_nghf-*")
    shards, states = "lattices-train-*/store/lattices-*.zip", "mpe_nghf-*/state/[0-9]*"
    for sign in ("lattices-train-*/store/lattices-000001.zip", states):
        assert not any(work.glob(states))
        process = start(tmp_path, *MPE_NGHF, program=("-c", SLOWLY))
        wait_for(lambda sign=sign: any(work.glob(sign)), process)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert (len(list(work.glob(shards))) < 16) == (sign != states)
    folder = only(work, "mpe_nghf-*")
    updates = [together.load(place / "state", Solo())["update"] for place in (folder, sequenced.work / "mpe_nghf")]
    assert updates[0] < updates[1] and not (work / "mpe_nghf").exists()
    shutil.rmtree(work / "cache" / "features")  # their names hold the places of the audio
    assert run(job(*MPE_NGHF), work).lines == sequenced.lines
    assert_equal(parameters(work, "mpe_nghf"), parameters(sequenced.work, "mpe_nghf"))
    found, expected = (
        [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in records]
        for records in (without_time(place, "mpe_nghf") for place in (work, sequenced.work))
    )
    assert found == expected


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_do_what_one_does(sequenced: Finished, tmp_path: Path) -> None:
    """Until rounding has grown."""
    work = copied(sequenced, tmp_path, "lattices-*", "mpe_nghf-*")
    process = start(tmp_path, *MPE_NGHF, program=RANKS)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert [line.split()[-2:] for line in printed.splitlines()[2:4]] == [["mpe_nghf", "dev"], ["mpe_nghf", "test"]]
    assert printed.splitlines()[-1] == f"report: {work}/report.html"
    assert errors.count("dev: targets: 100%") == 1
    found, expected = (
        [(r["epoch"], r["dev_loss"]) for r in without_time(place, "mpe_nghf") if "dev_loss" in r]
        for place in (work, sequenced.work)
    )
    assert len(found) == len(expected) > 3
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
