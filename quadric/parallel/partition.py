"""A model cut into parts of about the same size, each for a shard of a parameter server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from quadric.options import check_whole

Layers = dict[str, nn.Module]


def partition(model: nn.Module, shards: int) -> list[nn.ModuleDict]:
    """Parts of ``model`` that follow one another in its parameter vector and share its parameters.

    Layers stay whole, as optimisers that look at them need it, and so do layers that share a parameter with all those
    between them. Layers without a trainable parameter are in no part.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
    >>> [list(part) for part in partition(model, 2)]
    [['0'], ['2', '3']]

    Raises:
        ValueError: ``shards`` is not positive, or larger than the number of such layers.
    """
    check_whole(shards=shards)
    layers = _joined(list(_layers(model)))
    if not 1 <= shards <= len(layers):
        raise ValueError(
            f"shards={shards}: the model has {len(layers)} layers to deal out; give a number from 1 to {len(layers)}"
        )
    sizes = [sum(p.numel() for p in _trainable(layer.values())) for layer in layers]
    total, parts, before = sum(sizes), [nn.ModuleDict() for _ in range(shards)], 0
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        filled = sum(1 for part in parts if part)
        middle = int(shards * (before + size / 2) / total)
        # No part is skipped, and none is left without a layer at the end.
        place = min(max(middle, shards - (len(layers) - number)), filled, shards - 1)
        parts[place].update(layer)
        before += size
    return parts


def _layers(module: nn.Module, prefix: str = "") -> Iterator[Layers]:
    """The smallest modules that hold parameters of their own, with all inside them, in the order of the parameters."""
    if any(True for _ in module.parameters(recurse=False)):
        if _trainable([module]):
            yield {prefix.replace(".", "/") or "model": module}
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
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
