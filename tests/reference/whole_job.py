"""The tiny job as a process of its own, and what is in the folder that it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from quadric.recipes import digits
from quadric.speech.corpus import Corpus, read_data_dir
from quadric.train import checkpoint
from quadric.train.metrics import MetricsLog
from quadric.train.overrides import override
from quadric.train.recipe import Job
from reference.tiny_job import CLEAN_DIGITS, TINY

OPTIONS = (*TINY, *CLEAN_DIGITS)

# Checkpoints often, so that a kill comes behind one.
PROGRAM = (
    "import sys, quadric.train.trainer as t; t.CHECKPOINT_SECONDS = 0.2\n"
    "from quadric.cli import main\n"
    "if __name__ == '__main__': sys.exit(main())"
)

RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "quadric")


class Finished(NamedTuple):
    """A job that ran through in a process of its own, and what it printed."""

    work: Path
    lines: tuple[str, ...]


def job(*more: str) -> Job:
    return override(digits(48), [*OPTIONS, *more])


def command(*arguments: object, program: tuple[str, ...] = ("-m", "quadric")) -> subprocess.Popen[str]:
    """``quadric`` in a session of its own, whose signals reach its children as Ctrl-C does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    line = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start(exp: Path, *more: str, program: tuple[str, ...] = ("-m", "quadric")) -> subprocess.Popen[str]:
    """``quadric train digits``, the tiny job."""
    return command("train", "digits", "--work", exp, *OPTIONS, *more, program=program)


def finish(exp: Path, *more: str, program: tuple[str, ...] = ("-m", "quadric")) -> Finished:
    process = start(exp, *more, program=program)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return Finished(exp / "digits", tuple(line for line in printed.splitlines() if line.startswith("%WER")))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before what was waited for"
        time.sleep(0.01)


def only(work: Path, pattern: str) -> Path:
    (found,) = work.glob(pattern)
    return found


def corpus(work: Path, split: str) -> Corpus:
    return read_data_dir(only(work, "cache/digits-*") / split)


def contents(work: Path) -> dict[str, tuple[int, int]]:
    """Of every file of every stage, when it was written and how long it is."""
    files = (path for path in work.rglob("*") if path.is_file() and "-" in path.relative_to(work).parts[0])
    return {str(path.relative_to(work)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def parameters(work: Path, method: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(work / method / "model.pt")["model"]


def assert_equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def without_time(work: Path, method: str) -> list[dict]:
    records = MetricsLog(work / method / "metrics.jsonl").records()
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
