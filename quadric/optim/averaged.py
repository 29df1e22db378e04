"""Averaged stochastic gradient descent, and the point at which an optimiser that averages is judged.

The average of the iterates (Polyak and Juditsky, 1992) reaches in one pass over the data what the iterates need many
for, if the rate falls slowly enough (Xu, 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, Optimizer

from quadric.optim.checks import check_rates
from quadric.options import check_whole

_CHUNK = 2**18
"""Entries that are moved and added up at a time on a CPU: few enough to stay in its cache in between."""


class AveragedSGD(Optimizer):
    """SGD by a slowly falling rate, and the mean of its iterates; see `averaged_sgd`.

    The state of a parameter is ``step``, the number of its steps; and from the first that counts on, ``sum``, the sum
    of its iterates in float64, and ``averaged``, the number of them. In float32 a mean stalls: of iterates that differ
    by 1e-3, one in 1e5 moves it by less than it can be rounded to.

    Each group has ``eta0`` besides its options: the ``lr`` it began with, which schedulers of ``lr`` leave as it is.

    Args:
        params, lr, a, power, start, every, weight_decay: as of `averaged_sgd`; each but the first may differ by group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        a: float = 1e-3,
        power: float = 0.75,
        start: int = 0,
        every: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "a": a, "power": power, "start": start, "every": every, "weight_decay": weight_decay}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        check_rates(**{name: options[name] for name in ("lr", "a", "power", "weight_decay")})
        check_whole(start=options["start"], every=options["every"])
        if options["start"] < 0 or options["every"] < 1:
            raise ValueError(
                f"start={options['start']}, every={options['every']}: averaging begins after 0 steps or more and takes "
                "every first one or every later one"
            )
        super().add_param_group({"eta0": float(options["lr"]), **param_group})
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise ValueError("params holds complex numbers: train their real view, torch.view_as_real")

    def average_after(self, start: int) -> None:
        """Sets the ``start`` of all groups, as where the length of a run is known after the optimiser is made."""
        for group in self.param_groups:
            group["start"] = start

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure does.

        A parameter without a gradient is passed over: neither is it moved, nor do its steps count.

        Raises:
            ValueError: a gradient is sparse. No parameter has been moved.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        present = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for p in (p for params in present for p in params):
            if p.grad.is_sparse:
                raise ValueError(
                    f"the gradient of a parameter of shape {tuple(p.shape)} is sparse: an average moves all entries in "
                    "every step; make the layer with sparse=False"
                )
        for group, params in zip(self.param_groups, present, strict=True):
            by_step: dict[int, list[nn.Parameter]] = {}
            for p in params:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                by_step.setdefault(state["step"], []).append(p)
            for step, alike in by_step.items():
                self._move(group, step, alike)
        return value

    def _move(self, group: dict[str, Any], step: int, params: Sequence[nn.Parameter]) -> None:
        """Step number ``step``, from 1, of these parameters, and of their sums."""
        rate = _rate(group, step)
        kept = 1 - group["weight_decay"] * rate
        averages = step > group["start"] and (step - group["start"]) % group["every"] == 0
        vectors: list[list[Tensor]] = [[p, p.grad] for p in params]  # type: ignore[list-item]
        if averages:
            for p, row in zip(params, vectors, strict=True):
                state = self.state[p]
                if "sum" not in state:
                    state["sum"] = torch.zeros_like(p, dtype=torch.float64)
                state["averaged"] = state.get("averaged", 0) + 1
                row.append(state["sum"])
        for thetas, gradients, *sums in _chunks(vectors):
            if kept != 1:
                torch._foreach_mul_(thetas, kept)
            torch._foreach_add_(thetas, gradients, alpha=-rate)
            if averages:
                torch._foreach_add_(sums[0], thetas)

    def rate(self, group: dict[str, Any]) -> float:
        """By which the next gradients of the group will be multiplied, where all its parameters have moved as often."""
        return _rate(group, max(self.state.get(p, {}).get("step", 0) for p in group["params"]) + 1)

    def average(self, parameter: nn.Parameter) -> Tensor:
        """Of a parameter, in float64; itself before averaging begins."""
        state = self.state.get(parameter, {})
        return state["sum"] / state["averaged"] if "sum" in state else parameter.detach().double()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's, but sums stay in float64: torch would round them to the parameters' type.

        Raises:
            ValueError: it is the state of another kind of optimiser.
        """
        if any("eta0" not in group for group in state_dict["param_groups"]):
            raise ValueError("state_dict is of another kind of optimiser: give the state_dict() of an averaged_sgd")
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params, strict=True):
            if "sum" in state_dict["state"].get(place, {}):
                self.state[p]["sum"] = state_dict["state"][place]["sum"].detach().to(p.device, copy=True)


def _rate(group: dict[str, Any], step: int) -> float:
    """Of step number ``step``, from 1."""
    return float(group["lr"]) * (1 + group["a"] * group["eta0"] * step) ** -float(group["power"])


def _chunks(vectors: Sequence[Sequence[Tensor]]) -> Iterator[tuple[list[Tensor], ...]]:
    """Rows of tensors alike in shape, as lists of some or of their parts: the first of each row, the second, and so on.

    On a CPU there are about `_CHUNK` entries in a list, so that what is read of a parameter for one operation is still
    in the cache for the next; each entry then goes through memory once.
    """
    rows, entries = list[Sequence[Tensor]](), 0
    for row in vectors:
        size = row[0].numel() if row[0].device.type == "cpu" else 0
        if size > _CHUNK and all(x.is_contiguous() for x in row):
            for parts in zip(*(x.view(-1).split(_CHUNK) for x in row), strict=True):
                yield tuple([part] for part in parts)
            continue
        rows.append(row)
        entries += size
        if entries >= _CHUNK:
            yield tuple(map(list, zip(*rows, strict=True)))
            rows, entries = [], 0
    if rows:
        yield tuple(map(list, zip(*rows, strict=True)))


def averaged_sgd(
    params: Iterable[Any],
    *,
    lr: float,
    a: float = 1e-3,
    power: float = 0.75,
    start: int = 0,
    every: int = 1,
    weight_decay: float = 0.0,
) -> AveragedSGD:
    """SGD whose result is the average of its iterates, for one pass over the data (Xu, 2011; You and Xu, 2014).

    In step t = 1, 2, ..., by the gradient g, theta is the iterate and abar the result::

        eta   = lr (1 + a eta0 t)^-power
        theta = (1 - weight_decay eta) theta - eta g
        abar  = abar + (theta - abar) / max(1, t - start)

    where eta0 is the first ``lr``. The parameters hold theta; within `at_average` they hold abar.

    Args:
        params: the model's parameters.
        lr: eta0; `quadric.optim.rate.search_rate` finds one. Schedulers may move it.
        a: how soon the rate falls: to a fraction 2^-power of itself after 1 / (a eta0) steps. In theory the smallest
            eigenvalue of the curvature; where there is L2, its weight (Bottou's SGD 2.0).
        power: c; 3/4 in general, 2/3 for quadratic losses.
        start: steps before averaging begins.
        every: abar is of every so many iterates, those after ``start + every``, ``start + 2 every``, ... steps:
            neighbours are much alike, and those left out cost nothing.
        weight_decay: the weight of L2.

    Raises:
        ValueError: an option is out of its range.

    >>> parameter = nn.Parameter(torch.tensor([3.0]))
    >>> optimizer = averaged_sgd([parameter], lr=1.0, a=0.0)
    >>> for gradient in (1.0, -1.0):
    ...     parameter.grad = torch.tensor([gradient])
    ...     optimizer.step()
    >>> parameter.tolist()
    [3.0]
    >>> with at_average(optimizer):
    ...     parameter.tolist()
    [2.5]
    """
    return AveragedSGD(params, lr=lr, a=a, power=power, start=start, every=every, weight_decay=weight_decay)


@contextmanager
def at_average(optimizer: Optimizer) -> Iterator[None]:
    """A context in which the parameters hold what the optimiser is to be judged by.

    That is the average of `AveragedSGD` and of ``torch.optim.ASGD``, and the point of evaluation of an optimiser that
    has methods ``train`` and ``eval`` to go to and fro (schedule-free ones; Defazio et al., 2024). For all others, and
    before averaging begins, it is where they are. Afterwards they are again what they were, to the bit.

    Running statistics, as of batch normalisation, stay those of the iterates: see ``torch.optim.swa_utils.update_bn``.
    """
    if not (_switches(optimizer) or isinstance(optimizer, AveragedSGD | ASGD)):
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    trains = _switches(optimizer) and optimizer.param_groups[0].get("train_mode", True)
    try:
        if trains:
            optimizer.eval()  # type: ignore[attr-defined]
        elif not _switches(optimizer):
            _copy(params, [_average(optimizer, p) for p in params])
        yield
    finally:
        if trains:
            optimizer.train()  # type: ignore[attr-defined]
        _copy(params, before)


def train_mode(optimizer: Optimizer) -> None:
    """Has an optimiser with methods ``train`` and ``eval`` go to where it trains; of another, nothing."""
    if _switches(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def _switches(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _average(optimizer: Optimizer, p: nn.Parameter) -> Tensor:
    if isinstance(optimizer, AveragedSGD):
        return optimizer.average(p)
    return optimizer.state.get(p, {}).get("ax", p.detach())


@torch.no_grad()
def _copy(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
