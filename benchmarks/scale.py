"""How far asynchronous training scales: a model of it, checked on this machine, asked of a cluster, and replayed.

    python benchmarks/scale.py an4 data=PATH/an4_mfcc [--parts machine cluster replay] [--gigabits 10] [--json FILE]

- machine: workers on Ray compute gradients of the network and push them to one shard. What the model needs comes from
  the runs of one worker alone: seconds of a core for a gradient (each as measured), for sending it, and for serving it;
  by how much the clock is slower than the core, as others compute here; what is left of the period is time on the way.
  Then the model says what more workers do, which the table has beside what they did in the same round: medians [least
  to most] of the rounds. What is left to the workers by others is taken to stay the same, as it does where the system
  shares cores out to groups of processes.
- cluster: 1 to 4096 workers with a core and a link each, and shards likewise, whose cores are as fast as this one. A
  row has the minibatches/s of one worker, how many times as many more workers do, what is busiest in the end, and,
  where that is not the workers, the last rate over that of one: no more workers than that are of use.
- replay: real gradients in the order of simulated pushes, from the same start, as many pushes whatever the number of
  workers. Scaled steps are divided by their staleness. The losses are those of held-out frames, at the last parameters
  and at the average of all (You and Xu, 2014).

Rows in JSON go to FILE with the part's name added. Without the machine's part its times are nominal. `--quick` is a
small network on made frames, which shows that all this runs and nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common import Table
from compression import made
from frames import Speech, add_speech_options, load_speech
from parameter_server import Pusher, rule
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import AcousticModel
from quadric.objective.objective import Objective
from quadric.optim.averaged import averaged_sgd
from quadric.parallel.cluster import Cluster
from quadric.parallel.partition import hollow
from quadric.parallel.replay import replay
from quadric.parallel.shard import Bounds, Shard, begin
from quadric.parallel.simulation import Costs, Layout, Node, Times, Trace, constant, drawn, simulate, summed
from quadric.parallel.units import Units
from quadric.space import ParameterSpace

PARTS = ("machine", "cluster", "replay")


@dataclass(frozen=True)
class Machine:
    """What one worker alone has shown.

    Attributes:
        gradients: seconds of a core for each.
        sending: of a core at the worker, for a push; that of Ray's own processes for it included.
        serving: of a core at the shard, for a push.
        fixed: what serving takes of it however few the parameters.
        latency: of a message on its way.
        slower: seconds by the clock for one of a core.
    """

    gradients: Sequence[float]
    sending: float
    serving: float
    fixed: float
    latency: float
    slower: float

    def compute(self, every: int = 1) -> Times:
        draw = summed(drawn(self.gradients), every)
        return lambda generator: draw(generator) + self.sending

    def on_shards(self, parameters: int, shards: int, every: int, latency: float) -> Costs:
        """Of one of several shards, on a cluster."""
        share = 4 * parameters / shards
        service = constant(self.fixed + (self.serving - self.fixed) / shards)
        return Costs(self.compute(every), service, sent=share, answered=share, latency=latency)


NOMINAL = Machine([0.004, 0.005, 0.006], 0.0005, 0.002, 0.0005, 0.0005, 1.0)


class Account(NamedTuple):
    """Of a worker's pushes.

    Attributes:
        gradients, clock: seconds of a core for each gradient, and by the clock.
        cpu: of the process, for everything.
        staleness: the mean.
    """

    gradients: list[float]
    clock: list[float]
    cpu: float
    staleness: float


def seconds_of_ray() -> float:
    """Of a core, of all processes of the Ray that this process is a worker of: those under its raylet's parent."""
    parents, seconds = {}, {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = place.read_text().rpartition(")")[2].split()
            parents[int(place.parent.name)] = int(fields[1])
            seconds[int(place.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def under(process: int) -> bool:
        return process == head or (process in parents and under(parents[process]))

    head = parents[os.getppid()]
    return sum(spent for process, spent in seconds.items() if under(process))


class Computer(Pusher):
    """A worker that computes what it pushes, on the same data each time."""

    def __init__(self, shards: Sequence[Any], sizes: Sequence[int], number: int, model: nn.Module, data: Any) -> None:
        torch.set_num_threads(1)
        super().__init__(shards, sizes, number)
        self.space, self.sizes = ParameterSpace(model), list(sizes)
        self.objective = Objective(model, CrossEntropy(), data) if data is not None else None

    def compute(self) -> None:
        if self.objective is not None:
            theta = torch.cat([torch.from_numpy(answer.theta.copy()) for answer in self.answers])
            _, gradient = self.objective.value_and_grad(theta)
            self.gradients = [part.numpy() for part in gradient.split(self.sizes)]

    def work(self, pushes: int) -> Account:
        gradients, clock, total = [], [], 0.0
        before = time.process_time()
        for _ in range(pushes):
            cpu, wall = time.thread_time(), time.perf_counter()
            self.compute()
            gradients.append(time.thread_time() - cpu)
            clock.append(time.perf_counter() - wall)
            total += self.push(1)
        return Account(gradients, clock, time.process_time() - before, total / pushes)

    def seconds_of_ray(self) -> float:
        return seconds_of_ray()


class Round(NamedTuple):
    """Of some workers: what each did, pushes in all, seconds by the clock, of the shard's process, of all of Ray's."""

    accounts: list[Account]
    pushes: int
    seconds: float
    served: float
    ray: float

    @property
    def rate(self) -> float:
        return self.pushes / self.seconds

    @property
    def staleness(self) -> float:
        return statistics.mean(account.staleness for account in self.accounts)


def played(server: Any, crew: Sequence[Any], pushes: int) -> Round:
    """A round of ``pushes`` of each worker, all together."""
    import ray

    ray.get([worker.push.remote(1) for worker in crew])  # parameters of the last round are old
    spent = ray.get(crew[0].seconds_of_ray.remote())
    used, start = server.counts()[0]["cpu"], time.perf_counter()
    accounts = ray.get([worker.work.remote(pushes) for worker in crew])
    seconds = time.perf_counter() - start
    served = server.counts()[0]["cpu"] - used
    return Round(accounts, pushes * len(crew), seconds, served, ray.get(crew[0].seconds_of_ray.remote()) - spent)


def fitted(one: Round, small: Round) -> Machine:
    """From a round of one worker, and one of a worker that pushes next to nothing and computes nothing."""
    (account,) = one.accounts
    gradients, serving = account.gradients, one.served / one.pushes
    sending = max(0.0, (max(one.ray - one.served, account.cpu) - sum(gradients)) / one.pushes)
    work, period = statistics.mean(gradients) + sending + serving, 1 / one.rate
    slower = max(1.0, min(sum(account.clock) / sum(gradients), period / work))
    on_way = period - slower * work
    fixed = min(serving, small.served / small.pushes)
    return Machine(gradients, sending, serving, fixed, max(0.0, on_way / 2), slower)


def predicted(machine: Machine, workers: int, cores: int) -> Trace:
    """Of so many workers on this machine."""
    draw = machine.compute()
    service = constant(machine.slower * machine.serving)
    costs = Costs(lambda generator: machine.slower * draw(generator), service, latency=machine.latency)
    return simulate(costs, Layout.one_node(workers, 1, Node(cores)), 2200, warm=200)


def on_machine(speech: Speech, chosen: argparse.Namespace) -> Machine:
    """Runs workers, prints what they did beside what was predicted; what one worker has shown."""
    cores = len(os.sched_getaffinity(0))
    found: dict[int, list[tuple[Round, Trace]]] = {workers: [] for workers in chosen.workers}
    shown = []
    for one, small, others in rounds(speech, chosen, cores):
        shown.append(fitted(one, small))
        for workers, ran in others.items():
            found[workers].append((ran, predicted(shown[-1], workers, cores)))
    columns = ("workers", "pushes/s", "predicted", "predicted over measured", "staleness", "predicted")
    table = Table(columns, file_of(chosen, "machine"))
    for workers, pairs in found.items():
        rates, told = [ran.rate for ran, _ in pairs], [trace.rate for _, trace in pairs]
        ratios = [b / a for a, b in zip(rates, told, strict=True)]
        ages = statistics.median(ran.staleness for ran, _ in pairs)
        expected = statistics.median(trace.mean_staleness for _, trace in pairs)
        row = {"workers": workers, "rate": rates, "predicted": told, "staleness": [ages, expected]}
        numbers = (spread(rates), spread(told), spread(ratios, 2), f"{ages:.2f}", f"{expected:.2f}")
        table.add(row, (str(workers), *numbers))
    machine = shown[len(shown) // 2]
    print(
        f"\n{cores} core{'s' * (cores > 1)}; one worker in the round in the middle: a gradient "
        f"{1e3 * statistics.mean(machine.gradients):.2f} ms of a core, sending {1e3 * machine.sending:.2f} ms, serving "
        f"{1e3 * machine.serving:.2f} ms (of next to nothing {1e3 * machine.fixed:.2f} ms), a message "
        f"{1e3 * machine.latency:.2f} ms on its way; the clock {machine.slower:.2f} times as long\n",
        flush=True,
    )
    return machine


def rounds(speech: Speech, chosen: argparse.Namespace, cores: int) -> Iterator[tuple[Round, Round, dict[int, Round]]]:
    """Rounds of one worker, of one that pushes next to nothing, and of all numbers of workers, in turn."""
    model, small = speech.again(), nn.Linear(1, 1)
    data = speech.stream.draw(chosen.batch)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), cpus=cores)
        try:
            import ray  # by the environment that the cluster has set

            from quadric.parallel.parameter_server import ParameterServer

            server, least = (
                ParameterServer(name, part, rule, folder=Path(folder) / name)
                for name, part in {"network": model, "small": small}.items()
            )
            computer = ray.remote(Computer).options(num_cpus=0)
            count = max(1, *chosen.workers)
            crew = [computer.remote(server.shards, server.sizes, i, model, data) for i in range(count)]
            idle = computer.remote(least.shards, least.sizes, 0, small, None)
            played(server, crew, 3)
            played(least, [idle], 3)
            for _ in range(chosen.rounds):
                pushed = played(least, [idle], 100)
                found = {n: played(server, crew[:n], -(-chosen.pushes // n)) for n in {1, *chosen.workers}}
                yield found[1], pushed, {n: found[n] for n in chosen.workers}
        finally:
            cluster.leave()


def on_cluster(machine: Machine, parameters: int, chosen: argparse.Namespace) -> None:
    """Prints what workers on a cluster would do."""
    most = chosen.most
    sizes = [4**k for k in range(20) if 4**k <= most]
    shown = [f"times {n:,}" for n in sizes[1:]]
    columns = ("shards", "every", "minibatches/s of 1", *shown, "busiest", "workers it can take")
    print(f"{parameters:,} parameters, {chosen.gigabits:g} Gbit/s, messages {1e3 * chosen.latency:g} ms on their way\n")
    table = Table(columns, file_of(chosen, "cluster"))
    node = Node(1.0, bandwidth=chosen.gigabits * 1e9 / 8)
    for shards in chosen.shards:
        for every in chosen.every:
            costs = machine.on_shards(parameters, shards, every, chosen.latency)
            found = {}
            for n in sizes:
                warm = max(200, n)
                found[n] = simulate(costs, Layout.cluster(n, shards, node), 3 * warm, warm=warm)
            rates, last = [every * found[n].rate for n in sizes], found[sizes[-1]]
            busiest = max(last.use, key=last.use.__getitem__)
            full = busiest != "cores of workers" and last.use[busiest] > 0.99
            able = f"{rates[-1] / rates[0]:.0f}" if full else f"over {sizes[-1]:,}"
            ages = [found[n].mean_staleness for n in sizes]
            row = {"shards": shards, "every": every, "workers": sizes, "rate": rates, "staleness": ages}
            use = {n: found[n].use for n in sizes}
            cells = [f"{rate / rates[0]:.1f}" for rate in rates[1:]]
            line = (str(shards), str(every), f"{rates[0]:.1f}", *cells, f"{busiest} {last.use[busiest]:.0%}", able)
            table.add({**row, "use": use, "busiest": busiest}, line)
    print(flush=True)


def replayed(machine: Machine, speech: Speech, chosen: argparse.Namespace) -> None:
    """Prints what the staleness of workers does to real gradients."""
    columns = ("lr", "workers", "steps", "staleness", "loss", "frames right", "of the average: loss", "frames right")
    table = Table(columns, file_of(chosen, "replay"))
    units = Units(speech.stream, frames=chosen.batch, epochs=chosen.epochs)
    parameters = ParameterSpace(speech.model).size
    costs = machine.on_shards(parameters, 1, 1, chosen.latency)
    node = Node(1.0, bandwidth=chosen.gigabits * 1e9 / 8)
    for lr in chosen.lr:
        for n in chosen.replay:
            trace = simulate(costs, Layout.cluster(n, 1, node), len(units))
            for scaled in (False, True) if n > 1 else (False,):
                model = speech.again()
                ends = ended(model, speech, trace, units, lr, Bounds(scaled=scaled))
                age = float(trace.staleness.mean())
                row = {"lr": lr, "workers": n, "scaled": scaled, "pushes": len(units), "staleness": age, **ends}
                cells = [score(ends[name]) for name in ("last", "average")]
                table.add(row, (f"{lr:g}", str(n), "scaled" if scaled else "plain", f"{age:.1f}", *cells))


def score(found: dict[str, float]) -> str:
    loss = f"{found['loss']:.4f}" if found["loss"] < 100 else "diverged"
    return f"{loss} | {found['accuracy']:.1%}"


def averaged(part: nn.Module, lr: float) -> torch.optim.Optimizer:
    return averaged_sgd(part.parameters(), lr=lr)


def ended(
    model: AcousticModel, speech: Speech, trace: Trace, units: Units, lr: float, bounds: Bounds
) -> dict[str, dict[str, float]]:
    """Held-out scores at the last parameters and at the average."""
    space = ParameterSpace(model)
    with tempfile.TemporaryDirectory() as folder:
        begin(model, Path(folder), units=len(units))
        shard = Shard(hollow(model), partial(averaged, lr=lr), folder=Path(folder), bounds=bounds)
        for _ in replay(trace, [shard], model, CrossEntropy(), units):
            pass
    found = {}
    for name, theta in {"last": shard.pull().theta.copy(), "average": shard.average()}.items():
        with torch.no_grad():
            for parameter, part in zip(space.parameters, space.split(torch.from_numpy(theta)), strict=True):
                parameter.copy_(part)
        found[name] = speech.look(model)
    return found


def file_of(chosen: argparse.Namespace, part: str) -> Path | None:
    return chosen.json and chosen.json.with_stem(f"{chosen.json.stem}-{part}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_speech_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--batch", type=int, default=256, help="frames of a gradient (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="on this machine (default: 1 2 4)")
    parser.add_argument("--rounds", type=int, default=5, help="on this machine (default: %(default)s)")
    parser.add_argument("--pushes", type=int, default=100, help="of a round (default: %(default)s)")
    parser.add_argument("--gigabits", type=float, default=10.0, help="a second of a link (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.0005, help="s of a message (default: %(default)s)")
    parser.add_argument("--most", type=int, default=4096, help="workers of the cluster (default: %(default)s)")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 5, 20], help="minibatches (default: 1 5 20)")
    parser.add_argument("--replay", type=int, nargs="+", default=[1, 4, 16, 64, 256], metavar="WORKERS",
                        help="(default: 1 4 16 64 256)")  # fmt: skip
    parser.add_argument("--epochs", type=float, default=1.0, help="replayed (default: %(default)s)")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.3, 0.03], help="replayed (default: 0.3 0.03)")
    parser.add_argument("--quick", action="store_true", help="made frames, up to 16 workers")
    return parser.parse_intermixed_args()


def main() -> None:
    """Prints the tables, and writes them."""
    chosen = parsed()
    for name in ("batch", "workers", "rounds", "pushes", "gigabits", "latency", "most", "shards", "every", "replay",
                 "epochs", "lr", "threads"):  # fmt: skip
        values = getattr(chosen, name)
        for value in values if isinstance(values, list) else [values]:
            if not value > 0:
                sys.exit(f"--{name} {value}: must be positive")
    if chosen.quick:
        torch.set_num_threads(chosen.threads)
        chosen.batch, chosen.rounds, chosen.pushes, chosen.most, chosen.replay = 60, 1, 20, 16, [1, 4]
    speech = made() if chosen.quick else load_speech(chosen)
    machine = on_machine(speech, chosen) if "machine" in chosen.parts else NOMINAL
    if "cluster" in chosen.parts:
        on_cluster(machine, ParameterSpace(speech.model).size, chosen)
    if "replay" in chosen.parts:
        replayed(machine, speech, chosen)


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f} to {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
