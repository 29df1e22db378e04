"""A model cut into parts of about the same size, each for a shard of a parameter server."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from quadric.options import check_whole

Layers = dict[str, nn.Module]


def partition(model: nn.Module, shards: int) -> list[nn.Module]:
    """Parts of ``model`` that follow one another in its parameter vector and share its parameters, names included.

    Layers stay whole, as optimisers that look at them need it, and so do layers that share a parameter with all those
    between them. Layers without a trainable parameter are in no part.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
    >>> [[name for name, _ in part.named_parameters()] for part in partition(model, 2)]
    [['0.weight', '0.bias'], ['2.weight', '2.bias', '3.weight', '3.bias']]

    Raises:
        ValueError: ``shards`` is not positive, or larger than the number of such layers; there is none.
    """
    check_whole(shards=shards)
    layers = _joined(list(_layers(model)))
    if not layers:
        raise ValueError(f"model={type(model).__name__} has no trainable parameter: nothing to deal out")
    if not 1 <= shards <= len(layers):
        raise ValueError(
            f"shards={shards}: the model has {len(layers)} layers to deal out; give a number from 1 to {len(layers)}"
        )
    sizes = [sum(p.numel() for p in _trainable(layer.values())) for layer in layers]
    total, before = sum(sizes), 0
    parts: list[Layers] = []
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        middle = int(shards * (before + size / 2) / total)
        # No part is skipped, and none is left without a layer at the end.
        place = min(max(middle, shards - (len(layers) - number)), len(parts), shards - 1)
        if place == len(parts):
            parts.append({})
        parts[place].update(layer)
        before += size
    return [_module(part) for part in parts]


def hollow(part: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters and buffers are zeros that take no memory, here or on their way; ties stay.

    For who has the numbers from elsewhere, as a `Shard` from its checkpoint.
    """
    zeros: dict[int, Tensor] = {}
    for tensor in chain(part.parameters(), part.buffers()):
        zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        parameter = isinstance(tensor, nn.Parameter)
        zeros[id(tensor)] = nn.Parameter(zero, tensor.requires_grad) if parameter else zero
    return copy.deepcopy(part, dict(zeros))


def _module(layers: Layers) -> nn.Module:
    """A module with these layers under the names that they have in the model."""
    if "" in layers:
        return layers[""]
    root = nn.Module()
    for path, layer in layers.items():
        *above, name = path.split(".")
        holder = root
        for step in above:
            if not hasattr(holder, step):
                holder.add_module(step, nn.Module())
            holder = holder.get_submodule(step)
        holder.add_module(name, layer)
    return root


def _layers(module: nn.Module, prefix: str = "") -> Iterator[Layers]:
    """The smallest modules that hold parameters of their own, with all inside them, in the order of the parameters.

    Each by its name in the model.
    """
    if any(True for _ in module.parameters(recurse=False)):
        if _trainable([module]):
            yield {prefix: module}
        return
    for name, child in module.named_children():
        yield from _layers(child, f"{prefix}.{name}" if prefix else name)


def _joined(layers: list[Layers]) -> list[Layers]:
    """With those that share a parameter, and all between them, made one."""
    last = {id(p): number for number, layer in enumerate(layers) for p in _trainable(layer.values())}
    joined: list[Layers] = []
    until = -1
    for number, layer in enumerate(layers):
        if number <= until:
            joined[-1].update(layer)
        else:
            joined.append(dict(layer))
        until = max(until, *(last[id(p)] for p in _trainable(layer.values())))
    return joined


def _trainable(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Those that have entries."""
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad and p.numel()]
