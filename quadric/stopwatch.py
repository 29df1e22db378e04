"""Where the time of a step goes, by a clock that is handed in: the library itself reads none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]
"""Seconds since some moment, such as ``time.perf_counter``."""


class Stopwatch:
    """Adds up seconds by kind of work. Work inside other work counts for its own kind alone.

    Args:
        clock: what is read where work begins and ends; None: nothing is measured.

    Attributes:
        seconds: kind of work -> seconds so far.

    >>> readings = iter([0.0, 1.0, 4.0, 6.0])
    >>> watch = Stopwatch(lambda: next(readings))
    >>> with watch.on("a product"):
    ...     with watch.on("its sum"):
    ...         pass
    >>> watch.seconds
    {'a product': 3.0, 'its sum': 3.0}
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def on(self, work: str) -> Iterator[None]:
        """Counts what happens inside as ``work``."""
        if self.clock is None:
            yield
            return
        self._turn(self.clock())
        self._open.append(work)
        try:
            yield
        finally:
            self._turn(self.clock())
            self._open.pop()

    def _turn(self, now: float) -> None:
        """The time since the last turn was that of the innermost open work."""
        if self._open:
            work = self._open[-1]
            self.seconds[work] = self.seconds.get(work, 0.0) + now - self._since
        self._since = now
