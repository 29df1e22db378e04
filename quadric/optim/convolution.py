"""The patches of a convolution: what each of its outputs is a linear map of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadric.optim.blocks import gram_

_CHUNK = 2**22
"""Numbers that are laid out anew at a time."""


@dataclass(frozen=True)
class Window:
    """A kernel's way over one dimension."""

    size: int
    stride: int
    dilation: int
    before: int
    after: int

    def outputs(self, padded: int) -> int:
        """How many there are over so many inputs."""
        return (padded - self.dilation * (self.size - 1) - 1) // self.stride + 1

    def places(self, k: int, outputs: int) -> slice:
        """Of the inputs that entry ``k`` of the kernel meets."""
        first = k * self.dilation
        return slice(first, first + (outputs - 1) * self.stride + 1, self.stride)


class Patches:
    """The patches of a convolution of one or two dimensions, without groups.

    A patch has the entries ``[height, channels, width]`` of the kernel, in this order. One dimension is a height.
    """

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        windows = []
        for k, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            if module.padding == "same":
                before = dilation * (size - 1) // 2
                after = dilation * (size - 1) - before
            else:
                before = after = 0 if isinstance(module.padding, str) else module.padding[k]
            windows.append(Window(size, stride, dilation, before, after))
        self.height, self.width = windows if len(windows) == 2 else (windows[0], Window(1, 1, 1, 0, 0))
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        self.one_dimension = len(windows) == 1

    def padded(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` of inputs ``[N, C, H]`` or ``[N, C, H, W]``."""
        x = x.unsqueeze(3) if self.one_dimension else x
        sides = (self.width.before, self.width.after, self.height.before, self.height.after)
        return functional.pad(x, sides, self.mode) if any(sides) else x

    def positions(self, x: Tensor) -> int:
        """How many patches there are in all examples."""
        sizes = (*x.shape[2:], 1)
        heights = self.height.outputs(sizes[0] + self.height.before + self.height.after)
        return len(x) * heights * self.width.outputs(sizes[1] + self.width.before + self.width.after)

    def matrix(self, weight: Tensor) -> Tensor:
        """``[outputs, entries]`` of a weight, in the order of a patch's entries."""
        weight = weight.unsqueeze(3) if self.one_dimension else weight
        return weight.transpose(1, 2).flatten(1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The weight of a matrix as by `matrix`."""
        return matrix.unflatten(1, (self.height.size, -1, self.width.size)).transpose(1, 2).reshape(like.shape)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The patches ``[N, T, entries]``."""
        x = self.padded(x)
        heights, widths = self.height.outputs(x.shape[2]), self.width.outputs(x.shape[3])
        shape = (len(x), heights, widths, self.height.size, x.shape[1], self.width.size)
        laid = x.new_empty(shape, dtype=dtype)
        for i in range(self.height.size):
            for j in range(self.width.size):
                met = x[:, :, self.height.places(i, heights), self.width.places(j, widths)]
                laid[:, :, :, i, :, j] = met.permute(0, 2, 3, 1)
        return laid.flatten(3).flatten(1, 2)

    def gram_(self, S: Tensor, x: Tensor, keep: float, factor: float) -> None:
        """S <- keep S + factor sum p p' over all patches p, in the lower half alone but for squares along the diagonal.

        Columns of kernels are laid out, rows are not: what row i of a kernel meets is a stretch of what is laid out.
        Where the stride is one, two rows of a kernel at a distance meet the same pairs of inputs as the two before
        them but for the first of these and the last of their own, so that one product serves for all.
        """
        x = self.padded(x)
        rows, widths = self.height, self.width.outputs(x.shape[3])
        outputs, size = rows.outputs(x.shape[2]), x.shape[1] * self.width.size
        slides = rows.stride == 1 and 2 * rows.dilation < outputs
        for some in chunks(len(x), size * x.shape[2] * widths):
            F = self._columns(x[some], widths, S.dtype)
            for distance in range(rows.size):
                gram = S.new_zeros(size, size)
                for j in range(rows.size - distance):
                    i = j + distance
                    if distance == 0 and (j == 0 or not slides):
                        gram_(gram, F[:, rows.places(j, outputs)].flatten(1).T, 0.0, 1.0)
                    elif j == 0 or not slides:
                        gram = _product(F, rows.places(i, outputs), rows.places(j, outputs))
                    else:
                        for start, sign in (((j - 1) * rows.dilation, -1), ((j - 1) * rows.dilation + outputs, 1)):
                            lower, upper = start + distance * rows.dilation, start
                            _product(F, _stretch(lower, rows), _stretch(upper, rows), gram, sign)
                    S[i * size : (i + 1) * size, j * size : (j + 1) * size].mul_(keep).add_(gram, alpha=factor)
            keep = 1.0

    def sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of each example's patches, ``[N, entries]``."""
        x = self.padded(x)
        heights, widths = self.height.outputs(x.shape[2]), self.width.outputs(x.shape[3])
        columns = [x[..., self.width.places(j, widths)].sum(3, dtype=dtype) for j in range(self.width.size)]
        laid = torch.stack(columns, 2)  # [N, C, width, H]
        stretches = [self.height.places(i, heights) for i in range(self.height.size)]
        return torch.stack([laid[..., places].sum(3) for places in stretches], 1).flatten(1)

    def _columns(self, x: Tensor, widths: int, dtype: torch.dtype) -> Tensor:
        """``[channels x width of the kernel, H, N, W of the outputs]``."""
        N, C, H, _ = x.shape
        laid = x.new_empty((C, self.width.size, H, N, widths), dtype=dtype)
        for j in range(self.width.size):
            laid[:, j] = x[..., self.width.places(j, widths)].permute(1, 2, 0, 3)
        return laid.flatten(0, 1)


def chunks(examples: int, numbers: int) -> Iterator[slice]:
    """Stretches of examples of so many numbers each, that are not too many together."""
    count = max(1, _CHUNK // max(1, numbers))
    return (slice(first, first + count) for first in range(0, examples, count))


def _stretch(first: int, rows: Window) -> slice:
    return slice(first, first + rows.dilation)


def _product(F: Tensor, lower: slice, upper: slice, out: Tensor | None = None, sign: int = 1) -> Tensor:
    """The product of two stretches of rows of ``F [features, H, N, W]``, added to ``out`` if it is given."""
    left, right = F[:, lower].flatten(1), F[:, upper].flatten(1).T
    return left @ right if out is None else out.addmm_(left, right, alpha=sign)
