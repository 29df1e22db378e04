"""Curvature of an objective as linear operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.comm.communicator import Communicator, Solo
from quadric.linalg.operator import LinearOperator
from quadric.linalg.vector import dot
from quadric.space import ParameterSpace
from quadric.stopwatch import Stopwatch


class Curvature(Enum):
    """Which matrix stands for the curvature of an objective.

    With the Jacobian J of the model's outputs and sums over frames divided by their number:
    """

    GAUSS_NEWTON = "J' H J with the Hessian H of the loss in the outputs (Schraudolph, 2002)"
    FISHER = "J' u u' J with the gradient u of the loss at a target drawn from the model, frame by frame"
    EMPIRICAL_FISHER = "J' u u' J with the gradient u of the loss at the data's target, frame by frame"
    HESSIAN = "the second derivatives of the objective; indefinite"


@dataclass(frozen=True)
class Linearisation:
    """A model's output on one micro-batch, linearised at one point and ready for many products.

    The reverse pass u -> J'u is recorded once with its own graph. It is linear in u, so reverse differentiation of
    it gives v -> J v: two retained passes and no forward pass per product.

    Attributes:
        parameters: the point, as leaves.
        output: z = f(parameters), with its graph.
        cotangent: the u of the recorded reverse pass.
        pullback: J'u, with its graph.
        output_curvature: the loss's v -> H v in output space, at ``output``.
    """

    parameters: tuple[Tensor, ...]
    output: Tensor
    cotangent: Tensor
    pullback: tuple[Tensor, ...]
    output_curvature: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls, parameters: tuple[Tensor, ...], output: Tensor, output_curvature: Callable[[Tensor], Tensor]
    ) -> Linearisation:
        if not output.requires_grad:  # no parameter reaches it
            return cls(parameters, output, output, tuple(map(torch.zeros_like, parameters)), output_curvature)
        cotangent = torch.zeros_like(output, requires_grad=True)
        pullback = torch.autograd.grad(output, parameters, cotangent, create_graph=True, materialize_grads=True)
        return cls(parameters, output, cotangent, pullback, output_curvature)

    def product(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        """J' H J v for v given as one tensor per parameter."""
        reached = [(g, v) for g, v in zip(self.pullback, directions, strict=True) if g.requires_grad]
        if not reached:
            return self.pullback
        (tangent,) = torch.autograd.grad(
            [g for g, _ in reached], self.cotangent, [v for _, v in reached], retain_graph=True
        )
        curved = self.output_curvature(tangent)
        return torch.autograd.grad(self.output, self.parameters, curved, retain_graph=True, materialize_grads=True)


@dataclass(frozen=True)
class RecordedGradient:
    """The gradient of the loss on one micro-batch, recorded with its graph: the Hessian's `Linearisation`."""

    parameters: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]

    def product(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        """The Hessian's product with v given as one tensor per parameter."""
        reached = [(g, v) for g, v in zip(self.gradient, directions, strict=True) if g.requires_grad]
        if not reached:
            return [torch.zeros_like(v) for v in directions]
        outputs, vectors = [g for g, _ in reached], [v for _, v in reached]
        return torch.autograd.grad(outputs, self.parameters, vectors, retain_graph=True, materialize_grads=True)


class CurvatureOperator(LinearOperator):
    """1/W sum_b B_b + c I, the B_b recorded once per micro-batch: the matrices of `Curvature`.

    The sum runs over the micro-batches of all ranks, who take every product together.

    Every product is taken with v' = (||theta|| / ||v||) v and scaled back (Haider et al., 2021, section 4.2): exact,
    and a small v stays above what low precision rounds to zero.

    Args:
        space: of the parameters.
        recorded: for each micro-batch a function that gives what was recorded of it, or records it anew.
        weight: W, the number of frames.
        scale: ||theta||.
        communicator: of the ranks that hold the micro-batches.
        stopwatch: told the time of products.
        shift: c, of an anchor.

    Attributes:
        scale: the length every v is given before a product; 0: v is taken as it is.
    """

    symmetric = True

    def __init__(
        self,
        space: ParameterSpace,
        recorded: Iterable[Callable[[], Linearisation | RecordedGradient]],
        weight: float,
        scale: float,
        communicator: Communicator = Solo(),
        stopwatch: Stopwatch | None = None,
        shift: float = 0.0,
    ) -> None:
        self.size, self.shift = space.size, shift
        self._space = space
        self._recorded = list(recorded)
        self.scale = scale
        self._weight = weight
        self._communicator = communicator
        self._stopwatch = stopwatch or Stopwatch()

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        with self._stopwatch.on("products"):
            return self._product(v)

    def _product(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        norm = math.sqrt(dot(v, v))
        factor = self.scale / norm if 0 < norm < math.inf and 0 < self.scale < math.inf else 1.0
        directions = self._space.split(v * factor)
        total: Tensor | None = None
        for recorded in self._recorded:
            product = self._space.flatten(recorded().product(directions))
            total = product if total is None else total.add_(product)
        total = torch.zeros_like(v) if total is None else total
        self._communicator.sum_(total)
        total.div_(self._weight * factor)
        return total.add_(v, alpha=self.shift) if self.shift else total
