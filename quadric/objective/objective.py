"""An objective: the mean loss of a model on data and what holds its parameters, its gradient and its curvature.

Only an objective sees data. Solvers and optimisers see numbers and vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from quadric.comm.communicator import Communicator, Solo, Timed
from quadric.linalg.vector import dot
from quadric.loss.loss import Loss
from quadric.objective.anchor import Anchor
from quadric.objective.curvature import Curvature, CurvatureOperator, Linearisation, RecordedGradient
from quadric.objective.layers import linearisable, twice_differentiable
from quadric.objective.memory import free, retained
from quadric.objective.noise import GradientNoise
from quadric.objective.sharing import uses_per_frame
from quadric.space import ParameterSpace
from quadric.stopwatch import Clock, Stopwatch

MicroBatch = Sequence[Any]
"""``(inputs, target, ...)``: a tensor the model is called with, its target, and what more there is."""


class Data(Enum):
    """Which of an objective's two sets of data."""

    GRADIENT = "gradient"
    CURVATURE = "curvature"


class Objective:
    """The mean loss per frame of ``model`` on micro-batches of data, and an `Anchor` where there is one.

    It is also a torch closure, so that ``optimizer.step(objective)`` is the one call for every optimiser, first-order
    or second-order.

    Random layers (dropout) draw the same numbers whenever the same micro-batch is seen: within one objective the
    value, the gradient and every curvature product are of one and the same function. Running statistics (of batch
    normalisation) move with the gradient alone, once per step.

    On several ranks each holds micro-batches of its own, or none, and the means are over the frames of all. Building an
    objective, its value, its gradient and each curvature product are then for all ranks to do together, and give the
    same on all of them to the bit. Normalisation over a batch remains one over the rank's own micro-batch.

    Args:
        model: called with a micro-batch's inputs.
        loss: a `Loss`: sums over frames.
        gradient: micro-batches ``(inputs, target)`` of the value and the gradient, a list or any other sequence; read
            many times, one at a time.
        curvature: micro-batches of the curvature; default: those of the gradient.
        autocast: the type in which matrix products are computed, for example ``torch.bfloat16``; None: as they are.
            Vectors, sums and the loss stay in the parameters' type.
        seed: of the random layers, which draw other numbers on each rank.
        anchor: a term beside the mean loss that holds the parameters near a point; None: there is none.
        memory: bytes that a call of `curvatures` may retain of its micro-batches; what goes beyond is recorded anew in
            every product, at about three times the price. None: half of what is free then.
        communicator: of the ranks that hold the data.
        clock: such as ``time.perf_counter``, to know where the time goes; None: it is not known.

    Attributes:
        frames, curvature_frames: the weight of the two sets, on all ranks together.
        stopwatch: the seconds so far of ``gradient``, ``products`` (and what is recorded for them), ``evaluation``,
            ``preconditioner`` and ``communication``.

    Raises:
        ValueError: no micro-batch, or none with a frame that counts, on any rank; models that are not the same on all.
        RuntimeError: here and in every method: another rank died or fell silent. The model is as it was.
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
        anchor: Anchor | None = None,
        memory: int | None = None,
        communicator: Communicator = Solo(),
        clock: Clock | None = None,
    ) -> None:
        self.model, self.loss = model, loss
        self.space = ParameterSpace(model)
        self.stopwatch = Stopwatch(clock)
        self.communicator = communicator if communicator.size == 1 else Timed(communicator, self.stopwatch)
        self.seed, self.memory = seed, memory
        self._gradient = gradient
        self._curvature = gradient if curvature is None else curvature
        self._autocast = autocast
        self.gradient_noise = math.nan
        """The standard error of the last gradient over its norm, told by its micro-batches; NaN where there is one."""
        self.anchor = anchor
        if anchor is not None:
            anchor.check(self.space)
        if communicator.size > 1:
            held = f", anchor of {anchor.fingerprint()}" if anchor else ""
            communicator.agree("the model", self.space.fingerprint() + held)
        self.frames, self.curvature_frames = self._weigh(gradient=self._gradient, curvature=self._curvature)

    def value(self, theta: Float[Tensor, " n"], data: Data = Data.GRADIENT) -> float:
        """The mean loss at ``theta``, on the gradient's data or the curvature's, and what the anchor adds."""
        on_gradient = data is Data.GRADIENT
        parameters = self.space.views(theta)
        total = self._zero()
        with torch.no_grad(), self.stopwatch.on("evaluation"):
            for inputs, target, seed in self._stream(self._gradient if on_gradient else self._curvature):
                total += self.loss(self._output(inputs, seed, parameters), target)
            self.communicator.sum_(total)
            mean = float(total) / (self.frames if on_gradient else self.curvature_frames)
            return mean + (self.anchor.value(theta) if self.anchor else 0.0)

    def value_and_grad(self, theta: Float[Tensor, " n"]) -> tuple[float, Float[Tensor, " n"]]:
        """The value and its gradient at ``theta``; `gradient_noise` is then known."""
        with self.stopwatch.on("gradient"):
            return self._value_and_grad(theta)

    def _value_and_grad(self, theta: Float[Tensor, " n"]) -> tuple[float, Float[Tensor, " n"]]:
        total, gradient = self._zero(), torch.zeros_like(theta)
        leaves, noise = self._leaves(theta), GradientNoise(theta)
        for inputs, target, seed in self._stream(self._gradient):
            value = self.loss(self._output(inputs, seed, leaves, moving=True), target)
            one = self.space.flatten(torch.autograd.grad(value, tuple(leaves.values()), materialize_grads=True))
            noise.add(one, float(self.loss.weight(target)))
            gradient += one
            total += value.detach()
        self.communicator.sum_(total, gradient)
        value, gradient = float(total) / self.frames, gradient.div_(self.frames)
        error = noise.error(gradient, self.communicator)
        if self.anchor:
            value += self.anchor.value(theta)
            gradient += self.anchor.gradient(theta)
        norm = math.sqrt(dot(gradient, gradient))
        self.gradient_noise = error / norm if norm > 0 else math.nan
        return value, gradient

    def curvature(self, theta: Float[Tensor, " n"], kind: Curvature = Curvature.GAUSS_NEWTON) -> CurvatureOperator:
        """The curvature at ``theta`` on the curvature's data, recorded once for every product.

        Raises:
            NotImplementedError: the loss has no such curvature.
        """
        return self.curvatures(theta, (kind,))[0]

    def curvatures(self, theta: Float[Tensor, " n"], kinds: Sequence[Curvature]) -> list[CurvatureOperator]:
        """Several at once: those that are made of the model's Jacobian share one record of it, and one budget.

        Raises:
            NotImplementedError: the loss has no such curvature.
            ValueError: a kind is no `Curvature`, or the loss's curvature is not symmetric.
        """
        for kind in kinds:
            if not isinstance(kind, Curvature):
                raise ValueError(f"kind={kind!r}: give a Curvature, such as Curvature.GAUSS_NEWTON")
        leaves, scale = self._leaves(theta), math.sqrt(dot(theta, theta))
        with self.stopwatch.on("products"):
            batches = [partial(self._record, kinds, leaves, place) for place in range(len(self._curvature))]
            budget = free(self.space.device, self.communicator.size) // 2 if self.memory is None else self.memory
            recorded = retained(batches, budget)
        return [
            CurvatureOperator(
                self.space,
                [partial(_of_kind, kind, record) for record in recorded],
                self.curvature_frames,
                scale,
                self.communicator,
                self.stopwatch,
                self.anchor.weight if self.anchor else 0.0,
            )
            for kind in kinds
        ]

    def fisher_diagonal(self, theta: Float[Tensor, " n"], draws: int = 4) -> Float[Tensor, " n"]:
        """An unbiased estimate of the diagonal of the empirical Fisher matrix, on the curvature's data.

        With a random sign s_f for every frame f, the square of sum_f J_f' (s_f u_f) has the sum of the squares of the
        J_f' u_f as its expectation (Martens, Sutskever and Swersky, 2012, use such signs for the Hessian's): one
        reverse pass per draw, and none per frame. The u_f are those of the loss's ``fisher``; where they are of whole
        utterances, so are the signs.

        Args:
            theta: the point.
            draws: of signs; the deviation is about sqrt(2 / draws) of each entry for one micro-batch, less for more.
        """
        with self.stopwatch.on("preconditioner"):
            return self._fisher_diagonal(theta, draws)

    def _fisher_diagonal(self, theta: Float[Tensor, " n"], draws: int) -> Float[Tensor, " n"]:
        total, leaves = torch.zeros_like(theta), self._leaves(theta)
        parameters = tuple(leaves.values())
        for inputs, target, seed in self._stream(self._curvature):
            with torch.enable_grad():
                output = self._output(inputs, seed, leaves)
            u = self.loss.fisher_factor(output.detach(), target)
            one_each = u.sum(self.loss.fisher_dims, keepdim=True).shape
            generator = torch.Generator(u.device).manual_seed(seed)
            for _ in range(draws):
                sign = torch.randint(2, one_each, generator=generator, device=u.device) * 2 - 1
                pulled = torch.autograd.grad(output, parameters, u * sign, retain_graph=True, materialize_grads=True)
                total += self.space.flatten(pulled).square_()
        self.communicator.sum_(total)
        total /= draws * self.curvature_frames
        return total + self.anchor.weight if self.anchor else total

    def shared_counts(self, theta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """How often each parameter is used for one frame, measured on the first micro-batch (see `sharing`).

        On several ranks it is the mean over those that have one.
        """
        counts = torch.zeros(len(self.space.names) + 1, dtype=torch.float64, device=theta.device)
        for inputs, _, seed in self._stream(self._curvature[:1]):
            forward = partial(self._output, inputs, seed)
            found = uses_per_frame(forward, self._leaves(theta))
            counts = counts.new_tensor([*(found[name] for name in self.space.names), 1.0])
        self.communicator.sum_(counts)
        means = (counts[:-1] / counts[-1]).tolist()
        views = self.space.views(theta).values()
        return self.space.flatten(torch.full_like(view, mean) for view, mean in zip(views, means, strict=True))

    def _record(self, kinds: Sequence[Curvature], leaves: Mapping[str, Tensor], place: int) -> Recorded:
        """What the curvatures need of one micro-batch."""
        inputs, target, seed = self._at(self._curvature, place)
        parameters, recorded = tuple(leaves.values()), Recorded()
        if Curvature.HESSIAN in kinds:
            with torch.enable_grad(), twice_differentiable():
                value = self.loss(self._output(inputs, seed, leaves), target)
                gradient = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
            recorded[Curvature.HESSIAN] = RecordedGradient(parameters, gradient)
        of_jacobian = [kind for kind in kinds if kind is not Curvature.HESSIAN]
        if of_jacobian:
            with torch.enable_grad(), linearisable():
                output = self._output(inputs, seed, leaves)
                products = [self._output_curvature(kind, output.detach(), target, seed) for kind in of_jacobian]
                linearised = Linearisation.of(parameters, output, products[0])
            for kind, product in zip(of_jacobian, products, strict=True):
                if place == 0:
                    _check_symmetric(kind, product, output.detach(), self.loss)
                recorded[kind] = replace(linearised, output_curvature=product)
        return recorded

    def _output_curvature(self, kind: Curvature, at: Tensor, target: Any, seed: int) -> Callable[[Tensor], Tensor]:
        if kind is Curvature.GAUSS_NEWTON:
            return self.loss.curvature(at, target)
        if kind is Curvature.FISHER:
            target = self.loss.sample(at, target, torch.Generator(at.device).manual_seed(seed))
        return self.loss.fisher(at, target)

    def __call__(self) -> Tensor:
        """The torch closure: clears the gradients, sets them to those of the objective, returns its value."""
        mean = self._backward()
        if self.anchor is None:
            return mean
        theta = self.space.point()
        for parameter, pull in zip(self.space.parameters, self.space.split(self.anchor.gradient(theta)), strict=True):
            parameter.grad = pull if parameter.grad is None else parameter.grad + pull
        return mean + self.anchor.value(theta)

    def batches(self, data: Data) -> int:
        """The number of micro-batches of this rank."""
        return len(self._gradient if data is Data.GRADIENT else self._curvature)

    def sampled(self, draw: int = 0) -> Tensor:
        """Sets the gradients to those of the mean loss at targets drawn from the model, returns that mean loss.

        Their outer product is, in expectation, the Fisher matrix divided by `frames`. Random layers draw the numbers of
        the other calls, running statistics stay where they are, the anchor is left out. Each ``draw`` has its targets.

        Raises:
            NotImplementedError: the loss is no distribution of targets.
        """
        return self._backward(draw)

    def _backward(self, draw: int | None = None) -> Tensor:
        """The gradients of the mean loss without the anchor, at drawn targets if there is a draw."""
        for parameter in self.space.parameters:
            parameter.grad = None
        total = self._zero()
        for value in self.passes(Data.GRADIENT, draw):
            total += value
        self._sum_gradients(total)
        return total / self.frames

    def passes(self, data: Data, draw: int | None = None) -> Iterator[Tensor]:
        """Forward and reverse passes of the model where it stands, one for each micro-batch of this rank.

        Gradients of the mean loss over the frames of all ranks are added to the parameters'. For those who listen to
        the model's modules.

        Args:
            data: whose micro-batches.
            draw: of targets from the model, as in `sampled`; None: the targets are those of the data.

        Yields:
            the loss of the micro-batch, a sum over its frames.
        """
        on_gradient = data is Data.GRADIENT
        frames = self.frames if on_gradient else self.curvature_frames
        at = None if draw is None else dict(zip(self.space.names, self.space.parameters, strict=True))
        for inputs, target, seed in self._stream(self._gradient if on_gradient else self._curvature):
            with torch.enable_grad():
                output = self._output(inputs, seed, at)
                if draw is not None:
                    target = self.loss.sample(output.detach(), target, _generator(output.device, seed, draw))
                value = self.loss(output, target)
                (value / frames).backward()
            yield value.detach()

    def _sum_gradients(self, total: Tensor) -> None:
        """Sums the parameters' gradients and ``total`` over the ranks; what no rank has a gradient of keeps none."""
        if self.communicator.size == 1:
            return
        parameters = self.space.parameters
        ranks = torch.tensor([p.grad is not None for p in parameters], dtype=total.dtype, device=total.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.communicator.sum_(total, ranks, *gradients)
        for parameter, gradient, holders in zip(parameters, gradients, ranks.tolist(), strict=True):
            parameter.grad = gradient if holders else None

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.space.device)

    def _leaves(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: view.detach().requires_grad_() for name, view in self.space.views(theta).items()}

    def _output(
        self, inputs: Tensor, seed: int, parameters: Mapping[str, Tensor] | None = None, *, moving: bool = False
    ) -> Tensor:
        """The model's output, at ``parameters`` or where the model stands.

        At ``parameters``, its running statistics move only if ``moving``.
        """
        device = self.space.device
        low_precision = torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None)
        with _random_numbers(seed, device), low_precision:
            if parameters is None:
                output = self.model(inputs)
            else:
                state = dict(parameters)
                if not moving:
                    state |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
                output = functional_call(self.model, state, (inputs,))
        return output.to(self.space.dtype)

    def _stream(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Any, int]]:
        return (self._at(batches, place) for place in range(len(batches)))

    def _at(self, batches: Sequence[MicroBatch], place: int) -> tuple[Tensor, Any, int]:
        """The inputs and the target of a micro-batch, on the model's device, and the seed of its random layers."""
        (inputs, target, *_), device, ranks = batches[place], self.space.device, self.communicator
        target = target.to(device) if isinstance(target, Tensor) else target
        return inputs.to(device), target, self.seed + place * ranks.size + ranks.rank

    def _weigh(self, **sets: Sequence[MicroBatch]) -> list[float]:
        """The frames of all ranks in each set of micro-batches."""
        if not isinstance(self.loss, Loss):
            raise ValueError(f"loss={self.loss}: sums over frames are wanted, such as quadric.loss.loss.CrossEntropy()")
        for name, batches in sets.items():
            if not isinstance(batches, Sequence):
                raise ValueError(
                    f"{name}={batches!r} is read many times, each time the same: give a list of micro-batches, such as "
                    "[(inputs, target)], and not what shuffles or ends"
                )
            if any(isinstance(batch, Tensor) for batch in batches):
                raise ValueError(f"{name} holds tensors: give a list of micro-batches, such as [(inputs, target)]")
        by_identity = {id(batches): batches for batches in sets.values()}
        own = {
            known: sum(float(self.loss.weight(target)) for _, target, *_ in batches)
            for known, batches in by_identity.items()
        }
        weights = [own[id(batches)] for batches in sets.values()]
        frames = torch.tensor(weights, dtype=torch.float64, device=self.space.device)
        self.communicator.sum_(frames)
        for (name, batches), weight in zip(sets.items(), frames.tolist(), strict=True):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} weighs {weight} frames by loss={self.loss}: weights must not be negative")
            if not weight:
                others = ", nor has any other rank" if self.communicator.size > 1 else ""
                raise ValueError(
                    f"{name} holds {len(batches)} micro-batches and no frame that counts{others}: give it data"
                )
        return frames.tolist()


Recorded = dict[Curvature, Linearisation | RecordedGradient]
"""What was recorded of a micro-batch, by the curvature it is for."""


def _check_symmetric(kind: Curvature, product: Callable[[Tensor], Tensor], like: Tensor, loss: Loss) -> None:
    """u'Hv = v'Hu for two random directions in output space: what the solvers take for granted.

    A loss that declares its curvature not to be symmetric is taken at its word.
    """
    if kind is Curvature.GAUSS_NEWTON and not loss.symmetric:
        return
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(like.shape, generator=generator).to(like) for _ in range(2))
    Hu, Hv = product(u), product(v)
    left, right = float((u * Hv).sum(dtype=torch.float64)), float((v * Hu).sum(dtype=torch.float64))
    size = float(Hu.norm()) * float(v.norm())
    if abs(left - right) > 1e-3 * size:
        raise ValueError(
            f"loss={loss}: its {kind.name} curvature is not symmetric (u'Hv = {left:g}, v'Hu = {right:g}): give it the "
            "symmetric part, (H + H')/2, or the solvers solve another system"
        )


def _of_kind(kind: Curvature, record: Callable[[], Recorded]) -> Linearisation | RecordedGradient:
    return record()[kind]


def _generator(device: torch.device, seed: int, draw: int) -> torch.Generator:
    """Of the numbers of one draw; torch reads 32 bits of a seed, in which neighbours must not meet."""
    mixed = np.random.SeedSequence((seed % 2**64, draw)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))


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
