"""Several ranks as processes of this machine, and the jobs that the tests of `comm` give them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadric.comm.collective import Collective
from quadric.comm.communicator import Communicator

TIMEOUT = 30.0
"""Of their collectives: a busy machine may keep a rank waiting."""
PATIENCE = 2.0
"""The same, where a test waits for it to pass."""


# Not the jobs themselves: before Python 3.13 the server does not look in ``tests``, and says nothing of it.
PRELOADED = ["quadric.comm.checkpoint", "quadric.optim.second_order", "quadric.train.trainer"]


class Killed:
    """What a rank leaves that was killed."""


def run(
    folder: Path, size: int, job: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **options: Any
) -> list[Any]:
    """Calls ``job(communicator, *args, **options)`` on each of ``size`` ranks: what each returned, raised, or `Killed`.

    The processes are forks of a server that has imported quadric, so that starting them takes no time; ``job``
    must be found by its name in a module under ``tests``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    meeting = f"file://{folder / f'meeting-{time.monotonic_ns()}'}"
    ends = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(end, rank, size, meeting, timeout, job, args, options), daemon=True)
        for rank, (_, end) in enumerate(ends)
    ]
    for process, (_, end) in zip(processes, ends, strict=True):
        process.start()
        end.close()
    until = time.monotonic() + 4 * TIMEOUT
    try:
        return [_result(process, end, until) for process, (end, _) in zip(processes, ends, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    end: Connection,
    rank: int,
    size: int,
    meeting: str,
    timeout: float,
    job: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        with Collective(rank, size, meeting, timeout=timeout) as communicator:
            result = job(communicator, *args, **options)
    except Exception as error:
        result = error.with_traceback(None)
    end.send_bytes(pickle.dumps(result))  # not send, which shares memory with a process that is about to end


def _result(process: Any, end: Connection, until: float) -> Any:
    if not end.poll(max(0.0, until - time.monotonic())):
        raise TimeoutError(f"{process.name} is still at work")
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{process.name} ended with {process.exitcode}"
        return Killed


def die() -> None:
    """Ends this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def numbers(rank: int, n: int) -> tuple[Tensor, Tensor]:
    """What a rank gives to a sum: n float32 numbers and one float64 number."""
    generator = torch.Generator().manual_seed(1000 * n + rank)
    vector = torch.randn(n, generator=generator)
    return vector, torch.randn((), dtype=torch.float64, generator=generator)


def sums(communicator: Communicator, sizes: list[int]) -> tuple[list[tuple[bytes, float]], int]:
    results = []
    for n in sizes:
        vector, number = numbers(communicator.rank, n)
        communicator.sum_(vector, number)
        results.append((vector.numpy().tobytes(), float(number)))
    return results, communicator.bytes_sent


def broadcasts(communicator: Communicator) -> tuple[list[list[float]], int]:
    tensor = torch.full((2, 2), float(communicator.rank))
    if communicator.rank == 2:
        tensor = torch.tensor([[0.0, 1.0], [10.0, 11.0]]).T  # not contiguous
    communicator.broadcast_(tensor, source=2)
    return tensor.tolist(), communicator.bytes_sent


def agrees(communicator: Communicator, values: list[Any]) -> None:
    communicator.agree("it", values[communicator.rank])


def dies_while_summing(communicator: Communicator) -> tuple[str, str, bool, float]:
    before = torch.full((4_000_000,), communicator.rank + 1.0)
    tensor, start = before.clone(), time.monotonic()
    if communicator.rank == 1:
        threading.Timer(0.2, die).start()
    try:
        while True:
            tensor.copy_(before)
            start = time.monotonic()
            communicator.sum_(tensor)
    except RuntimeError as error:
        seconds = time.monotonic() - start
        try:
            communicator.broadcast_(tensor)
        except RuntimeError as second:
            return str(error), str(second), torch.equal(tensor, before), seconds
        raise


def falls_silent(communicator: Communicator) -> tuple[str, float, float] | None:
    number = torch.tensor(communicator.rank + 1.0)
    if communicator.rank == 1:
        time.sleep(PATIENCE + 1)
        return None
    start = time.monotonic()
    try:
        communicator.sum_(number)
    except RuntimeError as error:
        return str(error), float(number), time.monotonic() - start
    raise AssertionError("the sum of a silent rank came to an end")


def says(communicator: Communicator, texts: list[str]) -> list[str]:
    return communicator.gather("it", texts[communicator.rank])


def waits_for_first(communicator: Communicator, folder: Path, how: str) -> tuple[list[str], str, float, float]:
    """Rank 0 works for longer than a collective may take, and then writes a file, raises or dies.

    What the rank sees of the folder after that, what it is told, how long it waited, and a sum.
    """

    def work() -> None:
        time.sleep(PATIENCE + 1)
        if how == "dies":
            die()
        if how == "fails":
            raise ValueError("the disk is on fire")
        (folder / str(communicator.rank)).touch()

    said, start, total = "", time.monotonic(), torch.ones(1)
    try:
        communicator.first("the work", work)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    if how != "dies":
        communicator.sum_(total)
    return [path.name for path in folder.iterdir()], said, seconds, float(total)


def follows_the_first(communicator: Communicator, folder: Path) -> tuple[list[str], float]:
    """Rank 2 takes longer than a collective may. What the rank finds, and how long all took."""

    def work() -> list[str]:
        found = [path.name for path in folder.iterdir()]
        if communicator.rank == 0:
            (folder / "0").touch()
        if communicator.rank == 2:
            time.sleep(PATIENCE + 1)
        return found

    start = time.monotonic()
    return communicator.first_then_all("the work", work), time.monotonic() - start
