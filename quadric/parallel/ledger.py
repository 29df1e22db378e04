"""Who works on which units of data: leases that end when the units are settled, or with their worker."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush

from torch import Tensor


class Ledger:
    """Deals out units, the lowest first, so that each is settled in the end, whatever happens to workers.

    A unit waits as long as it is neither settled nor held by a worker. One that is worked on twice is still applied
    once: shards refuse the second. So what a worker that has fallen silent holds may be dealt out again, and nobody
    waits for it.

    Args:
        settled: [units], those that are done already.

    >>> import torch
    >>> ledger = Ledger(torch.zeros(3, dtype=torch.bool))
    >>> ledger.take(0, 2, now=0.0, overdue=5.0), ledger.take(1, 2, now=0.0, overdue=5.0)
    ([0, 1], [2])
    >>> ledger.settle([0])
    >>> ledger.release(0), ledger.take(1, 2, now=1.0, overdue=5.0)
    ([1], [1])
    """

    def __init__(self, settled: Tensor) -> None:
        self.settled = settled.clone()
        # A heap of all that wait; what else is in it is passed over.
        self._queue: list[int] = (~self.settled).nonzero().flatten().tolist()
        self._held: dict[int, dict[int, float]] = {}

    @property
    def left(self) -> int:
        """Units that are not settled."""
        return int((~self.settled).sum())

    def take(self, worker: int, count: int, *, now: float, overdue: float) -> list[int]:
        """At most ``count`` units for a worker; none are left when there are none.

        Where no unit waits, those that another worker has held for more than ``overdue`` seconds.
        """
        taken: list[int] = []
        own = self._held.setdefault(worker, {})
        while self._queue and len(taken) < count:
            unit = heappop(self._queue)
            if self._waits(unit):
                taken.append(unit)
                own[unit] = now
        if not taken:
            held = [each for units in self._held.values() for each in units.items()]
            late = sorted({unit for unit, since in held if now - since > overdue} - own.keys())
            taken = late[:count]
            for units in self._held.values():  # one more worker at a time
                units.update((unit, now) for unit in taken if unit in units)
            own.update((unit, now) for unit in taken)
        return taken

    def settle(self, units: Iterable[int]) -> None:
        """These are done."""
        for unit in units:
            self.settled[unit] = True
            for held in self._held.values():
                held.pop(unit, None)

    def release(self, worker: int) -> list[int]:
        """The worker is gone: what it alone held waits again. Returns those units."""
        return self._queued(self._held.pop(worker, {}))

    def give_back(self, worker: int, units: Iterable[int]) -> None:
        """The worker has not settled these after all."""
        held = self._held.get(worker, {})
        self._queued([unit for unit in units if held.pop(unit, None) is not None])

    def lack(self, applied: Tensor) -> list[int]:
        """Units that count as settled and are not among ``applied``, those of one shard: they wait again."""
        lost = (self.settled & ~applied).nonzero().flatten().tolist()
        self.settled[lost] = False
        return self._queued(lost)

    def _waits(self, unit: int) -> bool:
        return not self.settled[unit] and not any(unit in held for held in self._held.values())

    def _queued(self, units: Iterable[int]) -> list[int]:
        """Those that wait, in the queue."""
        waiting = [unit for unit in units if self._waits(unit)]
        for unit in waiting:
            heappush(self._queue, unit)
        return waiting
