from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("kaldifst", reason="needs the speech extra")

from quadric.speech.workers import in_order, worker_pool

pytestmark = pytest.mark.speech

SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path

import numpy as np

from quadric.speech.alignment import Aligner
from quadric.speech.decoding import Decoder
from quadric.speech.graph import AlignmentGraphs, write_graph
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import monophone

if __name__ == "__main__":
    lexicon = Lexicon((("A", ("a",)),))
    tying = monophone(lexicon.phones)
    write_graph(AlignmentGraphs(lexicon, tying).graph(("A",)), Path("graph.fst"))
    scores = {f"u{k}": np.zeros((9, tying.num_pdfs), np.float32) for k in range(4)}
    with (
        Aligner({id: ("A",) for id in scores}, lexicon, tying, jobs=2) as aligner,
        Decoder(Path("graph.fst"), lexicon.words, tying.num_pdfs, jobs=2) as decoder,
    ):
        assert len(aligner(scores.items()).pdfs) == len(decoder.decode(scores, 1.0)) == 4
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path: Path, alive: Callable[..., set[int]], number: int) -> None:
    (tmp_path / "work.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "work.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        children = [int(child) for child in process.stdout.readline().split()]
        assert len(children) >= 3  # a decoder starts its processes as it needs them
        assert alive(children) == set(children)
        process.send_signal(number)
        process.wait()
    assert not alive(children, patience=10.0)


def test_results_come_in_order_and_tasks_are_drawn_as_needed() -> None:
    drawn: list[Future[int]] = []

    def futures() -> Iterator[Future[int]]:
        for number in range(100):
            drawn.append(Future())
            drawn[-1].set_result(number)
            yield drawn[-1]
        drawn.append(Future())
        yield drawn[-1]

    results = in_order(futures(), 2, "a")
    assert [next(results) for _ in range(60)] == list(range(60))
    assert len(drawn) == 60 + 2 * 8
    for _ in range(40):
        next(results)
    drawn[-1].set_result(-1)
    assert list(results) == [-1]


def test_what_has_not_begun_is_cancelled() -> None:
    waiting: list[Future[int]] = [Future() for _ in range(5)]
    waiting[0].set_result(0)
    waiting[1].set_exception(KeyError("broken"))
    results = in_order(waiting, 1, "a")
    assert next(results) == 0
    with pytest.raises(KeyError):
        next(results)
    assert all(future.cancelled() for future in waiting[2:])


def test_a_process_that_dies_is_explained() -> None:
    with worker_pool(1) as pool, pytest.raises(RuntimeError, match=r"a counting process died .* fewer jobs than 1"):
        list(in_order((pool.submit(os._exit, code) for code in (3, 3)), 1, "a counting"))


def test_every_process_starts_with_what_it_is_given() -> None:
    with worker_pool(1, os.chdir, "/") as pool:
        assert pool.submit(os.getcwd).result() == "/"
