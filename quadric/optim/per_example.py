"""Gradients of single examples, in factors, from the calls of a layer's module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadric.optim.blocks import Call
from quadric.optim.convolution import Patches, chunks
from quadric.optim.layers import Layer


def passes(layer: Layer, calls: Sequence[Call], remedy: str) -> list[list[Call]]:
    """The calls of each backward pass, which are of the same examples.

    Calls of a packed sequence are filled up with zeros to all of its examples.

    Raises:
        ValueError: they are not; ``remedy`` says what to do.
    """
    found = [[call for call in calls if call.number == number] for number in dict.fromkeys(c.number for c in calls)]
    for own in found:
        if len({call.packed for call in own}) == 1 and own[0].packed is not None:
            own[:] = [_filled(call, max(len(other.inputs) for other in own)) for call in own]
        sizes = [len(call.inputs) for call in own]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"{layer.name} is called with {sizes} examples in one pass, whose positions belong to no example of "
                f"all: {remedy}"
            )
    return found


def _filled(call: Call, size: int) -> Call:
    a, g = (functional.pad(x, (0, 0) * (x.dim() - 1) + (0, size - len(x))) for x in (call.inputs, call.cotangent))
    return replace(call, inputs=a, cotangent=g, filled=size - len(call.inputs))


def factors_of_examples(
    layer: Layer, calls: Sequence[Call], dtype: torch.dtype, wide: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """A few examples at a time: what the gradient of each is made of.

    With inputs ``a [n, R, entries]``, of which the last is 1 where the layer's bias is added, and cotangents
    ``g [n, R, outputs]`` at R positions, it is sum_r g_r a_r', ``[outputs, entries]``, of an example's part of the
    mean loss. Entries are those of the weight; of kernels, in the order of `Patches`.

    Args:
        layer: whose calls these are.
        calls: of one or several passes.
        dtype: of the numbers that are made.
        wide: gradients will be laid out whole, and there are fewer examples at a time.
    """
    entries, outputs = layer.weight[0].numel() + 1, len(layer.weight)
    patches = Patches(layer.module) if isinstance(layer.module, nn.Conv1d | nn.Conv2d) else None
    for own in passes(layer, calls, "choose blocks of the batch's gradient, per_example=False"):
        positions = sum(call.cotangent[0].numel() for call in own) // outputs
        numbers = positions * (2 * entries + outputs) + (outputs * entries if wide else positions * positions)
        for some in chunks(len(own[0].inputs), numbers):
            pairs = [_rows(patches, call.inputs[some], call.cotangent[some], dtype) for call in own]
            a, g = (torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*pairs, strict=True))
            if layer.bias is not None:
                ones = [x.new_full((*x.shape[:2], 1), call.biased) for call, (x, _) in zip(own, pairs, strict=True)]
                a = torch.cat([a, torch.cat(ones, 1)], 2)
            yield a, g


def _rows(patches: Patches | None, inputs: Tensor, cotangent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[n, R, entries]`` and ``[n, R, outputs]`` of one call."""
    if patches is not None:
        return patches.rows(inputs, dtype), cotangent.flatten(2).mT.to(dtype)
    inputs, cotangent = (x.unsqueeze(1).flatten(1, -2).to(dtype) for x in (inputs, cotangent))
    return inputs, cotangent
