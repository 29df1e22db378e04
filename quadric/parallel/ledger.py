"""Who works on which units of data: leases that end when the units are settled, or with their worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import Tensor


class Ledger:
    """Deals out units, in order, so that each is settled in the end, whatever happens to workers.

    A unit that is worked on twice is still applied once: shards refuse the second. So what a worker that has fallen
    silent holds may be dealt out again, and nobody waits for it.

    Args:
        settled: [units], those that are done already.
    """

    def __init__(self, settled: Tensor) -> None:
        self.settled = settled.clone()
        self._waiting = deque((~self.settled).nonzero().flatten().tolist())
        self._held: dict[int, dict[int, float]] = {}

    @property
    def left(self) -> int:
        """Units that are not settled."""
        return int((~self.settled).sum())

    def take(self, worker: int, count: int, *, now: float, overdue: float) -> list[int]:
        """At most ``count`` units for a worker; none are left when there are none.

        Where no unit waits, those that another worker has held for more than ``overdue`` seconds.
        """
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        own = self._held.setdefault(worker, {})
        if not taken:
            others = (held for other, held in self._held.items() if other != worker)
            late = sorted({u for held in others for u, since in held.items() if now - since > overdue} - own.keys())
            taken = late[:count]
            for held in self._held.values():  # one more worker at a time
                held.update((u, now) for u in taken if u in held)
        own.update((unit, now) for unit in taken)
        return taken

    def settle(self, units: Iterable[int]) -> None:
        """These are done."""
        for unit in units:
            self.settled[unit] = True
            for held in self._held.values():
                held.pop(unit, None)

    def release(self, worker: int) -> list[int]:
        """The worker is gone: what it alone held waits again, before all else. Returns those units."""
        held = self._held.pop(worker, {})
        elsewhere = {unit for other in self._held.values() for unit in other}
        back = [unit for unit in held if unit not in elsewhere]
        self._waiting.extendleft(reversed(back))
        return back

    def give_back(self, worker: int, units: Iterable[int]) -> None:
        """The worker has not settled these after all."""
        held = self._held.get(worker, {})
        for unit in units:
            if unit in held and not any(unit in other for w, other in self._held.items() if w != worker):
                self._waiting.appendleft(unit)
            held.pop(unit, None)

    def lack(self, applied: Tensor) -> list[int]:
        """Units that count as settled and are not among ``applied``, those of one shard: they wait again."""
        lost = (self.settled & ~applied).nonzero().flatten().tolist()
        self.settled[lost] = False
        self._waiting.extendleft(reversed(lost))
        return lost
