"""Factors for each axis of a tensor: what Shampoo and TNT share.

The curvature of a tensor with gradient G ``[n_1, ..., n_k]`` is taken as a Kronecker product of one factor for each
axis. Of axis i the statistics are H_i = G_(i) G_(i)' / prod_(j != i) n_j, with G_(i) ``[n_i, rest]``: the contraction
of G with itself over all other axes. The inverse of such a product acts as G x_1 P_1 ... x_k P_k, one axis after the
other.

The papers' contraction is a sum, here it is a mean: the mean diagonal of every factor is the mean square of G. With
sums the step of a matrix would be smaller than that of its bias by a power of its size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from quadric.optim.blocks import Block, Numbers, Seen, gram_, shift_of, started
from quadric.optim.layers import Gradient, Kind, Layer
from quadric.optim.mini_block import Entries, MiniBlocks


class Flattening(Enum):
    """Which axes the kernels ``[outputs, inputs, ...]`` of a convolution have."""

    FILTERS = 1
    """Two: outputs, and inputs with positions."""
    POSITIONS = 2
    """Three: outputs, inputs, positions."""
    NONE = 3
    """All that there are."""


@dataclass(frozen=True)
class Tensors:
    """Which tensors a layer's parameters are, and how large the factors of their axes are at most.

    Tables of embeddings are none: they have a diagonal factor for all entries, as in mini-block Fisher.

    Attributes:
        flattening: of the kernels of convolutions.
        joined: the bias of a matrix is a column of it, instead of a tensor of its own with a factor of its own.
        largest: entries of a factor at most; of longer axes the factor is block-diagonal, of blocks of about equal
            width. Costs of the inverses fall with the square of it.
        vectors: entries of a tensor of one axis with a factor as above; longer ones have a diagonal factor.
    """

    flattening: Flattening = Flattening.FILTERS
    joined: bool = False
    largest: int = 256
    vectors: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.flattening, Flattening):
            raise ValueError(f"flattening={self.flattening!r}: give a Flattening, such as Flattening.FILTERS")
        for name in ("largest", "vectors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a factor has at least one entry")

    def axes(self, shape: Sequence[int]) -> list[Axis]:
        """Those of a tensor of this shape."""
        found = []
        for i, n in enumerate(shape):
            count = n if len(shape) == 1 and n > self.vectors else -(-n // self.largest)
            found.append(Axis(torch.Size(shape[:i]).numel(), n, torch.Size(shape[i + 1 :]).numel(), count))
        return found


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor, and the blocks of its factor.

    Attributes:
        before: product of the lengths of the axes before it.
        length: its own.
        after: product of those after it.
        count: blocks; the last may be narrower than the others, and is then filled up with zeros.
    """

    before: int
    length: int
    after: int
    count: int

    @property
    def width(self) -> int:
        """Of a block."""
        return -(-self.length // self.count)

    def cut(self, X: Tensor) -> Tensor:
        """A tensor as ``[before, count, width, after]``."""
        X = X.reshape(self.before, self.length, self.after)
        missing = self.count * self.width - self.length
        if missing:
            X = functional.pad(X, (0, 0, 0, missing))
        return X.view(self.before, self.count, self.width, self.after)

    def gram_(self, S: Tensor, X: Tensor, share: float) -> None:
        """S <- (1 - share) S + share H_i of X; blocks ``[count, width, width]``, of which the lower half is right."""
        rows = self.cut(X).permute(1, 2, 0, 3).reshape(self.count, self.width, -1)
        factor = share / (self.before * self.after)
        if self.count == 1:
            gram_(S[0], rows[0].T, 1 - share, factor)
        elif self.width == 1:
            S.mul_(1 - share).add_(rows.square().sum(-1, keepdim=True), alpha=factor)
        else:
            S.baddbmm_(rows, rows.mT, beta=1 - share, alpha=factor)

    def times(self, P: Tensor, X: Tensor) -> Tensor:
        """X x_i P, with symmetric blocks P ``[count, width, width]``; of the shape of X, contiguous."""
        if self.width == 1:
            return (self.cut(X) * P).view(X.shape)
        if self.count == 1 and self.after == 1:
            return (X.reshape(-1, self.length) @ P[0]).view(X.shape)
        product = torch.einsum("cij,acjb->acib", P, self.cut(X))
        product = product.reshape(self.before, -1, self.after)[:, : self.length]
        return product.reshape(X.shape).contiguous()


class Contracted(Block):
    """A factor for each axis of each tensor of a layer; a method says how they are inverted."""

    def __init__(self, layer: Layer, options: Tensors) -> None:
        super().__init__(layer)
        self.options = options
        self.axes = [options.axes(X.shape) for X in self.tensors([p.detach() for p in layer.parameters])]

    @abstractmethod
    def inverted(self, statistics: Sequence[Tensor], axes: Sequence[Axis], damping: float) -> list[Tensor]:
        """The P_i of a tensor.

        Args:
            statistics: of each axis, the blocks ``[count, width, width]`` of H_i, of which the lower half is right.
            axes: which these are.
            damping: as a share of the mean diagonal of each factor.
        """

    def tensors(self, gradient: Gradient) -> list[Tensor]:
        """Those that the gradient is taken as; all of its entries, each once."""
        weight, *bias = gradient
        if self.layer.kind is Kind.MATRIX:
            weight = weight.flatten(1)
            if bias and self.options.joined:
                return [torch.cat([weight, bias[0].unsqueeze(1)], 1)]
        elif self.layer.kind is Kind.KERNELS and self.options.flattening is not Flattening.NONE:
            weight = weight.flatten(self.options.flattening.value)
        return [weight if weight.ndim else weight.view(1), *bias]

    def joined(self, tensors: Sequence[Tensor]) -> Gradient:
        """The gradient that `tensors` has taken apart."""
        X, *bias = tensors
        weight = self.layer.weight
        if X.numel() != weight.numel():
            X, column = X.split([X.shape[1] - 1, 1], 1)
            bias = [column.squeeze(1)]
        return [X.reshape(weight.shape), *bias]

    @property
    def shape(self) -> str:
        return " and ".join(
            " by ".join(f"{axis.count:,} of {axis.width:,} x {axis.width:,}" for axis in axes) for axes in self.axes
        )

    @property
    def elements(self) -> int:
        return 2 * sum(axis.count * axis.width**2 for axes in self.axes for axis in axes)

    @property
    def work(self) -> float:
        return sum(float(axis.count) * axis.width**3 for axes in self.axes for axis in axes)

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        for t, X in enumerate(self.tensors(seen.gradient)):
            for i, axis in enumerate(self.axes[t]):
                S = started(numbers, f"statistics_{t}_{i}", (axis.count, axis.width, axis.width), X)
                axis.gram_(S, X.to(S.dtype), share)

    def mean_curvature(self, numbers: Numbers) -> Tensor:
        totals = [
            numbers[f"statistics_{t}_0"].diagonal(dim1=1, dim2=2).sum() * (axis.before * axis.after)
            for t, (axis, *_) in enumerate(self.axes)
        ]
        return torch.stack(totals).sum() / sum(p.numel() for p in self.layer.parameters)

    def refresh(self, numbers: Numbers, damping: float) -> None:
        for t, axes in enumerate(self.axes):
            statistics = [numbers[f"statistics_{t}_{i}"] for i in range(len(axes))]
            for i, P in enumerate(self.inverted(statistics, axes, damping)):
                numbers[f"inverse_{t}_{i}"] = P

    def apply(self, numbers: Numbers, gradient: Gradient) -> Gradient:
        steps = []
        for t, X in enumerate(self.tensors(gradient)):
            for i, axis in enumerate(self.axes[t]):
                X = axis.times(numbers[f"inverse_{t}_{i}"], X)
            steps.append(X)
        return self.joined(steps)


def shifts(statistics: Tensor, axis: Axis, damping: float) -> Tensor:
    """What is added to the diagonal of each block of a factor: a share of the mean of all of the factor's."""
    mean = statistics.diagonal(dim1=1, dim2=2).sum() / axis.length
    return shift_of(damping, mean).expand(axis.count)


def tensor_block(layer: Layer, method: Callable[[Layer], Block], exponent: float = -1.0) -> Block:
    """The ``method``'s block of a layer; a table of embeddings has a diagonal, inverted by this exponent."""
    return Entries(layer, MiniBlocks(exponent=exponent)) if layer.kind is Kind.TABLE else method(layer)
