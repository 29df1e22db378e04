"""Pushes to a parameter server on this machine, beside a bare Ray actor and gloo's all-reduce of as many parameters.

    python benchmarks/parameter_server.py [--parameters 1000000 10000000] [--workers 1 2 4] [--rounds 4] [--json FILE]

A push is the exchange of asynchronous training: a gradient there, the parameters back. The workers compute nothing, so
that these are the most that a server can take. Rounds of all rows go in turn, since machines drift; the table has their
medians [least to most]. All is on the loopback interface, with Ray's token.

- quadric: shards of `quadric.parallel.parameter_server` with averaged_sgd: the push is judged, checked to be finite,
  applied, and its result averaged in float64; `every 10th`: as `averaged_sgd` has it with ``every=10``.
- bare actor: ``w -= lr * g; return w`` in NumPy, in place: the transport, and the least that a server can do.
- gloo: an all-reduce of two processes that have nothing else to do, in all-reduces a second; MB/s are of what each
  process hands over.
- of bare: pushes/s over those of the bare actor in the same round.
- server CPU: of the seconds of a round, how many the actor's process was computing.
- staleness: pushes between a worker's parameters and its gradient, on average.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from common import Table
from quadric.comm.collective import Collective
from quadric.optim.averaged import averaged_sgd
from quadric.parallel.cluster import Cluster
from quadric.parallel.exchange import NO_UNIT, Push

if TYPE_CHECKING:
    from quadric.parallel.parameter_server import ParameterServer

LAYERS = 10


def network(parameters: int) -> nn.Module:
    """Of about as many parameters, in layers."""
    width = round((parameters / LAYERS) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def rule(part: nn.Module, every: int = 1) -> torch.optim.Optimizer:
    return averaged_sgd(part.parameters(), lr=1e-6, every=every)


class Bare:
    """The least that a server can do."""

    def __init__(self, size: int) -> None:
        self.w, self.scaled = np.zeros(size, np.float32), np.empty(size, np.float32)

    def push(self, g: np.ndarray) -> np.ndarray:
        np.multiply(g, 1e-6, out=self.scaled)
        self.w -= self.scaled
        return self.w

    def cpu(self) -> float:
        return sum(os.times()[:2])


class Pusher:
    """A worker that only pushes."""

    def __init__(self, shards: Sequence[Any], sizes: Sequence[int], number: int) -> None:
        from quadric.parallel.actors import ActorLink

        self.link, self.number, self.sequence = ActorLink(shards), number, 0
        self.gradients = [np.ones(size, np.float32) for size in sizes]
        self.answers = self.link.pull()

    def push(self, pushes: int) -> float:
        """The mean staleness of so many pushes."""
        total = 0
        for _ in range(pushes):
            me = (self.number, 1, self.sequence, NO_UNIT)
            parts = zip(self.answers, self.gradients, strict=True)
            self.answers = self.link.push([Push(*me, a.life, a.clock, g) for a, g in parts])
            self.sequence += 1
            total += self.answers[0].staleness
        return total / pushes


class BarePusher:
    """The same for the bare actor."""

    def __init__(self, server: Any, size: int) -> None:
        self.server, self.gradient = server, np.ones(size, np.float32)

    def push(self, pushes: int) -> float:
        import ray

        for _ in range(pushes):
            ray.get(self.server.push.remote(self.gradient))
        return 0.0


def all_reduce(rank: int, meeting: str, size: int, count: int) -> float:
    """All-reduces a second of two processes."""
    torch.set_num_threads(1)
    with Collective(rank, 2, meeting) as ranks:
        vector = torch.ones(size)
        ranks.sum_(vector)
        start = time.perf_counter()
        for _ in range(count):
            ranks.sum_(vector)
        return count / (time.perf_counter() - start)


def cpu(server: ParameterServer) -> float:
    """Seconds that the shards have computed."""
    return sum(count["cpu"] for count in server.counts())


def gloo(size: int, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(2) as pool:
        meeting = f"file://{folder}/meeting"
        return min(pool.starmap(all_reduce, [(rank, meeting, size, count) for rank in range(2)]))


def race(parameters: int, workers: int, chosen: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of one size and number of workers."""
    import ray

    from quadric.parallel.parameter_server import ParameterServer

    model = network(parameters)
    size = sum(p.numel() for p in model.parameters())
    variants = {f"quadric, {shards} shard{'s' * (shards > 1)}": (shards, 1) for shards in chosen.shards}
    variants |= {f"quadric, 1 shard, every {every}th": (1, every) for every in chosen.every}
    servers = {}
    for name, (shards, every) in variants.items():
        unique = f"{parameters}-{workers}-{shards}-{every}"
        averaging = partial(rule, every=every)
        servers[name] = ParameterServer(unique, model, averaging, folder=folder / unique, shards=shards)
    bare: Any = ray.remote(Bare).options(num_cpus=0).remote(size)
    pusher, bare_pusher = (ray.remote(each).options(num_cpus=0) for each in (Pusher, BarePusher))
    crews: dict[str, list[Any]] = {"bare actor": [bare_pusher.remote(bare, size) for _ in range(workers)]}
    processes: dict[str, Callable[[], float]] = {"bare actor": lambda: ray.get(bare.cpu.remote())}
    for name, server in servers.items():
        crews[name] = [pusher.remote(server.shards, server.sizes, number) for number in range(workers)]
        processes[name] = partial(cpu, server)
    for crew in crews.values():
        ray.get([worker.push.remote(2) for worker in crew])
    pushes = max(4, chosen.megabytes * 10**6 // (8 * size * workers))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in crews}
    for _ in range(chosen.rounds):
        for name, crew in crews.items():
            used, start = processes[name](), time.perf_counter()
            ages = ray.get([worker.push.remote(pushes) for worker in crew])
            seconds = time.perf_counter() - start
            found[name].append((pushes * workers / seconds, (processes[name]() - used) / seconds, sum(ages) / workers))
    for server in servers.values():
        server.stop()
    ray.kill(bare)
    rows = []
    for name, rounds in found.items():
        rates = [rate for rate, _, _ in rounds]
        ratios = [rate / other for rate, (other, _, _) in zip(rates, found["bare actor"], strict=True)]
        rows.append({
            "parameters": size, "workers": workers, "server": name, "rate": rates, "of_bare": ratios,
            "cpu": statistics.median(cpu for _, cpu, _ in rounds), "staleness": rounds[-1][2],
            "megabytes": statistics.median(rates) * 8 * size / 1e6,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--every", type=int, nargs="*", default=[10], help="iterates between those averaged (default: 10)"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=1600, help="of a round, there and back (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    chosen = parser.parse_args()
    lists = (*chosen.parameters, *chosen.workers, *chosen.shards, *chosen.every)
    if min(*lists, chosen.rounds, chosen.megabytes) < 1:
        sys.exit("--parameters, --workers, --shards, --every, --rounds and --megabytes: give positive numbers")
    columns = ("parameters", "server", "workers", "pushes/s", "MB/s", "of bare", "server CPU", "staleness")
    table = Table(columns, chosen.json)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), cpus=2)
        try:
            for parameters in chosen.parameters:
                for workers in chosen.workers:
                    for row in race(parameters, workers, chosen, Path(folder)):
                        table.add(row, shown(row))
        finally:
            cluster.leave()
    for parameters in chosen.parameters:
        rates = [gloo(parameters, max(4, chosen.megabytes * 10**6 // (8 * parameters))) for _ in range(chosen.rounds)]
        middle = statistics.median(rates)
        row = {"parameters": parameters, "workers": 2, "server": "gloo", "rate": rates}
        table.add(row, (f"{parameters:,}", "gloo", "2", spread(rates), f"{middle * 4 * parameters / 1e6:.0f}", *"---"))


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    first = (f"{row['parameters']:,}", row["server"], str(row["workers"]), spread(row["rate"]))
    ratio = "-" if row["server"] == "bare actor" else f"{statistics.median(row['of_bare']):.2f}"
    return (
        *first,
        f"{row['megabytes']:.0f}",
        ratio,
        f"{row['cpu']:.2f}",
        "-" if ratio == "-" else f"{row['staleness']:.1f}",
    )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f} to {max(values):.1f}]"


if __name__ == "__main__":
    main()
