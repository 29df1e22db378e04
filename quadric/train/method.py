"""The ways to train that a job may compare: frozen records of an optimiser's options and of its samples."""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler

from quadric.comm.communicator import Communicator, Solo
from quadric.data.examples import Stream
from quadric.loss.loss import Loss
from quadric.objective.curvature import Curvature
from quadric.optim.averaged import train_mode
from quadric.optim.damping import AfterRejection
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner, SharedCounts
from quadric.optim.sampling import FixedSizes, GeometricSizes, Sampler, VarianceTested
from quadric.optim.search import BestIterate, Candidates
from quadric.optim.second_order import SecondOrder, hessian_free, natural_gradient, nghf
from quadric.train.rules import (
    AT_LEAST_ONE,
    NONE_OR_NOT_NEGATIVE,
    NONE_OR_POSITIVE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    check,
    one_of,
)
from quadric.train.stages import reading, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method(ABC):
    """A way to train: an optimiser and how much data it sees.

    Attributes:
        epochs: passes over the training data.
        gradient_frames: frames an update's gradient sees, and the rest of the last window or utterance of them: 1 is
            one of these an update.
        patience: looks at the held-out data in a row without a lower loss after which the training ends early; None:
            it never does.
    """

    epochs: float = 8.0
    gradient_frames: int = 2048
    patience: int | None = None

    def __post_init__(self) -> None:
        check(self, epochs=POSITIVE, gradient_frames=POSITIVE, patience=NONE_OR_POSITIVE)

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the training, in lines, folders and reports."""

    @abstractmethod
    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        """The optimiser of ``model``, which the ranks of ``communicator`` train together."""

    def search(
        self,
        model: nn.Module,
        loss: Loss,
        stream: Stream,
        *,
        autocast: bool = False,
        delay: int = 0,
        communicator: Communicator = Solo(),
    ) -> dict[str, float]:
        """The options that are left to be found from the data; by default none is.

        ``delay`` is how many updates old a gradient will be when it is applied. ``model`` is where training will start,
        ``stream`` what it will see, on several ranks each its own shard. Both stay as they are. See `settled`.
        """
        return {}

    @property
    def sampler(self) -> Sampler:
        """How much data each update sees."""
        return FixedSizes(self.gradient_frames)

    def schedule(self, optimizer: Optimizer, updates: int) -> LRScheduler:
        """How the learning rate goes over the run: by default it stays."""
        return ConstantLR(optimizer, factor=1.0)


@dataclass(frozen=True)
class FirstOrder(Method):
    """Training by any optimiser of torch on minibatches, with a warm-up and a cosine decay of its rate.

    An update is ``optimizer.step(objective)``: one that evaluates its closure several times, such as LBFGS, does so on
    one minibatch. The training has the name of the optimiser's class, in lower case.

    Attributes:
        epochs, gradient_frames, patience: as in `Method`; ``gradient_frames`` is the minibatch.
        optimizer: a class such as ``torch.optim.AdamW`` or ``torch.optim.SGD``.
        lr: the highest learning rate.
        weight_decay: as the optimiser means it; None: its own default.
        arguments: whatever else it takes by name, such as ``{"momentum": 0.9}`` of SGD.
        warmup: the share of the updates over which the rate rises from zero.
        floor: the rate at the end, as a share of ``lr``.
    """

    optimizer: type[Optimizer] = torch.optim.AdamW
    lr: float = 1e-3
    weight_decay: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    warmup: float = 0.05
    floor: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, lr=POSITIVE, weight_decay=NONE_OR_NOT_NEGATIVE, warmup=SHARE, floor=SHARE)
        if self.optimizer is not torch.optim.AdamW or self.arguments:  # the first optimiser takes torch seconds to make
            self._try()

    @property
    def name(self) -> str:
        return self.optimizer.__name__.lower()

    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        decay: dict[str, Any] = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return self.optimizer(model.parameters(), lr=self.lr, **decay, **self.arguments)  # type: ignore[call-arg]

    def _try(self) -> None:
        """Refuses what the optimiser cannot be made with, and one that cannot train, by a step of a small layer."""
        weight, bias = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,)))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight.sum(0) + bias - 1).square().sum()
            loss.backward()
            return loss

        try:
            optimizer = self.build(nn.ParameterList([weight, bias]))
            train_mode(optimizer)
            optimizer.step(closure)  # type: ignore[arg-type]
        except Exception as error:  # an optimiser may refuse in any way it likes
            decay = "" if self.weight_decay is None else f", weight_decay={self.weight_decay}"
            raise ValueError(
                f"optimizer={self.optimizer.__name__}: cannot train with lr={self.lr}{decay}, "
                f"arguments={self.arguments} ({error}): change these, or name another optimiser before them"
            ) from error

    def schedule(self, optimizer: Optimizer, updates: int) -> LRScheduler:
        return warm_cosine(optimizer, updates, self.warmup, self.floor)


def warm_cosine(optimizer: Optimizer, updates: int, warmup: float, floor: float) -> LRScheduler:
    """Rates that rise from zero over a share of the updates, and fall by a cosine to a share of what they were."""
    rising = max(1, round(warmup * updates))

    def factor(update: int) -> float:
        if update < rising:
            return (update + 1) / rising
        done = min(1.0, (update - rising) / max(1, updates - rising))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


Preconditioning = Literal["none", "lbfgs", "flexible_lbfgs", "diagonal", "shared_counts"]

_PRECONDITIONERS: dict[Preconditioning, Preconditioner | None] = {
    "none": None,
    "lbfgs": LBFGS(),
    "flexible_lbfgs": LBFGS(changes=True),
    "diagonal": FisherDiagonal(),
    "shared_counts": SharedCounts(),
}


Sampling = Literal["fixed", "geometric", "variance"]


@dataclass(frozen=True)
class SecondOrderMethod(Method):
    """Training on large samples, one for the gradient and one for the curvature.

    Attributes:
        epochs, patience: as in `Method`.
        gradient_frames, curvature_frames: of the two samples, in the first step where they grow. The curvature's is
            drawn anew for every step from the whole set.
        sampling: ``"fixed"``; ``"geometric"`` multiplies both in every step (Sainath et al., 2013); ``"variance"`` lets
            the gradient's grow where its own variance asks for it (Byrd et al., 2012), the curvature's in proportion.
        gradient_growth, curvature_growth: the factors of ``"geometric"``.
        curvature_most: frames of the curvature's sample at most, where it grows geometrically.
        preconditioner: of the conjugate gradients: by the pairs of the previous step's (``"lbfgs"``), by their own as
            well (``"flexible_lbfgs"``), by the Fisher matrix's diagonal, or by the number of times a frame uses each
            parameter (``"shared_counts"``).
    """

    epochs: float = 8.0
    gradient_frames: int = 200_000
    curvature_frames: int = 20_000
    sampling: Sampling = "fixed"
    gradient_growth: float = 1.2
    curvature_growth: float = 1.3
    curvature_most: int | None = None
    preconditioner: Preconditioning = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, curvature_frames=POSITIVE, gradient_growth=AT_LEAST_ONE, curvature_growth=AT_LEAST_ONE)
        check(self, curvature_most=NONE_OR_POSITIVE, sampling=one_of(Sampling), preconditioner=one_of(Preconditioning))

    @property
    def sampler(self) -> Sampler:
        gradient, curvature = self.gradient_frames, self.curvature_frames
        if self.sampling == "geometric":
            growth = (self.gradient_growth, self.curvature_growth)
            return GeometricSizes(gradient, curvature, *growth, most=self.curvature_most)
        if self.sampling == "variance":
            return VarianceTested(gradient, share=min(1.0, curvature / gradient))
        return FixedSizes(gradient, curvature)


@dataclass(frozen=True)
class HessianFree(SecondOrderMethod):
    """Training by Hessian-free steps on large batches (Martens, 2010).

    Attributes:
        epochs, patience, gradient_frames, curvature_frames, sampling, gradient_growth, curvature_growth,
            curvature_most, preconditioner: as in `SecondOrderMethod`.
        damping: the first lambda; it adapts.
        max_steps: conjugate-gradient iterations a step at most.
        tolerance: of the relative progress that ends them.
        momentum: the share of the previous solution they start from.
    """

    damping: float = 1.0
    max_steps: int = 50
    tolerance: float = 5e-4
    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, damping=POSITIVE, max_steps=POSITIVE, tolerance=NOT_NEGATIVE, momentum=SHARE)

    @property
    def name(self) -> str:
        return "hessian_free"

    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        return hessian_free(
            model.parameters(),
            damping=self.damping,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            momentum=self.momentum,
            preconditioner=_PRECONDITIONERS[self.preconditioner],
        )


Metric = Literal["empirical_fisher", "fisher", "gauss_newton"]

_METRICS: dict[Metric, Curvature] = {
    "empirical_fisher": Curvature.EMPIRICAL_FISHER,
    "fisher": Curvature.FISHER,
    "gauss_newton": Curvature.GAUSS_NEWTON,
}


@dataclass(frozen=True)
class NaturalGradient(SecondOrderMethod):
    """Training by natural-gradient steps on large batches (Haider, Woodland 2017).

    The choice among the iterates is made on the curvature's sample as well.

    Attributes:
        epochs, patience, gradient_frames, curvature_frames, sampling, gradient_growth, curvature_growth,
            curvature_most, preconditioner: as in `SecondOrderMethod`.
        iterations: of conjugate gradients.
        metric: the Fisher matrix: ``"empirical_fisher"``, the papers'; ``"fisher"``, at targets drawn from the model;
            ``"gauss_newton"``, its expectation for the losses that are log likelihoods.
        damping: the lambda at rest, a share of the curvature along the gradient; there is more after a step that fails.
        candidates: the iterates that are evaluated: ``"all"``, as in the papers, or from the last ``"backwards"`` until
            the loss rises, for a quarter of the evaluations where the last is best.
    """

    iterations: int = 8
    metric: Metric = "empirical_fisher"
    damping: float = 0.0
    candidates: Candidates = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, iterations=POSITIVE, damping=NOT_NEGATIVE, metric=one_of(Metric), candidates=one_of(Candidates))

    @property
    def name(self) -> str:
        return "natural_gradient"

    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        return self._by(natural_gradient, model.parameters())

    def _by(self, method: Callable[..., SecondOrder], params: Iterable[nn.Parameter]) -> SecondOrder:
        return method(
            params,
            iterations=self.iterations,
            metric=_METRICS[self.metric],
            damping=AfterRejection(initial=self.damping),
            search=BestIterate(candidates=self.candidates),
            preconditioner=_PRECONDITIONERS[self.preconditioner],
        )


@dataclass(frozen=True)
class NGHF(NaturalGradient):
    """Training by natural gradient and Hessian-free combined (Haider et al., 2021): two runs of ``iterations`` each.

    Attributes:
        epochs, patience, gradient_frames, curvature_frames, sampling, gradient_growth, curvature_growth,
            curvature_most, preconditioner, iterations, metric, candidates: as in `NaturalGradient`; the candidates are
            those of run 2.
        damping: the lambda at rest of both runs, a share of either curvature; 0 is the paper's.
    """

    damping: float = 0.01

    @property
    def name(self) -> str:
        return "nghf"

    def build(self, model: nn.Module, communicator: Communicator = Solo()) -> Optimizer:
        return self._by(nghf, model.parameters())


def settled(
    method: Method,
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    folder: Path,
    *,
    autocast: bool = False,
    delay: int = 0,
    communicator: Communicator = Solo(),
) -> Method:
    """The method with the options it leaves to be found from the data, which the training's folder remembers.

    Raises:
        ValueError: the folder is damaged, or nothing was found.
    """
    file = folder / "found.json"
    if file.exists():
        with reading(folder):
            found = dict(json.loads(file.read_text())["options"])
    else:
        start = time.monotonic()
        found = method.search(model, loss, stream, autocast=autocast, delay=delay, communicator=communicator)
        if found:
            record = {"options": found, "seconds": time.monotonic() - start}
            communicator.first("keeping what was found", partial(write_json, file, record))
            told = ", ".join(f"{name} {value:g}" for name, value in found.items())
            logger.info("%s: found %s in %.1f s", method.name, told, record["seconds"])
    communicator.agree("what was found from the data", found)
    return replace(method, **found) if found else method


TRAININGS = ("first_order", "block_diagonal", "averaged", "hessian_free", "natural_gradient", "nghf")
"""The options of a job that are a `Method` each, or None."""


def compared(job: object) -> dict[str, Method]:
    """The trainings of a job that are not left out, by their names.

    Raises:
        ValueError: all are.
    """
    methods = [method for option in TRAININGS if (method := getattr(job, option)) is not None]
    if not methods:
        raise ValueError(f"{', '.join(TRAININGS)} are all none: leave one in at least")
    return {method.name: method for method in methods}
