"""The workers of a parameter server as Ray actors, and the driver's part: it deals out units of data to them.

What was applied is known to the shards alone. Workers belong to the driver, which puts others in the place of those
that die; whatever dies, it asks the shards, and deals out what is missing.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quadric.comm.compression import Compressor
from quadric.loss.loss import Loss
from quadric.parallel.engine import RayError, ray
from quadric.parallel.exchange import Verdict
from quadric.parallel.ledger import Ledger
from quadric.parallel.parameter_server import ActorLink, ParameterServer, got
from quadric.parallel.units import Units
from quadric.parallel.worker import Gradients, Report, Strategy, Worker
from quadric.space import ParameterSpace

SAVE_SECONDS = 30.0
"""Between two checkpoints of the shards: what was pushed since the last is lost where a shard dies, and done again."""
LEASE_SECONDS = 1.0
"""What a worker is given at a time takes about as long."""
OVERDUE_SECONDS, OVERDUE_LEASES = 5.0, 3.0
"""What a worker has not done for as long, and as many of the longest leases, others do as well when they are idle."""
SILENT_SECONDS = 60.0
"""Without any report for as long, a person is told."""
HOPELESS = 5
"""As many processes of one worker may die in a row without having settled one unit."""


@dataclass(frozen=True)
class Work:
    """What every worker needs.

    Attributes:
        model, loss, units, strategy, clip, autocast, seed: as in `Worker`.
        compressor: makes that of a shard, from the shapes of its parameters.
    """

    model: nn.Module
    loss: Loss
    units: Units
    strategy: Strategy = field(default_factory=Gradients)
    clip: float | None = None
    compressor: Callable[[Sequence[torch.Size]], Compressor] | None = None
    autocast: torch.dtype | None = None
    seed: int = 0


class Done(NamedTuple):
    """Of a lease: a report of each unit, and the running statistics of the worker's model."""

    reports: list[Report]
    buffers: list[Tensor]
    seconds: float


@ray.remote
class _WorkerActor:
    """A `Worker` in a process of its own."""

    def __init__(self, work: Work, shards: Sequence[Any], sizes: Sequence[int], number: int, incarnation: int) -> None:
        torch.set_num_threads(1)
        compressors = None
        if work.compressor is not None:
            compressors = [work.compressor(shapes) for shapes in _shapes(work.model, sizes)]
        self._worker = Worker(
            copy.deepcopy(work.model),
            work.loss,
            work.units,
            ActorLink(shards),
            sizes,
            strategy=copy.deepcopy(work.strategy),
            number=number,
            incarnation=incarnation,
            clip=work.clip,
            compressors=compressors,
            autocast=work.autocast,
            seed=work.seed,
        )

    def ready(self) -> int:
        return os.getpid()

    def do(self, units: Sequence[int]) -> Done:
        start = time.monotonic()
        reports = [self._worker.do(unit) for unit in units]
        return Done(reports, [b.clone() for b in self._worker.model.buffers()], time.monotonic() - start)


def _shapes(model: nn.Module, sizes: Sequence[int]) -> list[list[torch.Size]]:
    """Of each shard, those of its parameters."""
    left = [p.shape for p in ParameterSpace(model).parameters]
    found: list[list[torch.Size]] = []
    for size in sizes:
        found.append([])
        while sum(map(math.prod, found[-1])) < size:
            found[-1].append(left.pop(0))
    return found


@dataclass
class Hand:
    """A worker as its driver knows it; without a ``pid`` it has not begun."""

    actor: Any
    incarnation: int
    pid: int | None = None
    dropped: bool = False
    lease: int = 1
    deaths: int = 0
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
        cpus: of the cluster that a worker takes.
    """

    def __init__(self, server: ParameterServer, work: Work, workers: int, *, alone: int = 0, cpus: float = 1.0) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: give one at least")
        self._server, self._alone, self._cpus = server, alone, cpus
        self._warming: Hand | None = None
        self._work = ray.put(work)
        counts = server.counts()
        # Later than all that a driver before has started, also those whose pushes are still on their way.
        self._incarnation = max(1 + max(count["incarnation"] for count in counts), int(time.time()))
        self._lives = [count["life"] for count in counts]
        self.ledger = Ledger(torch.stack(server.applied()).all(0))
        self._saved = time.monotonic()
        self._saving: list[Any] = []
        self._longest = 0.0
        self._heard = time.monotonic()
        self.lost = 0
        self.hands = {number: self._hire(number) for number in range(workers)}

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
                self._heard = time.monotonic()
            elif time.monotonic() - self._heard > SILENT_SECONDS:
                absent = [number for number, hand in self.hands.items() if hand.pid is None]
                rest = f"; the cluster has no room yet for workers {absent}" if absent else ""
                news.append(
                    f"no worker has reported for {SILENT_SECONDS:.0f} s, they or the shards may be stopped{rest}"
                )
                self._heard = time.monotonic()
            news += self._save()
            yield Tick(reports, news)

    def buffers(self) -> list[Tensor]:
        """The mean of the running statistics of the workers' models, as they last told; counts are the first's."""
        known = [hand.buffers for hand in self.hands.values() if hand.buffers]
        return [
            torch.stack(each).mean(0) if each[0].is_floating_point() else each[0] for each in zip(*known, strict=True)
        ]

    def end(self) -> None:
        """Ends the workers."""
        for hand in self.hands.values():
            ray.kill(hand.actor, no_restart=True)

    def _hire(self, number: int) -> Hand:
        given = (self._server.shards, self._server.sizes, number, self._incarnation)
        actor = _WorkerActor.options(num_cpus=self._cpus).remote(self._work, *given)  # type: ignore[attr-defined]
        hand = Hand(actor, self._incarnation)
        hand.pending[actor.ready.remote()] = []
        self._incarnation += 1
        return hand

    def _deal(self) -> None:
        """Gives each worker what it does and what it does next."""
        now, overdue = time.monotonic(), max(OVERDUE_SECONDS, OVERDUE_LEASES * self._longest)
        warm = int(self.ledger.settled[: self._alone].sum()) < min(self._alone, len(self.ledger.settled))
        for number, hand in self.hands.items():
            if hand.dropped or hand.pid is None or (warm and hand is not self._first(hand, now, overdue)):
                continue
            while len(hand.pending) < 2:
                count = min(hand.lease, max(1, self.ledger.left // (4 * len(self.hands))))
                if warm:
                    count = 1
                units = self.ledger.take(number, count, now=now, overdue=overdue)
                if not units:
                    break
                hand.pending[hand.actor.do.remote(units)] = units

    def _first(self, ready: Hand, now: float, overdue: float) -> Hand:
        """Who works alone: the worker that was the first to be there, while it lives and reports."""
        first = self._warming
        if first is None or first not in self.hands.values() or first.dropped or now - self._heard > overdue:
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
        hand.buffers, hand.deaths = done.buffers, 0
        self._longest = max(self._longest, done.seconds)
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
        back = self.ledger.release(number)
        if old.deaths + 1 >= HOPELESS:
            raise RuntimeError(f"worker {number} died {HOPELESS} times without having done anything: {error}")
        self.hands[number] = self._hire(number)
        self.hands[number].deaths = old.deaths + 1
        news.append(f"worker {number} died: another takes its place, {len(back)} of its units wait again")

    def _swept(self, shards: Sequence[int] | range) -> list[str]:
        """Asks shards what they have applied: units that they lack are dealt out again."""
        if not shards:
            return []
        applied, counts = self._server.applied(), self._server.counts()
        news = []
        for k in shards:
            lost = self.ledger.lack(applied[k])
            life = counts[k]["life"]
            if life > self._lives[k] or lost:
                news.append(f"shard {k} was started again: {len(lost)} pushes were lost, and are done again")
            self._lives[k] = life
            self.lost += len(lost)
        return news

    def _save(self) -> list[str]:
        """Has the shards write checkpoints when it is time; what went wrong with the last."""
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return []
        ready, _ = ray.wait(self._saving, num_returns=len(self._saving), timeout=0) if self._saving else ([], [])
        if len(ready) < len(self._saving):
            return []
        news = []
        for number, saved in enumerate(self._saving):
            try:
                got(saved)
            except (RuntimeError, ValueError, RayError) as error:
                news.append(f"shard {number} cannot write its checkpoint, and will try again: {error}")
        self._saving = [shard.save.remote() for shard in self._server.shards]
        self._saved = time.monotonic()
        return news
