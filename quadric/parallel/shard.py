"""A shard of a parameter server: a part of the parameters, the rule that moves them, the record of what was applied.

It knows nothing of processes: `quadric.parallel.parameter_server` makes an actor of it. With delayed gradients g_i,
each computed at the parameters of some clock before (asynchronous SGD; You and Xu, 2014, with an average)::

    on receipt of g_i:   t <- t + 1;   theta <- theta - eta_t g_i;   abar <- abar + mu_t (theta - abar)

where the step and the average are those of a torch optimiser, and t its own count.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.comm import checkpoint
from quadric.comm.communicator import Solo
from quadric.comm.message import Message
from quadric.optim.averaged import AveragedSGD, at_average, train_mode
from quadric.options import check_whole
from quadric.parallel.exchange import NO_UNIT, Answer, Push, Vector, Verdict
from quadric.space import ParameterSpace

Rule = Callable[[nn.Module], Optimizer]
"""From the part of a model whose gradients it will be given: it sees no calls and no data."""


@dataclass(frozen=True)
class Bounds:
    """What a shard accepts, and how.

    Attributes:
        staleness: pushes computed at older parameters are refused, and computed again; None: none are.
        scaled: divide the step by the staleness, where that is more than one (Zhang et al., 2016).
        not_finite: a worker that has sent more pushes that are not finite is dropped.
    """

    staleness: int | None = None
    scaled: bool = False
    not_finite: int = 10

    def __post_init__(self) -> None:
        check_whole(not_finite=self.not_finite)
        if self.staleness is not None:
            check_whole(staleness=self.staleness)
        for name, value in {"staleness": self.staleness, "not_finite": self.not_finite}.items():
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: must not be negative")


def begin(part: nn.Module, folder: Path, *, units: int = 0) -> bool:
    """Makes the checkpoint that a shard of ``part`` begins with, unless there is one; whether there was none.

    Args:
        part: its parameters are where training starts.
        folder: of the checkpoint.
        units: of data that the whole training has: a push is of one of them, or of none.

    Raises:
        ValueError: there is one, of another number of parameters or units, or another type; the parameters are neither
            float32 nor float64.
    """
    space = ParameterSpace(part)
    if space.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"part has parameters of {space.dtype}: a shard holds torch.float32 or torch.float64")
    try:
        _load(folder, space, units)
    except FileNotFoundError:
        nothing: dict[str, Any] = {"optimizer": None, "scheduler": None, "clock": 0, "life": 0}
        counts: dict[str, Any] = {"last": [], "bad": {}, "verdicts": {}, "staleness": {}}
        applied = torch.zeros(units, dtype=torch.bool)
        checkpoint.save({"theta": space.point().cpu(), "applied": applied, **nothing, **counts}, folder, Solo())
        return True
    return False


def _load(folder: Path, space: ParameterSpace, units: int | None = None) -> dict[str, Any]:
    """The checkpoint, if it is one of such parameters, and of so many units where that is known."""
    state = checkpoint.load(folder, Solo())
    theta, applied = state["theta"], len(state["applied"])
    units = applied if units is None else units
    if (len(theta), theta.dtype, applied) != (space.size, space.dtype, units):
        raise ValueError(
            f"folder={folder}: its checkpoint has {len(theta)} parameters of {theta.dtype} and {applied} units, and "
            f"not {space.size} of {space.dtype} and {units}: it is of another training; choose another folder"
        )
    return state


class Shard:
    """Applies pushes one after the other, each once.

    It goes on from the checkpoint in its folder; `begin` makes the first.

    Args:
        part: whose parameters are the shard's, in the order of its parameter vector. They are moved into one vector,
            and take the values of the checkpoint, so that they may be `hollow` before.
        rule: makes the optimiser.
        schedule: of its learning rate, stepped with each push that is applied.
        folder: of the checkpoint.
        bounds: what is accepted.

    Attributes:
        clock: pushes applied.
        life: how often the shard has been started.
        applied: [units], which are done with: applied, or refused as not finite.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another training.
    """

    def __init__(
        self,
        part: nn.Module,
        rule: Rule,
        *,
        folder: Path,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        bounds: Bounds = Bounds(),
    ) -> None:
        space = ParameterSpace(part)
        self._space, self._folder, self._bounds = space, folder, bounds
        state = _load(folder, space)
        self._theta: Tensor = state["theta"]
        self._gradient = torch.zeros_like(self._theta)
        for parameter, view in zip(space.parameters, space.split(self._theta), strict=True):
            parameter.data = view
        self._optimizer = rule(part)
        self._scheduler = schedule(self._optimizer) if schedule else None
        self._restore(state)
        train_mode(self._optimizer)

    @property
    def size(self) -> int:
        """Parameters."""
        return self._space.size

    def pull(self) -> Answer:
        """The parameters as they are, in the shard's own memory: what is to stay must be copied."""
        return Answer(None, 0, self.life, self.clock, self._rate(), self._theta.numpy())

    def push(self, push: Push) -> Answer:
        """Applies a push, or says why not; and the parameters as they are then.

        Raises:
            ValueError: it has another size or type than the shard, or is of a unit that there is not. It is as if it
                had not come.
        """
        self._check(push)
        # A life before has seen clocks that were turned back: what came after its checkpoint is here no more.
        staleness = self.clock - (push.clock if push.life == self.life else min(push.clock, self._born))
        verdict = self._refused(push, staleness) or self._taken(push, staleness)
        self._verdicts[verdict.name] += 1
        return self.pull()._replace(verdict=verdict, staleness=staleness)

    def average(self) -> Vector:
        """What the rule is to be judged by: the average, where it keeps one."""
        with at_average(self._optimizer):
            return self._theta.numpy().copy()

    def counts(self) -> dict[str, Any]:
        """How many pushes met which verdict, how stale those were that were applied, and the last incarnation."""
        verdicts = {verdict.name.lower(): self._verdicts[verdict.name] for verdict in Verdict}
        incarnation = max((incarnation for incarnation, _ in self._last.values()), default=0)
        known = {"clock": self.clock, "life": self.life, "incarnation": incarnation}
        return {**known, "staleness": dict(self._staleness), **verdicts}

    def save(self) -> int:
        """Makes the state the checkpoint in the folder; returns its clock."""
        last = [[worker, *place] for worker, place in self._last.items()]
        state = {
            "theta": self._theta,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
            "clock": self.clock,
            "life": self.life,
            "applied": self.applied,
            "last": last,
            "bad": dict(self._bad),
            "verdicts": dict(self._verdicts),
            "staleness": dict(self._staleness),
        }
        checkpoint.save(state, self._folder, Solo())
        return self.clock

    def _restore(self, state: dict[str, Any]) -> None:
        if state["optimizer"] is not None:
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scheduler is not None:
                self._scheduler.load_state_dict(state["scheduler"])
        self.clock, self.life, self.applied = state["clock"], state["life"] + 1, state["applied"]
        self._born = self.clock
        self._last = {worker: (incarnation, sequence) for worker, incarnation, sequence in state["last"]}
        self._bad, self._verdicts = Counter(state["bad"]), Counter(state["verdicts"])
        self._staleness = Counter(state["staleness"])
        self.save()  # lives are told apart by those before any push

    def _check(self, push: Push) -> None:
        if not NO_UNIT <= push.unit < len(self.applied):
            raise ValueError(f"unit={push.unit}: there are {len(self.applied)}; give one of them, or {NO_UNIT}")
        content, mine = push.content, self._theta.numpy()
        if isinstance(content, Message):
            if content.length != self.size:
                raise ValueError(f"content is of {content.length} numbers: this shard takes {self.size}")
        elif content is not None:
            found = (getattr(content, "dtype", type(content)), getattr(content, "shape", ()))
            if not isinstance(content, np.ndarray) or found != (mine.dtype, mine.shape):
                raise ValueError(f"content is {found[0]} {found[1]}: give an array of {mine.dtype} {mine.shape}")

    def _refused(self, push: Push, staleness: int) -> Verdict | None:
        """Why the content of a push is not even looked at, if it is not."""
        incarnation, sequence = self._last.get(push.worker, (0, -1))
        if push.incarnation < incarnation:
            return Verdict.SUPERSEDED
        if push.incarnation > incarnation:
            del self._bad[push.worker]  # a new process begins with a clean record
        if push.incarnation == incarnation and push.sequence <= sequence:
            return Verdict.REPEATED
        if self._bad[push.worker] > self._bounds.not_finite:
            return Verdict.DROPPED
        if push.unit != NO_UNIT and self.applied[push.unit]:
            return Verdict.DUPLICATE
        if self._bounds.staleness is not None and staleness > self._bounds.staleness:
            return Verdict.STALE
        return None

    def _taken(self, push: Push, staleness: int) -> Verdict:
        """What became of a push that was not refused; its sender and its unit are remembered."""
        gradient = self._received(push.content)
        if gradient is not None and math.isfinite(float(torch.linalg.vector_norm(gradient))):
            verdict = Verdict.APPLIED
            self._step(gradient, staleness)
            self._staleness[staleness] += 1
        else:
            verdict = Verdict.NOT_FINITE
            self._bad[push.worker] += 1
        self._last[push.worker] = (push.incarnation, push.sequence)
        if push.unit != NO_UNIT:
            self.applied[push.unit] = True
        return verdict

    def _received(self, content: Vector | Message | None) -> Tensor | None:
        """The gradient that was sent, in memory that the optimiser may write to where it might."""
        if isinstance(content, Message):
            content.add_to(self._gradient.zero_())
        elif content is None:
            return None
        elif isinstance(self._optimizer, AveragedSGD):  # it only reads
            return _tensor(content)
        else:
            self._gradient.copy_(_tensor(content))
        return self._gradient

    def _step(self, gradient: Tensor, staleness: int) -> None:
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if self._bounds.scaled and staleness > 1:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate / staleness
        for parameter, view in zip(self._space.parameters, self._space.split(gradient), strict=True):
            parameter.grad = view
        self._optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for parameter in self._space.parameters:
            parameter.grad = None
        if self._scheduler is not None:
            self._scheduler.step()
        self.clock += 1

    def _rate(self) -> float | None:
        """Of a plain step, where the rule takes no other."""
        groups = self._optimizer.param_groups
        if isinstance(self._optimizer, AveragedSGD):
            rates = {self._optimizer.rate(group) for group in groups}
        elif type(self._optimizer) is SGD and not any(group["momentum"] or group["maximize"] for group in groups):
            rates = {float(group["lr"]) for group in groups}
        else:
            return None
        return rates.pop() if len(rates) == 1 else None


def _tensor(content: Vector) -> Tensor:
    """Of the same memory, which may be read-only: torch warns of it, and it is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(content)
