"""What a person sees while a job runs: bars, warnings, and a log file with everything."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from quadric.files import writing_to
from quadric.train.stages import Held

T = TypeVar("T")


def bar(items: Iterable[T], *, total: int | None, what: str) -> Iterable[T]:
    """A progress bar on a terminal; on a pipe or in a file, a line every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        desc=what,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
        ascii=not terminal,
        leave=True,
    )


class _Lines(io.TextIOBase):
    """Standard error where a bar is not drawn over itself: each of its states is a line."""

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return sys.stderr.write(f"{line}\n") if line else 0

    def flush(self) -> None:
        sys.stderr.flush()


class _BesideBars(logging.Handler):
    """Log lines above the bar that is being drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """A log file. Where it can no longer be written, that is said once, and the work goes on."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            tqdm.write(f"cannot write to the log {self.baseFilename}: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """While inside: everything to ``file``, what a person should know to the terminal.

    Where an exception leaves, ``file`` tells where it was raised; not where the log is that of another job at work.

    Raises:
        OSError: ``file`` cannot be written; the message names the remedy.
    """
    root = logging.getLogger("quadric")
    with writing_to(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        written = _File(file, encoding="utf-8")
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = _BesideBars(logging.INFO)
    shown.setFormatter(logging.Formatter("%(message)s"))
    level = root.level
    root.setLevel(logging.DEBUG)
    for handler in (written, shown):
        root.addHandler(handler)
    try:
        yield
    except Held:
        raise
    except Exception:
        root.debug("an exception ends the work", exc_info=True)
        raise
    finally:
        for handler in (written, shown):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
