"""Curvature of an objective as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import LinearOperator
from quadric.space import ParameterSpace


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
        cotangent = torch.zeros_like(output, requires_grad=True)
        pullback = torch.autograd.grad(output, parameters, cotangent, create_graph=True, materialize_grads=True)
        return cls(parameters, output, cotangent, pullback, output_curvature)

    def product(self, directions: list[Tensor]) -> list[Tensor]:
        """J' H J v for v given as one tensor per parameter."""
        reached = [(g, v) for g, v in zip(self.pullback, directions, strict=True) if g.requires_grad]
        (tangent,) = torch.autograd.grad(
            [g for g, _ in reached], self.cotangent, [v for _, v in reached], retain_graph=True
        )
        curved = self.output_curvature(tangent)
        return list(
            torch.autograd.grad(self.output, self.parameters, curved, retain_graph=True, materialize_grads=True)
        )


class GaussNewton(LinearOperator):
    """The generalised Gauss-Newton matrix 1/W sum_b J_b' H_b J_b (Schraudolph, 2002), linearised once.

    J_b is the Jacobian of the model's output on micro-batch b, H_b the loss's Hessian in output space, W the number
    of frames. Positive semi-definite when every H_b is.
    """

    symmetric = True

    def __init__(self, space: ParameterSpace, linearisations: Iterable[Linearisation], weight: float) -> None:
        self.size = space.size
        self._space = space
        self._linearisations = list(linearisations)
        self._weight = weight

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        directions = self._space.split(v)
        total = torch.zeros_like(v)
        for linearisation in self._linearisations:
            total += self._space.flatten(linearisation.product(directions))
        return total / self._weight
