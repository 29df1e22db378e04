"""A discrete-event model of asynchronous training: workers, shards, cores and links, without a process or a clock.

A worker computes, sends each shard its part, and goes on when all have answered. A shard serves pushes one after the
other, first in, first out. Computing and serving need a core of the node they are on, and as many as need one at a time
share the node's cores evenly (processor sharing). A message needs the links of both its nodes, one way each, which let
messages through one after the other. In symbols, of one shard:

    C   seconds of a core before a push (`Costs.compute`)         x   pushes a second
    L   seconds that a message is on its way (`Costs.latency`)    W   seconds from a push to its answer
    s   seconds of a core at the shard (`Costs.service`)          n   workers, each with a core and a link

    x = n / (C + W)                          (Little's law: every worker either computes or waits)
    x <= 1 / s,  x <= bandwidth / bytes      (the shard, the shard's link), reached as n grows

and the mean staleness is n - 1: between two pushes of a worker each other has, on average, pushed once.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from quadric.options import check_whole

Times = Callable[[np.random.Generator], float]
"""Draws seconds."""


def constant(seconds: float) -> Times:
    """Always the same."""
    _check(seconds=seconds)
    return lambda _: seconds


def exponential(mean: float) -> Times:
    """Without memory."""
    _check(mean=mean)
    return lambda generator: generator.exponential(mean)


def lognormal(mean: float, spread: float) -> Times:
    """Of this mean, and a standard deviation of ``spread`` times the mean.

    >>> draw, generator = lognormal(2.0, 0.5), np.random.default_rng(0)
    >>> found = [draw(generator) for _ in range(10_000)]
    >>> round(float(np.mean(found)), 1), round(float(np.std(found)), 1)
    (2.0, 1.0)
    """
    _check(mean=mean, spread=spread)
    if not mean > 0:
        raise ValueError(f"mean={mean}: must be positive; constant(0.0) takes no time")
    variance = math.log1p(spread**2)
    middle, deviation = math.log(mean) - variance / 2, math.sqrt(variance)
    return lambda generator: generator.lognormal(middle, deviation)


def drawn(samples: Sequence[float]) -> Times:
    """One of those measured."""
    values = [float(sample) for sample in samples]
    if not values:
        raise ValueError("samples: there are none; give at least one")
    _check(**{f"samples[{place}]": value for place, value in enumerate(values)})
    return lambda generator: values[int(generator.random() * len(values))]


def summed(times: Times, number: int) -> Times:
    """Of so many minibatches, one after the other."""
    check_whole(number=number)
    if number < 1:
        raise ValueError(f"number={number}: give one at least")
    return lambda generator: sum(times(generator) for _ in range(number))


@dataclass(frozen=True)
class Costs:
    """What a push takes.

    Attributes:
        compute: seconds of a core at the worker: its minibatches, and putting messages together.
        service: seconds of a core at a shard: reading, applying, putting the answer together.
        sent, answered: bytes of a message to a shard and back.
        latency: seconds of a message on its way that need neither core nor link.
    """

    compute: Times
    service: Times
    sent: float = 0.0
    answered: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        _check(sent=self.sent, answered=self.answered, latency=self.latency)


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
        cores: of all that compute and serve there; one alone uses one.
        bandwidth: bytes a second to other nodes, and as many from them. Within a node messages need no link.
    """

    cores: float = 1.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        for name in ("cores", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")


@dataclass(frozen=True)
class Layout:
    """Who is where.

    Attributes:
        nodes: the machines.
        workers, shards: the node of each, by its number.

    Raises:
        ValueError: there is no worker, no shard, or not such a node.
    """

    nodes: Sequence[Node]
    workers: Sequence[int]
    shards: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("workers", "shards"):
            found = getattr(self, name)
            if not found:
                raise ValueError(f"{name}={found}: give the node of one at least")
            if not all(0 <= place < len(self.nodes) for place in found):
                raise ValueError(f"{name}: not all are on nodes 0 to {len(self.nodes) - 1}: those there are")

    @classmethod
    def one_node(cls, workers: int, shards: int, node: Node) -> Layout:
        """Everything on one machine."""
        return cls([node], [0] * workers, [0] * shards)

    @classmethod
    def cluster(cls, workers: int, shards: int, node: Node, *, each: int = 1) -> Layout:
        """Shards on a node of their own each; workers on others, ``each`` to a node."""
        places = [shards + number // each for number in range(workers)]
        return cls([node] * (places[-1] + 1), places, list(range(shards)))


@dataclass(frozen=True)
class Trace:
    """What has happened: pushes in the order in which shards have applied them, and what was busy.

    What stands after ``warm`` is of the time after the warm-up.

    Attributes:
        workers, shards: how many.
        shard, worker: [a] of each application of a push by a shard.
        staleness: [a] pushes that the shard has applied since it sent the parameters that this one was computed at.
        seconds: [a] when.
        warm: applications before the warm-up was over.
        rate: pushes a second, each applied by all shards.
        response: seconds from a push to the last answer, on average.
        waiting: share of the workers' time in which they wait for answers.
        use: share of the time that the busiest of its kind was busy: ``"shard"`` (a push in service), ``"link to a
            shard"``, ``"link from a shard"``, ``"link of workers"``, ``"cores of workers"``.
    """

    workers: int
    shards: int
    shard: Int[np.ndarray, " a"]
    worker: Int[np.ndarray, " a"]
    staleness: Int[np.ndarray, " a"]
    seconds: Float[np.ndarray, " a"]
    warm: int
    rate: float
    response: float
    waiting: float
    use: Mapping[str, float]

    @property
    def mean_staleness(self) -> float:
        """After the warm-up."""
        return float(self.staleness[self.warm :].mean())

    def histogram(self) -> dict[int, int]:
        """How many applications had which staleness, after the warm-up."""
        return dict(sorted(Counter(self.staleness[self.warm :].tolist()).items()))


def simulate(costs: Costs, layout: Layout, pushes: int, *, warm: int = 0, seed: int = 0) -> Trace:
    """Runs until all shards have applied so many pushes.

    Args:
        costs: of a push.
        layout: of workers and shards.
        pushes: all workers' together, those of the warm-up included.
        warm: pushes of the warm-up: all workers begin at once.
        seed: each worker and each shard draws its own times, whatever others do.

    >>> found = simulate(Costs(constant(3.0), constant(1.0)), Layout.cluster(2, 1, Node()), 6)
    >>> found.worker.tolist(), found.staleness.tolist(), found.seconds.tolist()
    ([0, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1], [4.0, 5.0, 8.0, 9.0, 12.0, 13.0])

    Raises:
        ValueError: ``pushes`` is not larger than ``warm``, or ``warm`` is negative; pushes take no time.
    """
    check_whole(pushes=pushes, warm=warm, seed=seed)
    if not 0 <= warm < pushes:
        raise ValueError(f"warm={warm}: must be from 0 to pushes - 1 = {pushes - 1}")
    return _Simulation(costs, layout, seed).run(pushes, warm)


class _Clock:
    """Events to come."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []

    def after(self, seconds: float, what: Callable[..., None], *given: Any) -> None:
        heappush(self._events, (self.now + seconds, next(self._numbers), what, given))

    def step(self) -> None:
        self.now, _, what, given = heappop(self._events)
        what(*given)


class _Shared:
    """Processor sharing: each of n jobs goes on at the rate min(1, capacity / n).

    ``_progress`` is the work that a job would have behind it which had been there all the time, so that those there end
    in the order of the progress at which they end, and no others need be touched when one comes or goes.
    """

    def __init__(self, clock: _Clock, capacity: float) -> None:
        self._clock, self._capacity = clock, capacity
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []
        self._progress = self._last = self._done = 0.0
        self._plan, self._numbers = 0, count()

    def add(self, work: float, then: Callable[[], None]) -> None:
        self._advance()
        heappush(self._jobs, (self._progress + work, next(self._numbers), then))
        self._expect()

    def busy(self) -> float:
        """The capacity used so far, in seconds of all of it."""
        self._advance()
        return self._done / self._capacity

    def _rate(self) -> float:
        return min(1.0, self._capacity / len(self._jobs))

    def _advance(self) -> None:
        now = self._clock.now
        if self._jobs:
            step = (now - self._last) * self._rate()
            self._progress += step
            self._done += step * len(self._jobs)
        self._last = now

    def _expect(self) -> None:
        """Plans the next end; those planned before are void."""
        self._plan += 1
        if self._jobs:
            self._clock.after(max(0.0, self._jobs[0][0] - self._progress) / self._rate(), self._end, self._plan)
        else:
            self._progress = 0.0

    def _end(self, plan: int) -> None:
        if plan == self._plan:
            self._advance()
            self._progress, _, then = heappop(self._jobs)
            self._expect()
            then()


class _Line:
    """One after the other, first in, first out."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._free, self._taken = clock, 0.0, 0.0

    def add(self, work: float, then: Callable[[], None]) -> None:
        now = self._clock.now
        self._free, self._taken = max(now, self._free) + work, self._taken + work
        self._clock.after(self._free - now, then)

    def busy(self) -> float:
        """Seconds so far."""
        return self._taken - max(0.0, self._free - self._clock.now)


@dataclass
class _Machine:
    """A node at work."""

    cores: _Shared
    bandwidth: float
    into: _Line
    out: _Line


class _Simulation:
    def __init__(self, costs: Costs, layout: Layout, seed: int) -> None:
        self._costs, self._layout, clock = costs, layout, _Clock()
        self._clock = clock
        machines = [
            _Machine(_Shared(clock, node.cores), node.bandwidth, _Line(clock), _Line(clock)) for node in layout.nodes
        ]
        self._workers, self._shards = ([machines[i] for i in places] for places in (layout.workers, layout.shards))
        n, S = len(self._workers), len(self._shards)
        self._draws = [np.random.default_rng([seed, number]) for number in range(n)]
        self._served = [np.random.default_rng([seed, number, 1]) for number in range(S)]
        self._queues = [deque[int]() for _ in range(S)]
        self._clocks, self._pulled = [0] * S, [[0] * S for _ in range(n)]
        self._unapplied, self._unanswered = [0] * n, [0] * n
        self._sent_at, self._begun_at = [0.0] * n, [0.0] * S
        self._applied: list[tuple[int, int, int, float]] = []
        self._pushes, self._answers = 0, 0
        self._wait, self._waits, self._waiting, self._changed = 0.0, 0.0, 0, 0.0
        self._serving = [0.0] * S

    def run(self, pushes: int, warm: int) -> Trace:
        for worker in range(len(self._workers)):
            self._begin(worker)
        while self._pushes < warm:
            self._clock.step()
        start, before, place = self._clock.now, self._used(), len(self._applied)
        self._wait, self._waits, self._answers, self._changed = 0.0, 0.0, 0, start
        while self._pushes < pushes:
            self._clock.step()
        self._count_waiting(0)
        seconds = self._clock.now - start
        if not seconds > 0:
            raise ValueError("costs: pushes take no time; give a time of computing, of service or on the way")
        after, n = self._used(), len(self._workers)
        shards, workers, staleness, times = (np.array(column) for column in zip(*self._applied, strict=True))
        return Trace(
            n, len(self._shards), shards, workers, staleness, times,
            warm=place,
            rate=(pushes - warm) / seconds,
            response=self._waits / self._answers if self._answers else math.nan,
            waiting=self._wait / n / seconds,
            use={kind: float(max(np.subtract(after[kind], before[kind]))) / seconds for kind in after},
        )  # fmt: skip

    def _used(self) -> dict[str, list[float]]:
        """Seconds that each was busy, by kind."""
        now = self._clock.now
        serving = zip(self._serving, self._queues, self._begun_at, strict=True)
        return {
            "shard": [done + (now - begun if queue else 0.0) for done, queue, begun in serving],
            "link to a shard": [machine.into.busy() for machine in self._shards],
            "link from a shard": [machine.out.busy() for machine in self._shards],
            "link of workers": [line.busy() for machine in self._workers for line in (machine.into, machine.out)],
            "cores of workers": [machine.cores.busy() for machine in self._workers],
        }

    def _begin(self, worker: int) -> None:
        self._workers[worker].cores.add(self._costs.compute(self._draws[worker]), partial(self._send, worker))

    def _send(self, worker: int) -> None:
        self._unapplied[worker] = self._unanswered[worker] = len(self._shards)
        self._sent_at[worker] = self._clock.now
        self._count_waiting(1)
        for shard, machine in enumerate(self._shards):
            self._travel(self._workers[worker], machine, self._costs.sent, partial(self._arrive, shard, worker))

    def _travel(self, source: _Machine, target: _Machine, size: float, then: Callable[[], None]) -> None:
        """A message goes through both links at once, and is there when all of it is through both."""
        links = [(source.out, source.bandwidth), (target.into, target.bandwidth)]
        ways = [(link, size / speed) for link, speed in links if size / speed > 0] if source is not target else []
        left = max(1, len(ways))

        def through() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._clock.after(self._costs.latency, then)

        for link, work in ways:
            link.add(work, through)
        if not ways:
            through()

    def _arrive(self, shard: int, worker: int) -> None:
        self._queues[shard].append(worker)
        if len(self._queues[shard]) == 1:
            self._serve(shard)

    def _serve(self, shard: int) -> None:
        self._begun_at[shard] = self._clock.now
        self._shards[shard].cores.add(self._costs.service(self._served[shard]), partial(self._apply, shard))

    def _apply(self, shard: int) -> None:
        now, worker, clock = self._clock.now, self._queues[shard].popleft(), self._clocks[shard]
        self._serving[shard] += now - self._begun_at[shard]
        self._applied.append((shard, worker, clock - self._pulled[worker][shard], now))
        self._clocks[shard] = self._pulled[worker][shard] = clock + 1
        self._unapplied[worker] -= 1
        self._pushes += not self._unapplied[worker]
        back = partial(self._answer, worker)
        self._travel(self._shards[shard], self._workers[worker], self._costs.answered, back)
        if self._queues[shard]:
            self._serve(shard)

    def _answer(self, worker: int) -> None:
        self._unanswered[worker] -= 1
        if not self._unanswered[worker]:
            self._count_waiting(-1)
            self._waits += self._clock.now - self._sent_at[worker]
            self._answers += 1
            self._begin(worker)

    def _count_waiting(self, change: int) -> None:
        self._wait += self._waiting * (self._clock.now - self._changed)
        self._waiting, self._changed = self._waiting + change, self._clock.now


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: must be a number of at least 0")
