"""An objective: the mean loss of a model on data, its gradient and its curvature.

Only an objective sees data. Solvers and optimisers see numbers and vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from quadric.loss.loss import Loss
from quadric.objective.curvature import GaussNewton, Linearisation
from quadric.objective.layers import linearisable
from quadric.space import ParameterSpace

MicroBatch = Sequence[Any]
"""``(inputs, target, ...)``: a tensor the model is called with, its target, and what more there is."""


class Objective:
    """The mean loss per frame of ``model`` on micro-batches of data.

    It is also a torch closure, so that ``optimizer.step(objective)`` is the one call for every optimiser, first-order
    or second-order.

    Random layers (dropout) draw the same numbers whenever the same micro-batch is seen: within one objective the
    value, the gradient and every curvature product are of one and the same function.

    Args:
        model: called with a micro-batch's inputs.
        loss: a `Loss`: sums over frames.
        gradient: micro-batches ``(inputs, target)`` of the value and the gradient; read many times.
        curvature: micro-batches of the curvature; default: those of the gradient.
        autocast: the type in which matrix products are computed, for example ``torch.bfloat16``; None: as they are.
            Vectors, sums and the loss stay in the parameters' type.
        seed: of the random layers.

    Raises:
        ValueError: no micro-batch, or none with a frame that counts.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        gradient: Sequence[MicroBatch],
        curvature: Sequence[MicroBatch] | None = None,
        *,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.loss = model, loss
        self.space = ParameterSpace(model)
        self.seed = seed
        self._gradient = gradient
        self._curvature = gradient if curvature is None else curvature
        self._autocast = autocast
        self.frames = self._weigh("gradient", self._gradient)
        self.curvature_frames = self._weigh("curvature", self._curvature)

    def value(self, theta: Float[Tensor, " n"]) -> float:
        """The mean loss at ``theta`` on the gradient's data."""
        parameters = self.space.views(theta)
        total = 0.0
        with torch.no_grad():
            for inputs, target, seed in self._stream(self._gradient):
                total += float(self.loss(self._output(inputs, seed, parameters), target))
        return total / self.frames

    def value_and_grad(self, theta: Float[Tensor, " n"]) -> tuple[float, Float[Tensor, " n"]]:
        """The mean loss and its gradient at ``theta``."""
        total, gradient = 0.0, torch.zeros_like(theta)
        leaves = self._leaves(theta)
        for inputs, target, seed in self._stream(self._gradient):
            value = self.loss(self._output(inputs, seed, leaves), target)
            gradient += self.space.flatten(torch.autograd.grad(value, tuple(leaves.values()), materialize_grads=True))
            total += float(value.detach())
        return total / self.frames, gradient / self.frames

    def gauss_newton(self, theta: Float[Tensor, " n"]) -> GaussNewton:
        """The Gauss-Newton operator at ``theta`` on the curvature's data. It holds the graphs of all its data."""
        leaves = self._leaves(theta)
        linearisations = []
        for inputs, target, seed in self._stream(self._curvature):
            with linearisable():
                output = self._output(inputs, seed, leaves)
            curvature = partial(self.loss.curvature, output.detach(), target)
            linearisations.append(Linearisation.of(tuple(leaves.values()), output, curvature))
        return GaussNewton(self.space, linearisations, self.curvature_frames)

    def __call__(self) -> Tensor:
        """The torch closure: clears the gradients, sets them to those of the mean loss, returns the mean loss."""
        for parameter in self.space.parameters:
            parameter.grad = None
        total = torch.zeros((), dtype=torch.float64, device=self.space.device)
        with torch.enable_grad():
            for inputs, target, seed in self._stream(self._gradient):
                value = self.loss(self._output(inputs, seed), target)
                (value / self.frames).backward()
                total += value.detach()
        return total / self.frames

    def _leaves(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: view.detach().requires_grad_() for name, view in self.space.views(theta).items()}

    def _output(self, inputs: Tensor, seed: int, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The model's output, at ``parameters`` or where the model stands."""
        device = self.space.device
        low_precision = torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None)
        with _random_numbers(seed, device), low_precision:
            if parameters is None:
                output = self.model(inputs)
            else:
                output = functional_call(self.model, dict(parameters), (inputs,))
        return output.to(self.space.dtype)

    def _stream(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Any, int]]:
        device = self.space.device
        for index, (inputs, target, *_) in enumerate(batches):
            yield (
                inputs.to(device),
                target.to(device) if isinstance(target, Tensor) else target,
                self.seed + index,
            )

    def _weigh(self, name: str, batches: Sequence[MicroBatch]) -> float:
        frames = sum(float(self.loss.weight(target)) for _, target, *_ in batches)
        if not frames:
            raise ValueError(f"{name} holds {len(batches)} micro-batches and no frame that counts: give it data")
        return frames


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Random layers inside draw the numbers of ``seed``; the numbers outside go on as if nothing had been drawn."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        for generator in generators:  # not torch.manual_seed, which would reseed every other device as well
            generator.manual_seed(seed)
        yield
