"""The workers of a parameter server as Ray actors, and the driver's part: it deals out units of data to them.

What was applied is known to the shards alone. Workers belong to the driver, which puts others in the place of those
that die; whatever dies, it asks the shards, and deals out what is missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quadric.parallel.actors import SILENT_SECONDS, got
from quadric.parallel.engine import RayError, ray
from quadric.parallel.exchange import Verdict
from quadric.parallel.ledger import Ledger
from quadric.parallel.parameter_server import ParameterServer
from quadric.parallel.worker import Report
from quadric.parallel.worker_actor import Done, Work, WorkerActor

SAVE_SECONDS = 30.0
"""Between two checkpoints of the shards: what was pushed since the last is lost where a shard dies, and done again."""
LEASE_SECONDS = 1.0
"""What a worker is given at a time takes about as long."""
OVERDUE_SECONDS, OVERDUE_LEASES = 5.0, 3.0
"""What a worker has not done for as long, and as many of the longest leases, others do as well when they are idle."""
ROOM_SECONDS = 15.0
"""A person is told of workers that have not begun by then."""
HOPELESS = 5
"""As many processes of one worker may die in a row without having settled one unit."""


@dataclass
class Hand:
    """A worker as its driver knows it; without a ``pid`` it has not begun."""

    actor: Any
    pid: int | None = None
    dropped: bool = False
    lease: int = 1
    deaths: int = 0
    heard: float = 0.0
    buffers: list[Tensor] = field(default_factory=list)
    pending: dict[Any, list[int]] = field(default_factory=dict)


class Tick(NamedTuple):
    """What has happened since the last: reports of units, and sentences for a person."""

    reports: list[Report]
    news: list[str]


class Crew:
    """Workers, and what they are given to do until all units are settled.

    Args:
        server: of the parameters.
        work: what a worker needs.
        workers: how many. Those for which the cluster has no room yet join when it has.
        alone: units that the first worker does before the others begin (a warm start).
        cpus, gpus: of the cluster that a worker takes.
    """

    def __init__(
        self,
        server: ParameterServer,
        work: Work,
        workers: int,
        *,
        alone: int = 0,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: give one at least")
        self._server, self._alone, self._takes = server, alone, {"num_cpus": cpus, "num_gpus": gpus}
        self._warming: Hand | None = None
        self._buffers = [buffer.detach().cpu().clone() for buffer in work.model.buffers()]
        self._work = ray.put(work)
        self.hands = {number: self._hire(number) for number in range(workers)}  # they start while the shards do
        counts = server.counts()
        # Later than all that a driver before has started, also those whose pushes are still on their way.
        self._incarnation = max(1 + max(count["incarnation"] for count in counts), int(time.time()))
        self._lives = [count["life"] for count in counts]
        self.ledger = Ledger(torch.stack(server.applied()).all(0))
        self._saved = time.monotonic()
        self._saving: list[Any] = []
        self._longest = 0.0
        self._heard = self._told_of_silence = self._hired = time.monotonic()
        self._told_of_room = False
        self.lost = 0
        for hand in self.hands.values():
            self._begin(hand)

    def run(self) -> Iterator[Tick]:
        """Works until every shard has applied every unit; a tick at least every half second.

        Raises:
            ValueError: what a worker computes on is faulty.
            RuntimeError: workers fail, die without having done anything, or all were dropped.
        """
        while True:
            news: list[str] = []
            if not self.ledger.left:  # a shard that dies after that comes back with everything
                self._server.save()
                news += self._swept(range(len(self._lives)))
            if not self.ledger.left:
                yield Tick([], news)
                return
            self._deal()
            reports = self._collect(news)
            if reports:
                self._heard = self._told_of_silence = time.monotonic()
            elif time.monotonic() - self._told_of_silence > SILENT_SECONDS:
                news.append(f"no worker has reported for {SILENT_SECONDS:.0f} s, they or the shards may be stopped")
                self._told_of_silence = time.monotonic()
            news += self._absent()
            news += self._save()
            since = time.monotonic()
            yield Tick(reports, news)
            away = time.monotonic() - since  # nobody was listening
            self._heard, self._told_of_silence = self._heard + away, self._told_of_silence + away

    def buffers(self) -> list[Tensor]:
        """The mean of the running statistics of the models of the workers that have told theirs lately.

        Counts are the first's. Where no worker has told any they are those of the model that all began with.
        """
        newest = max(hand.heard for hand in self.hands.values())
        lately = [hand for hand in self.hands.values() if hand.heard and newest - hand.heard <= self._overdue]
        known = [hand.buffers for hand in lately] or [self._buffers]
        self._buffers = [
            torch.stack(each).mean(0) if each[0].is_floating_point() else each[0] for each in zip(*known, strict=True)
        ]
        return self._buffers

    def _absent(self) -> list[str]:
        """Says once which workers have not begun for long."""
        absent = [number for number, hand in self.hands.items() if hand.pid is None]
        if self._told_of_room or not absent or time.monotonic() - self._hired < ROOM_SECONDS:
            return []
        self._told_of_room = True
        there = ray.cluster_resources()
        takes = " and ".join(
            f"{self._takes[name]:g} of {there.get(kind, 0):g} {kind}s"
            for name, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU"))
            if self._takes[name]
        )
        rest = f": each takes {takes} of the cluster; they join when there is room" if takes else ""
        return [f"workers {absent} have not begun after {ROOM_SECONDS:.0f} s{rest}"]

    def end(self) -> None:
        """Ends the workers."""
        for hand in self.hands.values():
            ray.kill(hand.actor, no_restart=True)

    def _hire(self, number: int) -> Hand:
        given = (self._server.shards, self._server.sizes, number)
        actor = WorkerActor.options(**self._takes).remote(self._work, *given)  # type: ignore[attr-defined]
        return Hand(actor)

    def _begin(self, hand: Hand) -> None:
        hand.pending[hand.actor.begin.remote(self._incarnation, self.buffers())] = []
        self._incarnation += 1

    def deal_ahead(self, seconds: float) -> None:
        """Gives the workers what they can do while nobody deals for so long; shards save if that is due meanwhile."""
        if time.monotonic() + seconds - self._saved > SAVE_SECONDS:
            self._begin_to_save()
        self._deal(leases=2 + math.ceil(seconds / LEASE_SECONDS))

    def _deal(self, *, leases: int = 2) -> None:
        """Gives each worker what it does and what it does next."""
        now, overdue = time.monotonic(), self._overdue
        warm = int(self.ledger.settled[: self._alone].sum()) < min(self._alone, len(self.ledger.settled))
        for number, hand in self.hands.items():
            if hand.dropped or hand.pid is None or (warm and hand is not self._first(hand, now, overdue)):
                continue
            while len(hand.pending) < leases:
                count = min(hand.lease, max(1, self.ledger.left // (4 * len(self.hands))))
                if warm:
                    count = 1
                units = self.ledger.take(number, count, now=now, overdue=overdue)
                if not units:
                    break
                hand.pending[hand.actor.do.remote(units)] = units

    @property
    def _overdue(self) -> float:
        """The seconds after which a lease is overdue; before the first has ended nobody knows how long they take."""
        return max(OVERDUE_SECONDS, OVERDUE_LEASES * self._longest) if self._longest else SILENT_SECONDS

    def _first(self, ready: Hand, now: float, overdue: float) -> Hand | None:
        """Who works alone: the worker that was the first to be there, while it lives and reports.

        What it has not done is for the next that has nothing to do, as those that have been the first before and hang
        have not.
        """
        first = self._warming
        there = first is not None and first in self.hands.values() and not first.dropped
        if not ready.pending and (not there or (ready is not first and now - self._heard > overdue)):
            for number, hand in self.hands.items():
                if hand is first:
                    self.ledger.release(number)
            self._warming, self._heard = ready, now
            return ready
        return first

    def _collect(self, news: list[str]) -> list[Report]:
        """Waits for the next leases that end."""
        owner = {ref: number for number, hand in self.hands.items() for ref in hand.pending}
        if not owner:
            raise RuntimeError("all workers were dropped: their gradients were not finite; lower the learning rate")
        ready, _ = ray.wait(list(owner), num_returns=1, timeout=0.5)
        more, _ = ray.wait(list(owner), num_returns=len(owner), timeout=0)
        reports: list[Report] = []
        for ref in dict.fromkeys([*ready, *more]):
            number = owner[ref]
            hand = self.hands[number]
            if ref not in hand.pending:
                continue  # of a worker that has died meanwhile
            try:
                done = got(ref)
            except RayError as error:
                self._bury(number, news, error)
                continue
            units = hand.pending.pop(ref)
            if isinstance(done, int):
                hand.pid = done
                news.append(f"worker {number} is there")
            else:
                reports += self._take(number, units, done, news)
        return reports

    def _take(self, number: int, units: list[int], done: Done, news: list[str]) -> list[Report]:
        """The reports of a lease, after what they say was acted upon."""
        hand = self.hands[number]
        hand.buffers, hand.deaths, hand.heard = done.buffers, 0, time.monotonic()
        self._longest = max(done.seconds, 0.9 * self._longest)
        hand.lease = max(1, min(256, int(len(units) * LEASE_SECONDS / max(done.seconds, 1e-3)), 2 * len(units)))
        self.ledger.settle(report.unit for report in done.reports if report.settled)
        self.ledger.give_back(number, [report.unit for report in done.reports if not report.settled])
        lives = [max(report.lives[k] for report in done.reports) for k in range(len(self._lives))]
        risen = [k for k, (new, old) in enumerate(zip(lives, self._lives, strict=True)) if new > old]
        news += self._swept(risen)
        if any(Verdict.DROPPED.name in report.verdicts for report in done.reports):
            hand.dropped = True
            back = self.ledger.release(number)
            ray.kill(hand.actor, no_restart=True)
            hand.pending.clear()
            news.append(f"worker {number} was dropped: {Verdict.DROPPED}; {len(back)} of its units go to others")
        return done.reports

    def _bury(self, number: int, news: list[str], error: Exception) -> None:
        old = self.hands[number]
        with suppress(RayError):
            ray.kill(old.actor, no_restart=True)  # if it cannot be reached it may live
        back = self.ledger.release(number)
        if old.deaths + 1 >= HOPELESS:
            raise RuntimeError(f"worker {number} died {HOPELESS} times without having done anything: {error}")
        self.hands[number] = self._hire(number)
        self.hands[number].deaths = old.deaths + 1
        self._begin(self.hands[number])
        news.append(f"worker {number} died: another takes its place, {len(back)} of its units wait again")

    def _swept(self, shards: Sequence[int] | range) -> list[str]:
        """Asks shards what they have applied: units that they lack are dealt out again."""
        if not shards:
            return []
        applied, counts = self._server.applied(), self._server.counts()
        news, settled = [], self.ledger.settled.clone()
        for k in shards:
            self.ledger.lack(applied[k])
            life, lost = counts[k]["life"], int((settled & ~applied[k]).sum())
            if life > self._lives[k] or lost:
                news.append(f"shard {k} was started again: {lost} pushes were lost, and are done again")
            self._lives[k] = life
            self.lost += lost
        return news

    def _save(self) -> list[str]:
        """Has the shards write checkpoints when it is time; what went wrong with the last."""
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return []
        ready, _ = ray.wait(self._saving, num_returns=len(self._saving), timeout=0) if self._saving else ([], [])
        if len(ready) < len(self._saving):
            return []
        news, shards = [], len(self._server.shards)
        for number, saved in enumerate(self._saving):
            try:
                got(saved)
            except (RuntimeError, ValueError, RayError) as error:
                news.append(f"shard {number % shards} cannot write its checkpoint, and will try again: {error}")
        self._saving = []
        self._begin_to_save()
        return news

    def _begin_to_save(self) -> None:
        self._saving += [shard.save.remote() for shard in self._server.shards]
        self._saved = time.monotonic()
