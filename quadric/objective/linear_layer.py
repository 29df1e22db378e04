"""A layer of a model as two linear maps at a point, J and J', behind autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Maybe = Tensor | None


class Layer(ABC):
    """A function of several tensors, linearised at a point.

    ``outputs`` are its values there. `push` is the product with its Jacobian, `pull` that with the transpose; None
    stands for zero. The function that `pull` computes is linear, and its derivative is `push`: no other is given.
    """

    outputs: tuple[Tensor, ...]

    @abstractmethod
    def push(self, tangents: Sequence[Maybe]) -> tuple[Tensor, ...]:
        """Tangents of the outputs from those of the inputs, of which one at least is given."""

    @abstractmethod
    def pull(self, cotangents: Sequence[Maybe], needed: Sequence[bool]) -> tuple[Maybe, ...]:
        """Cotangents of the inputs that are ``needed``, from those of the outputs, of which one at least is given."""


class _Pull(Function):
    """J'u as a function of u, whose derivative is v -> J v."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, needed: Sequence[bool], *cotangents: Maybe) -> Any:
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        return layer.pull(cotangents, needed)

    @staticmethod
    def backward(ctx: Any, *tangents: Maybe) -> Any:
        if all(tangent is None for tangent in tangents):
            return (None, None, *[None] * (len(ctx.needs_input_grad) - 2))
        pushed = ctx.layer.push(tangents)
        return (None, None, *(t if n else None for t, n in zip(pushed, ctx.needs_input_grad[2:], strict=True)))


class _Apply(Function):
    """The layer's outputs as a function of its inputs, whose derivative is `_Pull`."""

    @staticmethod
    def forward(ctx: Any, make: Callable[..., Layer], *inputs: Maybe) -> Any:
        layer = make(*(None if x is None else x.detach() for x in inputs))
        # Given away, not kept: they will know this node, which knows the layer, and no collector sees that circle.
        outputs, layer.outputs = layer.outputs, ()
        ctx.layer = layer
        # They live with the layer; saved as well, they are seen by whoever weighs what autograd keeps.
        ctx.save_for_backward(*(kept for kept in vars(layer).values() if isinstance(kept, Tensor)))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Maybe) -> Any:
        if all(cotangent is None for cotangent in cotangents):
            return (None, *[None] * (len(ctx.needs_input_grad) - 1))
        return (None, *_Pull.apply(ctx.layer, ctx.needs_input_grad[1:], *cotangents))


def low_precision(*tensors: Maybe) -> tuple[Maybe, ...]:
    """As autocast would have cast them."""
    some = next(tensor for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(some.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(some.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def applied(make: Callable[..., Layer], *inputs: Maybe) -> Any:
    """The outputs of ``make(*inputs)``, differentiated by its `Layer.pull` and `Layer.push`."""
    with torch.autocast(next(x for x in inputs if x is not None).device.type, enabled=False):
        return _Apply.apply(make, *inputs)
