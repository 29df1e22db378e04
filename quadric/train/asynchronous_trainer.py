"""The trainer of asynchronous training: a parameter server, its workers, and looks at held-out data.

It leaves in a training's folder what `quadric.train.trainer.Trainer` does, ``model.pt`` and ``metrics.jsonl``, and goes
on from the checkpoints of the server's shards.
"""

from __future__ import annotations

import copy
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quadric.data.examples import Stream
from quadric.loss.loss import Loss
from quadric.optim.averaged import train_mode
from quadric.optim.block_diagonal import BlockDiagonal
from quadric.parallel.exchange import Verdict
from quadric.parallel.partition import partition
from quadric.parallel.shard import Rule
from quadric.parallel.units import Units
from quadric.parallel.worker import Report
from quadric.progress import Progress, silent
from quadric.space import ParameterSpace
from quadric.train import checkpoint
from quadric.train.asynchronous import Asynchronous, asynchronous_key
from quadric.train.method import Method
from quadric.train.metrics import MetricsLog
from quadric.train.stages import alone_in, digest, reading
from quadric.train.trainer import Diverged, Interrupted, evaluate, stop_requests

if TYPE_CHECKING:
    from quadric.parallel.cluster import Cluster
    from quadric.parallel.crew import Crew, Tick
    from quadric.parallel.parameter_server import ParameterServer

logger = logging.getLogger(__name__)

LIVE_SECONDS = 10.0
"""Between two lines about throughput, staleness and loss."""


class AsynchronousTrainer:
    """Trains a model in a folder by workers on a parameter server, and goes on where it stopped.

    Args:
        model: already where it shall start.
        loss: of its output.
        method: its optimiser steps on gradients alone.
        stream: training data, of one rank.
        held_out: data the training is judged on; None: the last parameters count as the best.
        options: of the workers and the server.
        folder: of ``model.pt``, ``metrics.jsonl``, and the server's checkpoints.
        evaluations: of the held-out data, evenly spaced, besides the one before it.
        autocast: compute matrix products in bfloat16.
        seed: of dropout.

    Raises:
        ValueError: the method's optimiser needs more than gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        method: Method,
        stream: Stream,
        held_out: Stream | None,
        options: Asynchronous,
        folder: Path,
        *,
        evaluations: int = 20,
        autocast: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.loss, self.method, self.options = model, loss, method, options
        self.held_out, self.folder, self.evaluations = held_out, folder, evaluations
        self.autocast, self.seed = autocast, seed
        self.units = Units(stream, frames=method.gradient_frames, epochs=method.epochs, every=options.every)
        self._space = ParameterSpace(model)
        self._metrics = MetricsLog(folder / "metrics.jsonl")
        fingerprint = digest(
            self.units.fingerprint(), self._space.names, asynchronous_key(options), method, repr(loss), autocast, seed
        )
        counts = {"looks": 0, "update": 0, "stale": 0, "told": 0, "lost": 0, "seconds": 0.0, "best": math.inf}
        server = secrets.token_hex(8)  # a name that no other training in a shared cluster has
        progress = {**counts, "done": False, "model": None, "buffers": [buffer.clone() for buffer in model.buffers()]}
        self._state: dict[str, Any] = {**progress, "fingerprint": fingerprint, "server": server}
        self._looking = 0.0  # seconds that the last look has taken
        _check_steps(model, options.rule(method, len(self.units))[0], method.name)
        partition(model, options.shards)
        if len(self.units) < options.workers:
            logger.warning(
                "%s: %d pushes in all for %d workers: give fewer gradient_frames, or a smaller asynchronous.every",
                method.name, len(self.units), options.workers,
            )  # fmt: skip

    def fit(self, *, progress: Progress = silent, what: str = "training") -> Mapping[str, Any]:
        """Trains to the end, from the saved state if there is one; returns the record of ``model.pt``.

        Raises:
            Diverged: the held-out loss is not finite.
            Interrupted: on SIGINT or SIGTERM, with everything saved.
            ValueError: the folder is of another training, or damaged; what a worker computes on is faulty.
            RuntimeError: the cluster cannot be joined, or workers keep dying.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(alone_in(self.folder, "folder"))
            self._load()
            if self._state["done"]:
                self.model.load_state_dict(self._state["model"])
            else:
                from quadric.parallel.cluster import Cluster

                checkpoint.save(self._state, self.folder / "driver.pt")
                logger.info("%s: the server and %d workers start", self.method.name, self.options.workers)
                cluster = Cluster(self.folder / "ray", cpus=self.options.workers)
                stack.callback(cluster.leave)
                self._train(cluster, progress, what)
                # It says that all is done, and no server is left that anybody could want.
                checkpoint.save(self._state, self.folder / "driver.pt")
        with reading(self.folder):
            return checkpoint.load(self.folder / "model.pt")

    @property
    def update(self) -> int:
        """Pushes of which the last look at the held-out data knew."""
        return int(self._state["update"])

    @property
    def seconds(self) -> float:
        """From the first worker's start on, looks at held-out data included."""
        return float(self._state["seconds"])

    def at_result(self) -> AbstractContextManager[None]:
        """After `fit`: the model has the last parameters, of which ``model.pt`` may hold earlier ones."""
        return nullcontext()

    def _train(self, cluster: Cluster, progress: Progress, what: str) -> None:
        """Trains to the end; the server and the workers have ended then."""
        with ExitStack() as running:
            self._give_buffers(self._state["buffers"])
            server = self._server()
            running.callback(_where, cluster, server.stop)
            crew = self._crew(server, cluster)
            running.callback(_where, cluster, crew.end)
            self._tell_lost(len(self.units) - crew.ledger.left)
            live = _Live(what, sum(server.sizes), len(self.units))
            if not self._metrics.records():
                self._look(server, crew, live)
            with stop_requests() as stop:
                units = self._settled(server, crew, cluster, live, stop)
                try:
                    for _ in progress(units, total=crew.ledger.left, what=what):
                        pass
                except Exception:
                    with suppress(Exception):  # what went wrong is what counts
                        cluster.check()
                        self._save(server, crew)
                    raise
            if not self._state["done"]:
                self._save(server, crew)
                done = len(self.units) - crew.ledger.left
                raise Interrupted(
                    f"stopped after push {done} of {len(self.units)}, saved in {self.folder}: "
                    "the same command goes on from there"
                )

    def _settled(
        self, server: ParameterServer, crew: Crew, cluster: Cluster, live: _Live, stop: threading.Event
    ) -> Iterator[int]:
        """The units as they are settled, until all are or one asks to stop; looks at the held-out data in between."""
        lost = 0
        for tick in self._counted(crew):
            cluster.check()
            for sentence in tick.news:
                logger.info("%s", sentence)
            if live.take(tick, crew.ledger.left):  # what a person has seen is not forgotten when all is killed
                self._state["told"] = len(self.units) - crew.ledger.left
                checkpoint.save(self._state, self.folder / "driver.pt")
            self._state["lost"], lost = self._state["lost"] + crew.lost - lost, crew.lost
            looks = self.evaluations * (len(self.units) - crew.ledger.left) // len(self.units)
            if crew.ledger.left and looks > self._state["looks"]:
                self._state["looks"] = looks
                self._look(server, crew, live)
                self._save(server, crew)
            yield from (report.unit for report in tick.reports if report.settled)
            if stop.is_set():
                return
            if self.method.patience is not None and self._state["stale"] >= self.method.patience:
                break
        else:
            self._look(server, crew, live)
        self._tell_counts(server, crew)
        self._state |= {"done": True, "model": self.model.state_dict()}

    def _counted(self, crew: Crew) -> Iterator[Tick]:
        """The ticks, their seconds added up."""
        since = time.monotonic()
        for tick in crew.run():
            now = time.monotonic()
            self._state["seconds"] += now - since
            since = now
            yield tick

    def _server(self) -> ParameterServer:
        from quadric.parallel.parameter_server import ParameterServer

        rule, schedule = self.options.rule(self.method, len(self.units))
        with _server_in(self.folder):
            return ParameterServer(
                f"{self.folder.name}-{self._state['server']}",
                self.model,
                rule,
                folder=self.folder / "server",
                shards=self.options.shards,
                units=len(self.units),
                schedule=schedule,
                bounds=self.options.bounds,
            )

    def _crew(self, server: ParameterServer, cluster: Cluster) -> Crew:
        from quadric.parallel.crew import Crew
        from quadric.parallel.worker_actor import Work

        work = Work(
            self.model,
            self.loss,
            self.units,
            self.options.strategy(self.method, self.units.minibatches),
            clip=self.options.clip,
            compressor=self.options.compressor(),
            whole=self.options.whole,
            autocast=torch.bfloat16 if self.autocast else None,
            seed=self.seed,
        )
        # A Ray of its own has this machine to itself, and its workers may share a GPU.
        cpus, gpus = (0, 0) if cluster.own else (1, int(self._space.device.type == "cuda"))
        return Crew(server, work, self.options.workers, alone=self.options.warm, cpus=cpus, gpus=gpus)

    def _look(self, server: ParameterServer, crew: Crew, live: _Live) -> None:
        """Scores on the held-out data; the parameters are kept where they are the best so far."""
        crew.deal_ahead(self._looking)
        start = time.monotonic()
        server.load_into(self.model)
        self._give_buffers(crew.buffers())
        done = len(self.units) - crew.ledger.left
        frames = sum(self.units.frames(u) for u in crew.ledger.settled.nonzero().flatten().tolist())
        place = {"update": done, "epoch": frames / self.units.total_frames, "seconds": self._state["seconds"]}
        scores = {} if self.held_out is None else evaluate(self.model, self.loss, self.held_out, autocast=self.autocast)
        if not math.isfinite(scores.get("loss", 0.0)):
            raise Diverged(
                f"the held-out loss is {scores['loss']} after push {done}: {self.method.name} diverged; lower its "
                f"lr={getattr(self.method, 'lr', None)}, or give asynchronous.clip (the log is in {self.folder})"
            )
        self._state["update"] = done
        self._state["stale"] += 1
        if self.held_out is None or scores["loss"] < self._state["best"]:
            self._state["best"], self._state["stale"] = scores.get("loss", math.inf), 0
            state = {"model": self.model.state_dict(), "update": done, "seconds": place["seconds"], **scores}
            checkpoint.save(state, self.folder / "model.pt")
        self._metrics.truncate_after(done)
        self._metrics.append({**place, **live.record(), **{f"dev_{name}": value for name, value in scores.items()}})
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info("push %d of %d: held-out %s", done, len(self.units), told)
        self._looking = time.monotonic() - start

    def _tell_lost(self, done: int) -> None:
        """Says what the server has lost since a driver before this told of it: both have been killed."""
        if (lost := self._state["told"] - done) > 0:
            logger.info("the server was started again: %d pushes were lost, and are done again", lost)
            self._state["lost"] += lost

    def _give_buffers(self, buffers: Sequence[Tensor]) -> None:
        """Gives the model these running statistics."""
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def _tell_counts(self, server: ParameterServer, crew: Crew) -> None:
        """What became of all pushes."""
        counts = server.counts()
        most = {verdict: max(count[verdict.name.lower()] for count in counts) for verdict in Verdict}
        refused = {verdict: number for verdict, number in most.items() if number and verdict is not Verdict.APPLIED}
        told = "".join(f"; {number} refused: {verdict}" for verdict, number in refused.items())
        again = self._state["lost"]
        lost = f"; {again} lost by shards that died, and done again" if again else ""
        shards = f" by each of {len(counts)} shards" if len(counts) > 1 else ""
        logger.info("%d pushes applied%s%s%s", most[Verdict.APPLIED], shards, told, lost)

    def _load(self) -> None:
        file = self.folder / "driver.pt"
        if not file.exists():
            return
        with reading(file):
            state = checkpoint.load(file)
        if state["fingerprint"] != self._state["fingerprint"]:
            raise ValueError(
                f"folder={self.folder}: a training of other data or options is there; choose another folder"
            )
        best = self.folder / "model.pt"  # which may be of a later look than the driver has lived to save
        if best.exists():
            with reading(self.folder):
                state["best"] = min(state["best"], checkpoint.load(best).get("loss", math.inf))
        self._state = state

    def _save(self, server: ParameterServer, crew: Crew) -> None:
        """What the driver knows, after what the shards do: it never tells of pushes that they lack."""
        server.save()
        self._state |= {"buffers": crew.buffers(), "told": len(self.units) - crew.ledger.left}
        checkpoint.save(self._state, self.folder / "driver.pt")


@contextmanager
def _server_in(folder: Path) -> Iterator[None]:
    """Says what to do where a shard's checkpoint is damaged."""
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise ValueError(
            f"the server's checkpoints in {folder / 'server'} do not serve ({error}): delete {folder}, and the same "
            "command begins this training anew"
        ) from error


def _where(cluster: Cluster, end: Callable[[], None]) -> None:
    """Ends what runs in a cluster, if that is still there."""
    if cluster.there:
        end()


class _Live:
    """What a person sees of the pushes."""

    def __init__(self, what: str, parameters: int, units: int) -> None:
        self._what, self._units = what, units
        self._lately, self._since_look = _Window(parameters), _Window(parameters)

    def take(self, tick: Tick, left: int) -> bool:
        """Counts the reports, and says how it goes now and then; whether it has."""
        self._lately.add(tick.reports)
        self._since_look.add(tick.reports)
        due = bool(self._lately.reports) and self._lately.seconds > LIVE_SECONDS
        if due:
            told = self._lately.summed()
            logger.info(
                "%s: push %d of %d, loss %.4f, %.1f pushes/s, %.1f MB/s, staleness %s",
                self._what, self._units - left, self._units, *told.values(),
            )  # fmt: skip
        return due

    def record(self) -> dict[str, float | str]:
        """Since the last look, for the log."""
        return self._since_look.summed() if self._since_look.reports else {}


class _Window:
    """Pushes since some moment."""

    def __init__(self, parameters: int) -> None:
        self._parameters = parameters
        self.reports: list[Report] = []
        self._since = time.monotonic()

    def add(self, reports: Sequence[Report]) -> None:
        self.reports += reports

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._since, 1e-9)

    def summed(self) -> dict[str, float | str]:
        """Loss, throughput there and back, and how stale how many pushes were; the window begins anew."""
        ages = [report.staleness for report in self.reports if Verdict.APPLIED.name in report.verdicts]
        told: dict[str, float | str] = {
            "objective": _mean([report.loss for report in self.reports if math.isfinite(report.loss)]),
            "pushes_per_second": len(self.reports) / self.seconds,
            "megabytes_per_second": sum(r.sent + 4 * self._parameters for r in self.reports) / self.seconds / 1e6,
            "staleness": " ".join(f"{age}:{100 * ages.count(age) / len(ages):.0f}%" for age in sorted(set(ages))),
        }
        self.reports, self._since = [], time.monotonic()
        return told


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _check_steps(model: nn.Module, rule: Rule, name: str) -> None:
    """Refuses an optimiser that cannot step on gradients alone, by trying it on a copy."""
    trial = copy.deepcopy(model)
    try:
        optimizer = rule(trial)
        if isinstance(optimizer, BlockDiagonal) and any(each.of_calls for each in optimizer.coverage):
            raise ValueError("its blocks are of the calls of modules, which a server does not see")
        train_mode(optimizer)
        for parameter in trial.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:  # an optimiser may refuse in any way it likes
        raise ValueError(
            f"{name}: the optimiser cannot step on gradients alone, as a parameter server has it to ({error}): take "
            "another, such as averaged_sgd, SGD or AdamW"
        ) from error
