"""Processes of asynchronous training are killed, again and again: how long until it goes on, and what is lost.

    python benchmarks/recovery.py [--kills 8] [--parameters 1000000] [--json FILE]

Two workers and two shards on this machine; a worker's gradient takes 20 ms besides its arithmetic. Another process
looks at the shards' clocks every 10 ms. For each kind of kill, so many times:

- worker: SIGKILL to one of two. Gap: the longest time without an applied push within the five seconds after the kill
  (the other worker goes on); back: from the kill to the replacement's first report.
- stopped worker: SIGSTOP to one of two for three seconds. Gap as above.
- shard: SIGKILL to one of two. Back: from the kill to the next push it applies; lost: pushes that its checkpoint had
  not, which are done again.
- driver: SIGKILL, and at once another one. Back: to the next applied push.

Then a whole training with ten kills at random, of workers and shards, beside one without any: the loss at the end on
the data, and whether each unit of data was applied exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Table
from quadric.data.examples import ExampleStream
from quadric.loss.loss import CrossEntropy
from quadric.optim.averaged import averaged_sgd
from quadric.parallel.cluster import Cluster
from quadric.parallel.units import Units

FEATURES, CLASSES, ROWS, BATCH = 64, 16, 40_000, 16
SHARDS, WORKERS = 2, 2
NAME = "recovery"
KINDS = ("worker", "stopped worker", "shard", "driver")


class Slow(CrossEntropy):
    """Takes 20 ms besides."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(output, target)


def rule(part: nn.Module) -> torch.optim.Optimizer:
    return averaged_sgd(part.parameters(), lr=0.2)


def network(parameters: int) -> nn.Sequential:
    width = round(parameters**0.5)
    torch.manual_seed(0)
    layers = (nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))
    return nn.Sequential(*layers)


def data(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, FEATURES, generator=generator)
    return inputs, (inputs @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)


def drive(folder: Path, parameters: int, rows: int) -> None:
    """The driver: tells what it knows, a line of JSON each, until it is killed or everything is done."""
    Cluster(folder, cpus=WORKERS)  # that of the process that watches
    from quadric.parallel.crew import Crew
    from quadric.parallel.parameter_server import ParameterServer
    from quadric.parallel.worker_actor import Work

    model, (inputs, classes) = network(parameters), data(rows)
    units = Units(ExampleStream(inputs, classes), frames=BATCH)
    server = ParameterServer(NAME, model, rule, folder=folder / "server", shards=SHARDS, units=len(units))
    crew = Crew(server, Work(model, Slow(), units), WORKERS)
    for tick in crew.run():
        told = {
            "time": time.time(),
            "reports": [(report.worker, report.unit) for report in tick.reports],
            "news": tick.news,
            "workers": {number: hand.pid for number, hand in crew.hands.items()},
            "lost": crew.lost,
        }
        print(json.dumps(told), flush=True)
    server.load_into(model)
    counts = server.counts()
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(inputs), classes))
    crew.end()
    server.stop()
    applied = [count["applied"] for count in counts]
    print(json.dumps({"loss": loss, "applied": applied, "units": len(units), "lost": crew.lost}), flush=True)


class Driver:
    """A process of `drive`, read in the background."""

    def __init__(self, folder: Path, parameters: int, rows: int = ROWS) -> None:
        command = [sys.executable, __file__, "--drive", str(folder), "--parameters", str(parameters)]
        self.process = subprocess.Popen([*command, "--rows", str(rows)], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.told: list[dict[str, Any]] = []
        self._rest = b""

    def read(self) -> None:
        """Takes what has been told meanwhile."""
        assert self.process.stdout is not None
        while chunk := self.process.stdout.read():
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self.told += [json.loads(line) for line in lines if line.startswith(b"{")]

    def until(self, holds: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Reads until something holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read()
            if found := holds():
                return found
            if self.process.poll() is not None:
                self.read()
                if found := holds():
                    return found
                raise RuntimeError(f"the driver has ended, with {self.process.returncode}: see above")
            time.sleep(0.005)
        raise RuntimeError(f"the driver told nothing of it in {seconds} s")

    def workers(self) -> Mapping[str, int | None]:
        """The processes of the workers; None: not there yet."""
        return next((told["workers"] for told in reversed(self.told) if "workers" in told), {})

    def busy(self, since: int = 0) -> bool:
        """Whether all workers have reported since the so-manieth telling."""
        return {w for told in self.told[since:] for w, _ in told.get("reports", [])} == set(range(WORKERS))


def clocks(shards: Sequence[Any]) -> list[Mapping[str, Any]]:
    import ray

    return [dict(count) for count in ray.get([shard.counts.remote() for shard in shards])]


def gap(shards: Sequence[Any], seconds: float) -> float:
    """The longest time in which the first shard applied nothing."""
    begin = last = time.monotonic()
    longest, clock = 0.0, clocks(shards[:1])[0]["clock"]
    while time.monotonic() - begin < seconds:
        now_clock, now = clocks(shards[:1])[0]["clock"], time.monotonic()
        if now_clock > clock:
            longest, clock, last = max(longest, now - last), now_clock, now
        time.sleep(0.01)
    return max(longest, time.monotonic() - last)


def kill_worker(driver: Driver, shards: Sequence[Any]) -> dict[str, float]:
    pid, start = driver.workers()["1"], time.time()
    assert pid is not None  # it has reported
    before = len(driver.told)
    os.kill(pid, signal.SIGKILL)
    longest = gap(shards, 5.0)

    def back() -> float | None:
        of_another = (told for told in driver.told[before:] if told["workers"]["1"] not in (None, pid))
        return next((told["time"] for told in of_another if any(worker == 1 for worker, _ in told["reports"])), None)

    return {"gap": longest, "back": driver.until(back) - start}


def stop_worker(driver: Driver, shards: Sequence[Any]) -> dict[str, float]:
    pid = driver.workers()["1"]
    assert pid is not None  # it has reported
    os.kill(pid, signal.SIGSTOP)
    longest = gap(shards, 3.0)
    os.kill(pid, signal.SIGCONT)
    return {"gap": longest}


def kill_shard(driver: Driver, shards: Sequence[Any]) -> dict[str, float]:
    import ray

    before, lost, told = clocks(shards)[1], driver.told[-1]["lost"], len(driver.told)
    start = time.monotonic()
    os.kill(before["pid"], signal.SIGKILL)
    restored: int | None = None
    while True:
        with suppress(ray.exceptions.RayActorError):
            count = clocks(shards)[1]
            if count["life"] > before["life"]:
                restored = count["clock"] if restored is None else restored
                if count["clock"] > restored:
                    break
        time.sleep(0.01)
    seconds = time.monotonic() - start
    driver.until(lambda: "shard 1 was started again" in str(driver.told[told:]))
    return {"back": seconds, "lost": driver.told[-1]["lost"] - lost}


def kill_driver(driver: Driver, shards: Sequence[Any], again: Callable[[], Driver]) -> tuple[dict[str, float], Driver]:
    start = time.monotonic()
    driver.process.kill()
    driver.process.wait()
    second = again()
    time.sleep(0.5)  # what was on its way has arrived
    clock = clocks(shards[:1])[0]["clock"]
    while clocks(shards[:1])[0]["clock"] == clock:
        time.sleep(0.01)
    return {"back": time.monotonic() - start}, second


def kinds(chosen: argparse.Namespace, table: Table) -> None:
    """Each kind of kill, one after the other, in one long training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(folder, cpus=WORKERS)
        import ray

        def begin() -> Driver:
            return Driver(folder, chosen.parameters, 4_000_000)

        driver = begin()
        try:
            driver.until(driver.busy)
            shards = [ray.get_actor(f"{NAME}-{number}") for number in range(SHARDS)]
            for kind in chosen.kinds:
                found: list[dict[str, float]] = []
                for _ in range(chosen.kills):
                    since = len(driver.told)
                    driver.until(partial(driver.busy, since))
                    time.sleep(1.0)
                    if kind == "driver":
                        took, driver = kill_driver(driver, shards, begin)
                        found.append(took)
                    else:
                        actions = {"worker": kill_worker, "stopped worker": stop_worker, "shard": kill_shard}
                        found.append(actions[kind](driver, shards))
                values = {what: [each[what] for each in found] for what in found[0]}
                shown = [spread(values.get(what)) for what in ("gap", "back", "lost")]
                table.add({"kind": kind, **values}, [kind, str(len(found)), *shown])
        finally:
            driver.process.kill()
            cluster.leave()


def whole(chosen: argparse.Namespace, kills: int, seed: int = 0) -> dict[str, Any]:
    """A training to its end, with so many kills at random."""
    rng, rows = random.Random(seed), BATCH * chosen.units
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(folder, cpus=WORKERS)
        import ray

        driver = Driver(folder, chosen.parameters, rows)
        try:
            driver.until(driver.busy)
            shards = [ray.get_actor(f"{NAME}-{number}") for number in range(SHARDS)]
            done = 0
            while done < kills and driver.process.poll() is None:
                time.sleep(rng.uniform(1.0, 4.0))
                driver.read()
                with suppress(ProcessLookupError, ray.exceptions.RayError):
                    if rng.random() < 0.5:
                        pid = rng.choice([pid for pid in driver.workers().values() if pid is not None])
                    else:
                        pid = rng.choice(clocks(shards))["pid"]
                    os.kill(pid, signal.SIGKILL)
                    done += 1
            driver.until(lambda: "loss" in driver.told[-1], 600)
            return {"kills": done, **driver.told[-1]}
        finally:
            driver.process.kill()
            cluster.leave()


def spread(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    return f"{statistics.median(values):.2f} [{min(values):.2f} to {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="(default: all)")
    parser.add_argument("--kills", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=3000, help="of data in the whole trainings (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=ROWS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.drive is not None:
        drive(chosen.drive, chosen.parameters, chosen.rows)
        return
    table = Table(("killed", "times", "gap, s", "back, s", "pushes lost"), chosen.json)
    kinds(chosen, table)
    print()
    table = Table(("kills", "loss at the end", "units", "applied by each shard", "pushes lost"), None)
    for kills in (0, 10):
        row = whole(chosen, kills)
        applied = ", ".join(f"{count:,}" for count in row["applied"])
        table.add(row, [str(row["kills"]), f"{row['loss']:.4f}", f"{row['units']:,}", applied, f"{row['lost']:,}"])


if __name__ == "__main__":
    main()
