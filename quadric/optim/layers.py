"""The layers of a model, as block-diagonal curvature sees them: which parameters make one matrix, and who owns them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn

Gradient = Sequence[Tensor]
"""Of a layer's parameters, in their shapes: of its weight, and then of its bias if it has one."""


class Kind(Enum):
    """What a layer's weight is."""

    MATRIX = "a matrix"
    KERNELS = "kernels"
    TABLE = "a table"
    OTHER = "not known as a linear map"


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight, the bias that is added to what it makes, and the module they are of.

    Attributes:
        name: of the weight, as in ``named_parameters``.
        kind: what the weight is. A `MATRIX` is ``[outputs, inputs]`` once the dimensions after the second, all of size
            one, are dropped; `KERNELS` are ``[outputs, inputs, ...]``, of a transposed convolution
            ``[inputs, outputs, ...]``.
        module: what holds it.
        weight, bias: the parameters.
    """

    name: str
    kind: Kind
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def gradient(self) -> Gradient:
        """That of its parameters; zero for one that has none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]


def find_layers(model: nn.Module, params: Iterable[nn.Parameter]) -> list[Layer]:
    """Each of ``params``, which are of ``model``, in exactly one layer; those without entries in none.

    A tied parameter belongs to the first module that holds it; where its modules are of different kinds, its layer is
    of `Kind.OTHER`.
    """
    layers: list[Layer] = []
    places: dict[int, int] = {}
    wanted = {id(p) for p in params if p.numel()}
    for prefix, module in model.named_modules():
        for layer in _of(module, f"{prefix}." if prefix else "", wanted - places.keys()):
            layers.append(layer)
            places |= {id(p): len(layers) - 1 for p in layer.parameters}
        for layer in _of(module, "", wanted):
            first = layers[places[id(layer.weight)]]
            if first.weight is layer.weight and first.kind is not layer.kind:
                layers[places[id(layer.weight)]] = replace(first, kind=Kind.OTHER)
    return layers


def _of(module: nn.Module, prefix: str, wanted: Collection[int]) -> Iterator[Layer]:
    """The layers that a module itself holds."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) in wanted}

    def take(kind: Kind, weight: str, bias: str | None) -> Iterator[Layer]:
        if weight in own:
            found = own.pop(weight)
            yield Layer(prefix + weight, kind, module, found, None if bias is None else own.pop(bias, None))

    if isinstance(module, nn.Linear):
        yield from take(Kind.MATRIX, "weight", "bias")
    elif isinstance(module, _CONVOLUTIONS):
        kernel = module.weight.shape[2:].numel()
        yield from take(Kind.MATRIX if kernel == 1 and not module.transposed else Kind.KERNELS, "weight", "bias")
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        for name in list(own):
            if name.startswith("weight_"):
                yield from take(Kind.MATRIX, name, "bias_" + name.removeprefix("weight_"))
    elif isinstance(module, nn.MultiheadAttention):
        yield from take(Kind.MATRIX, "in_proj_weight", "in_proj_bias")
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield from take(Kind.MATRIX, name, None)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield from take(Kind.TABLE, "weight", None)
    for name in list(own):
        yield from take(Kind.OTHER, name, None)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@contextmanager
def gradients_kept(params: Iterable[Tensor]) -> Iterator[None]:
    """Inside, parameters have no gradients until they are given some; afterwards they have their own back."""
    held = [(p, p.grad) for p in params]
    for p, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for p, own in held:
            p.grad = own
