"""The training loop: one for every optimiser, resumable to the bit.

An update is ``optimizer.step(objective)``. What differs between optimisers is how much data an update sees: the
`Sampler` of its `Plan` says it.

Several ranks train one model: each has its share of every update's data and of the held-out data, and all else is the
same on all of them to the bit.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.comm import checkpoint as together
from quadric.comm.communicator import Communicator, Solo
from quadric.data.examples import Stream
from quadric.loss.loss import Loss
from quadric.objective.objective import Objective
from quadric.optim.averaged import at_average, train_mode
from quadric.optim.sampling import Seen, Sizes
from quadric.optim.second_order import SecondOrder
from quadric.progress import Progress, silent
from quadric.stopwatch import Clock
from quadric.train import checkpoint
from quadric.train.metrics import MetricsLog
from quadric.train.plan import Plan
from quadric.train.stages import reading

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
"""A crash loses at most this much work, or one update where that takes longer."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""How Python writes where in memory an object without a description is: elsewhere on each rank."""


class Interrupted(Exception):
    """Training was asked to stop and has saved its state; the same command goes on from there."""


class Diverged(RuntimeError):
    """The loss is no longer finite: going on would only waste time."""


def evaluate(
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    *,
    autocast: bool = False,
    communicator: Communicator = Solo(),
) -> dict[str, float]:
    """Mean loss per frame and, where the loss knows what is right, its share.

    Each rank takes some of the minibatches; the scores are those of all, the same to the bit on all ranks.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = weight = right = possible = 0.0
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            for inputs, target, _ in stream.everything((communicator.rank, communicator.size)):
                target = target.to(device) if isinstance(target, Tensor) else target
                output = model(inputs.to(device)).float()
                total += float(loss(output, target))
                weight += float(loss.weight(target))
                if (judged := loss.correct(output, target)) is not None:
                    right, possible = right + judged[0], possible + judged[1]
    finally:
        model.train(was_training)
    sums = torch.tensor([total, weight, right, possible], dtype=torch.float64, device=device)
    communicator.sum_(sums)
    total, weight, right, possible = sums.tolist()
    scores = {"loss": total / weight}
    return scores | {"accuracy": right / possible} if possible else scores


class Trainer:
    """Trains a model in a folder, and goes on where it stopped.

    The folder holds ``state`` (a checkpoint of `quadric.comm.checkpoint` with everything needed to go on), ``model.pt``
    (the parameters with the lowest held-out loss so far, and when they were reached) and ``metrics.jsonl``.
    An optimiser that averages is judged at its average, which is then what ``model.pt`` holds.

    Of several ranks, the first alone writes the last two and logs. A request to stop, on any rank, stops all of them
    after the same update. A state may be gone on from with another number of ranks. Then sums are rounded in another
    way, dropout and augmentation draw other numbers, and a sampler that looks at the noise of the gradient sees that of
    other minibatches.

    Args:
        model: already where it shall start.
        loss: of its output.
        optimizer: any torch optimiser, or a `SecondOrder`.
        stream: training data.
        held_out: data the training is judged on; None: the last parameters count as the best.
        plan: how much data, how often judged.
        folder: of the files above.
        schedule: from the optimiser and the number of updates to a learning-rate schedule, stepped every update.
        communicator: of the ranks that train together.

    Raises:
        ValueError: ``stream`` has the shard of another rank, or there is patience without held-out data.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        stream: Stream,
        held_out: Stream | None,
        plan: Plan,
        folder: Path,
        *,
        schedule: Callable[[Optimizer, int], LRScheduler] | None = None,
        communicator: Communicator = Solo(),
    ) -> None:
        place = (communicator.rank, communicator.size)
        if stream.shard != place:
            raise ValueError(f"stream has the shard {stream.shard} on the rank {place}: give it shard={place}")
        if plan.patience is not None and held_out is None:
            raise ValueError(f"patience={plan.patience}: there is no held_out to be patient with; give it, or None")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.stream, self.held_out, self.plan, self.folder = stream, held_out, plan, folder
        self.updates = plan.updates(stream)
        self.scheduler = schedule(optimizer, self.updates) if schedule else None
        self.update = 0
        self.drawn = 0
        self._sizes: Sizes | None = None
        self._noise = math.nan
        self.seconds = 0.0
        self.best = math.inf
        self.stale = 0
        self.communicator = communicator
        self._leads = communicator.rank == 0
        self._objectives: list[float] = []
        self._metrics = MetricsLog(folder / "metrics.jsonl")

    def fit(self, *, progress: Progress = silent, what: str = "training") -> Mapping[str, Any]:
        """Trains to the end of the plan, or of its patience, from the saved state if there is one.

        Returns the record of ``model.pt``.

        Raises:
            Diverged: the objective or the held-out loss is not finite.
            Interrupted: on SIGINT or SIGTERM, after the update under way, with everything saved.
            ValueError: the ranks have other plans, data, models, losses or optimisers, or the folder is damaged.
            RuntimeError: another rank died or fell silent.
        """
        if self._leads:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self._load():
            if self._done:
                return self._best()
            self._tell("going on from update %d of %d in %s", self.update, self.updates, self.folder)
        else:
            if self._leads:
                self._metrics.truncate_after(-1)
            self._log(self._judge())
        saved = time.monotonic()
        with stop_requests() as stop:
            for _ in progress(self._remaining(), total=self.updates - self.update, what=what):
                looks = self.plan.looks(self.drawn, self.stream.total_frames)
                record = self._step()
                judged = self.plan.looks(self.drawn, self.stream.total_frames) > looks
                if judged:
                    record |= {"objective": self._mean_objective()} | self._judge() | self._ended_early()
                if judged or isinstance(self.optimizer, SecondOrder):
                    self._log(record)
                stopping, due = self._decide(stop.is_set(), time.monotonic() - saved > CHECKPOINT_SECONDS)
                if stopping or due:
                    self._save()
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted(
                        f"stopped after update {self.update} of {self.updates}, saved in {self.folder}: "
                        "the same command goes on from there"
                    )
        self._save()
        return self._best()

    def at_result(self) -> AbstractContextManager[None]:
        """A context in which the model has the last parameters, averaged where the optimiser averages."""
        return at_average(self.optimizer)

    def _decide(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Whether any rank is to stop, and whether the first finds a checkpoint due; all then have its seconds too."""
        says = [float(stop), float(due), self.seconds] if self._leads else [float(stop), 0.0, 0.0]
        joint = torch.tensor(says, dtype=torch.float64, device=self._device)
        self.communicator.sum_(joint)
        stops, dues, self.seconds = joint.tolist()
        return stops > 0, dues > 0

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _done(self) -> bool:
        return self.plan.done(self.drawn, self.stream.total_frames) or self._out_of_patience

    @property
    def _out_of_patience(self) -> bool:
        return self.plan.patience is not None and self.stale >= self.plan.patience

    def _remaining(self) -> Iterator[int]:
        """The updates to come, each by its number of updates before it."""
        while not self._done:
            yield self.update

    def _best(self) -> Mapping[str, Any]:
        with reading(self.folder):
            return checkpoint.load(self.folder / "model.pt")

    def _step(self) -> dict[str, Any]:
        start, seen = time.monotonic(), self.stream.frames_seen
        self.model.train()
        train_mode(self.optimizer)
        sizes = self.plan.sampler.sizes(Seen(self.update, self.stream.total_frames, self._sizes, self._noise))
        objective = Objective(
            self.model,
            self.loss,
            self.stream.draw(sizes.gradient, self.plan.sampler.parts),
            self.stream.sample(sizes.curvature, key=self.update) if sizes.curvature else None,
            autocast=torch.bfloat16 if self.plan.autocast else None,
            seed=hash((self.plan.seed, self.update)) % 2**31,
            communicator=self.communicator,
            clock=_clock(self._device),
        )
        value: Any = self.optimizer.step(objective)  # type: ignore[arg-type]
        self._join_statistics()
        if self.scheduler is not None:
            self.scheduler.step()
        self.update += 1
        self.drawn += self.stream.frames_seen - seen
        self._sizes, self._noise = sizes, objective.gradient_noise
        self.seconds += time.monotonic() - start
        self._check_finite("objective", float(value))
        self._objectives.append(float(value))
        diagnosis = self.optimizer.diagnosis if isinstance(self.optimizer, SecondOrder) else None
        return dict(diagnosis.record()) if diagnosis else {}

    def _join_statistics(self) -> None:
        """Gives all ranks the mean of their running statistics, as of batch normalisation, and the first's counts."""
        if self.communicator.size > 1:
            buffers = list(self.model.buffers())
            means = [buffer for buffer in buffers if buffer.is_floating_point()]
            self.communicator.sum_(*means)
            for mean in means:
                mean.div_(self.communicator.size)
            for buffer in buffers:
                if not buffer.is_floating_point():
                    self.communicator.broadcast_(buffer)

    def _mean_objective(self) -> float:
        """The mean of the updates' own objectives since it was last asked for."""
        mean = sum(self._objectives) / len(self._objectives)
        self._objectives.clear()
        return mean

    def _judge(self) -> dict[str, float]:
        """Scores on the held-out data at the average, where there is one; it is kept where it is the best so far."""
        with at_average(self.optimizer):
            return self._judge_here()

    def _judge_here(self) -> dict[str, float]:
        if self.held_out is None:
            self._keep({})
            return {}
        scores = evaluate(
            self.model, self.loss, self.held_out, autocast=self.plan.autocast, communicator=self.communicator
        )
        self._check_finite("held-out loss", scores["loss"])
        self.stale += 1
        if scores["loss"] < self.best:
            self.best, self.stale = scores["loss"], 0
            self._keep(scores)
        self._tell("update %d of %d: held-out %s", self.update, self.updates, _listed(scores))
        return {f"dev_{name}": value for name, value in scores.items()}

    def _ended_early(self) -> dict[str, str]:
        """Where this look has ended the patience: that it did, for the log and the report."""
        if not self._out_of_patience or self.plan.done(self.drawn, self.stream.total_frames):
            return {}
        why = f"no lower held-out loss in {self.stale} looks: ended after update {self.update} of {self.updates}"
        self._tell("%s", why)
        return {"ended": why}

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"the {what} is {value} after update {self.update}: training diverged; "
                f"lower the learning rate or raise the damping (the log is in {self.folder})"
            )

    def _keep(self, scores: Mapping[str, float]) -> None:
        state = {"model": self.model.state_dict(), "update": self.update, "seconds": self.seconds, **scores}
        if self._leads:
            checkpoint.save(state, self.folder / "model.pt")

    def _log(self, record: Mapping[str, Any]) -> None:
        place = {"update": self.update, "epoch": self.stream.epoch, "seconds": self.seconds}
        if self._leads:
            self._metrics.append({**place, **record})

    def _tell(self, message: str, *arguments: object) -> None:
        if self._leads:
            logger.info(message, *arguments)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "stream": self.stream.state_dict(),
            "update": self.update,
            "drawn": self.drawn,
            "sizes": tuple(self._sizes) if self._sizes else None,
            "noise": self._noise,
            "seconds": self.seconds,
            "best": self.best,
            "stale": self.stale,
            "objectives": self._objectives,
        }
        together.save(state, self.folder / "state", self.communicator)

    def _load(self) -> bool:
        """Goes to the place of the saved state, if there is one, on all ranks."""
        self._agree()
        try:
            state = together.load(self.folder / "state", self.communicator)
        except FileNotFoundError:
            return False
        except ValueError:
            with reading(self.folder):
                raise
        with reading(self.folder):
            self._take(state)
            if self._leads:
                self._metrics.truncate_after(self.update)
        self.communicator.agree("the place in the training", (self.update, self.drawn))
        return True

    def _agree(self) -> None:
        """Checks what the ranks must have alike: those that sum other things in a step would fail without a reason."""
        held_out = self.held_out and self.held_out.state_dict()
        self.communicator.agree("the training", (self.plan, self.updates, self.stream.state_dict(), held_out))
        for what, described in (
            ("the model's layers", repr(self.model)),
            ("the loss", repr(self.loss)),
            ("the optimiser", _described(self.optimizer)),
        ):
            self.communicator.agree(what, " ".join(_ADDRESS.sub("", described).split()))

    def _take(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.stream.load_state_dict(state["stream"])
        self.update, self.drawn, self._noise = state["update"], state["drawn"], state["noise"]
        self._sizes = Sizes(*state["sizes"]) if state["sizes"] else None
        self.seconds, self.best, self.stale = state["seconds"], state["best"], state["stale"]
        self._objectives = state["objectives"]


def _described(optimizer: Optimizer) -> str:
    """The options of its groups, without the parameters, and the parts that it is made of."""
    groups = [
        # A tensor is written as its number: in full, and without the device.
        {name: o.tolist() if isinstance(o, Tensor) else o for name, o in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    parts: tuple[object, ...] = ()
    if isinstance(optimizer, SecondOrder):
        parts = (optimizer.descent, optimizer.search, optimizer.rule, optimizer.preconditioner)
    return f"{type(optimizer).__qualname__} {groups} {parts}"


def _clock(device: torch.device) -> Clock:
    """Seconds; on an accelerator, those when its work so far was done."""
    if device.type != "cuda":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; a second SIGINT interrupts at once. Main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _frame: Any) -> None:
        logger.warning("stopping after this update; interrupt again to stop at once")
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        stop.set()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
