"""Jobs for several ranks that train, and the same for one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quadric.comm.communicator import Communicator, Solo
from quadric.data.batch import Batch
from quadric.data.stream import FrameStream
from quadric.loss.loss import CrossEntropy
from quadric.objective.anchor import Anchor
from quadric.objective.objective import Objective
from quadric.optim.precondition import LBFGS
from quadric.optim.second_order import hessian_free, natural_gradient, nghf
from quadric.space import ParameterSpace
from reference.ranks import die

CLASSES = 5
METHODS = {
    "hessian_free": lambda params: hessian_free(params, damping=10.0, max_steps=5),
    "L-BFGS": lambda params: hessian_free(params, damping=10.0, max_steps=5, preconditioner=LBFGS()),
    "natural_gradient": natural_gradient,
    "nghf": nghf,
}


def network(dropout: float = 0.0, seed: int = 3, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(2), nn.Linear(8, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, CLASSES))


def speech(chunk: int | None = 10, **options: Any) -> FrameStream:
    """Twelve utterances of 9 to 75 frames whose classes can be learnt, with noise."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, 8))
    targets = {f"u{n:02}": rng.integers(CLASSES, size=9 + 6 * n) for n in range(12)}
    features = {id: (centres[t] + rng.standard_normal((len(t), 8))).astype(np.float32) for id, t in targets.items()}
    return FrameStream(features, targets, context=(0, 0), chunk=chunk, micro_frames=60, seed=1, **options)


def parameters(model: nn.Module) -> bytes:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes()


def train(
    communicator: Communicator = Solo(),
    method: str = "hessian_free",
    frames: int = 300,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    steps: int = 10,
) -> tuple[list[float], bytes]:
    """The value before each step and the parameters after the last."""
    model = network(dropout).to(dtype)
    stream = speech(shard=(communicator.rank, communicator.size))
    optimizer = METHODS[method](model.parameters())
    values = []
    for step in range(steps):
        gradient, curvature = (
            [batch._replace(inputs=batch.inputs.to(dtype)) for batch in batches]
            for batches in (stream.draw(frames), stream.sample(frames // 2 + 1, step))
        )
        objective = Objective(model, CrossEntropy(), gradient, curvature, seed=100 * step, communicator=communicator)
        values.append(float(optimizer.step(objective)))
    return values, parameters(model)


def trainings(communicator: Communicator, *runs: dict[str, Any]) -> list[tuple[list[float], bytes]]:
    return [train(communicator, **run) for run in runs]


def counts(communicator: Communicator) -> tuple[int, int, int]:
    """The size of the parameters, and what a gradient and three products send, in bytes."""
    model, batches = network(), speech(shard=(communicator.rank, communicator.size)).draw(300)
    objective = Objective(model, CrossEntropy(), batches, communicator=communicator)
    theta = objective.space.point()
    operator = objective.curvature(theta)
    start = communicator.bytes_sent
    objective.value_and_grad(theta)
    middle = communicator.bytes_sent
    for _ in range(3):
        operator @ theta
    return theta.nbytes, middle - start, communicator.bytes_sent - middle


class Deadly(CrossEntropy):
    """The curvature of its ``last`` product with a micro-batch is never seen."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def curvature(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        known = super().curvature(output, target)

        def product(v: Tensor) -> Tensor:
            self.last -= 1
            if not self.last:
                die()
            return known(v)

        return product


def dies_within_a_product(communicator: Communicator) -> tuple[str, bool, bool]:
    """Rank 1 does, in the second of two steps; of the others what they are told, and whether anything had changed."""
    model = network()
    stream = speech(shard=(communicator.rank, communicator.size))
    optimizer = METHODS["hessian_free"](model.parameters())
    for step in range(2):
        loss = Deadly(4) if step == 1 == communicator.rank else CrossEntropy()
        gradient = stream.draw(300)
        if step == 1:
            before, state = parameters(model), copy.deepcopy(optimizer.state_dict())
        try:
            optimizer.step(Objective(model, loss, gradient, gradient[:2], communicator=communicator))
        except RuntimeError as error:
            assert step == 1
            return str(error), parameters(model) == before, _same(optimizer.state_dict(), state)
    raise AssertionError("the step of a dead rank came to an end")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def builds(communicator: Communicator, kinds: list[dict[str, int]], batches: list[Batch]) -> None:
    """An objective of another network on each rank."""
    Objective(network(**kinds[communicator.rank]), CrossEntropy(), batches, communicator=communicator)


Everything = tuple[float, float, bytes, float, list[Tensor | None], bytes]


def everything(
    communicator: Communicator,
    shares: list[list[Batch]],
    curvature: list[list[Batch]],
    dropout: float = 0.0,
    anchors: tuple[float, ...] = (),
) -> Everything:
    """All that an objective says of its data; rank r holds the r-th share of each set, and an anchor of that weight."""
    model = network(dropout).double()
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    share, small = ([b._replace(inputs=b.inputs.double()) for b in s[communicator.rank]] for s in (shares, curvature))
    at = torch.sin(torch.arange(ParameterSpace(model).size, dtype=torch.float64))
    anchor = Anchor(at, anchors[communicator.rank]) if anchors else None
    objective = Objective(model, CrossEntropy(), share, small, seed=7, anchor=anchor, communicator=communicator)
    theta = objective.space.point()
    value, gradient = objective.value_and_grad(theta)
    product = objective.curvature(theta) @ torch.cos(torch.arange(len(theta), dtype=torch.float64))
    closed = float(objective())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return value, objective.value(theta), gradient.numpy().tobytes(), closed, grads, product.numpy().tobytes()
