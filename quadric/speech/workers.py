"""Processes that work for this one: started afresh, deaf to Ctrl-C, and never left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

T = TypeVar("T")

_AHEAD = 8  # tasks a process has waiting


def worker_pool(jobs: int, start: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """``jobs`` processes, each of which calls ``start(*arguments)`` first.

    They are started afresh and import the caller's main module, which therefore needs
    ``if __name__ == "__main__":``. Ctrl-C is left to this process, and they end when it is gone, killed or not.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(start, arguments))


def in_order(futures: Iterable[Future[T]], jobs: int, what: str) -> Iterator[T]:
    """The results of ``futures`` in their order; no more of these are drawn than keep ``jobs`` processes busy.

    What has not begun when the caller stops is cancelled.

    Raises:
        RuntimeError: a process died; the message says which kind, ``what``, and the remedy.
    """
    under_way: deque[Future[T]] = deque()
    try:
        for future in futures:
            under_way.append(future)
            if len(under_way) > _AHEAD * jobs:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f'{what} process died (out of memory, killed, or a script without if __name__ == "__main__":): run again, '
            f"with fewer jobs than {jobs} if memory is short"
        ) from error
    finally:
        for future in under_way:
            future.cancel()


def _begin(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
