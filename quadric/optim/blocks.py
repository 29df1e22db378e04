"""One block of a block-diagonal curvature: the statistics of a layer, their damped inverse, and its action.

A `Block` is the mathematics of one method on one layer. It holds no numbers: they are in a dictionary of tensors that
the optimiser keeps in its state, so that a checkpoint has them and a copy goes on the same way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quadric.optim.layers import Gradient, Layer

Numbers = dict[str, Tensor]
"""The statistics and inverses of one block, by name."""

_STRIPE = 128
"""Columns of a Gram matrix that are made at a time, of its lower half."""


@dataclass(frozen=True)
class Call:
    """One call of a layer's module in the passes that a step's gradient is of.

    Attributes:
        inputs: what the module was called with.
        cotangent: the gradient of the loss with respect to its output.
        number: of the backward pass, where gradients of several are accumulated.
        outputs: the sum of its outputs over examples and positions, ``[outputs]``, where the block is a `SecondLook`.
        packed: of a packed sequence, which one: its calls are of the first examples of all, with the longest sequences.
        filled: examples at the end that are nothing but zeros.
        biased: whether what is added is the layer's bias, and the 1 that stands for it is appended to the inputs. Not
            in calls of a module that shares the weight and has a bias of its own, or none: there it is a 0.
    """

    inputs: Tensor
    cotangent: Tensor
    number: int = 0
    outputs: Tensor | None = None
    packed: int | None = None
    filled: int = 0
    biased: bool = True


@dataclass(frozen=True)
class Seen:
    """What a step shows of a layer; of several ranks each has its own calls, and the mean of their statistics counts.

    Attributes:
        gradient: of the mean loss.
        calls: of its module; empty unless a block asks for them.
        examples: how many the mean is over; on several ranks, over their number.
        positions: of all calls, which linear maps have been applied at; on several ranks, over their number. None:
            those of ``calls``.
        scale: of the cotangents c: the sum of the c a' of inputs a, on several ranks the mean of theirs, is the
            gradient times this.
    """

    gradient: Gradient
    calls: Sequence[Call] = ()
    examples: float = 1
    positions: float | None = None
    scale: float = 1.0

    @property
    def squares(self) -> float:
        """What sums of squares of the cotangents are multiplied by, to be means of those of single examples."""
        return self.examples / self.scale**2


class Block(ABC):
    """The curvature of one layer.

    Attributes:
        layer: whose it is.
        wants_calls: whether `Seen.calls` must be there.
        otherwise: of a block that wants calls, the block that takes its place if the layer's module is not called.
        reason: why it is this one and not that of the method's name, where the kind of the layer does not say it.
    """

    wants_calls: bool = False

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.otherwise: Block | None = None
        self.reason = ""

    @property
    @abstractmethod
    def shape(self) -> str:
        """How many matrices of what size, for a reader."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """Numbers that are kept: statistics and inverses."""

    @property
    @abstractmethod
    def work(self) -> float:
        """Multiplications of a refresh, roughly: by these the blocks are dealt out to ranks."""

    @abstractmethod
    def mean_curvature(self, numbers: Numbers) -> Tensor:
        """The mean of the diagonal of the layer's matrix, of which damping is a share."""

    @abstractmethod
    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        """Moves the statistics towards those of a step: S <- (1 - share) S + share S_new. The first are zero."""

    @abstractmethod
    def refresh(self, numbers: Numbers, damping: float) -> None:
        """Makes the inverses of the statistics anew, with ``damping`` as a share of the layer's mean curvature."""

    def inverses(self, numbers: Numbers) -> list[Tensor]:
        """What `refresh` makes, to be filled by another rank: ``inverse_x`` is as large as ``statistics_x``."""
        made = []
        for name in [name for name in numbers if name.startswith("statistics_")]:
            other = name.replace("statistics_", "inverse_")
            if other not in numbers:
                numbers[other] = torch.empty_like(numbers[name])
            made.append(numbers[other])
        return made

    @abstractmethod
    def apply(self, numbers: Numbers, gradient: Gradient) -> Gradient:
        """The inverse's action: P g, of a gradient in the statistics' type."""


class SecondLook(Block):
    """A block that learns from what a step changes: where statistics are due the closure is called after it too."""

    wants_calls = True

    @abstractmethod
    def look(self, seen: Seen) -> list[Tensor]:
        """What is to be compared: sums over calls, zero without any, of which the mean over the ranks is taken."""

    @abstractmethod
    def learn(
        self, numbers: Numbers, before: Sequence[Tensor], after: Sequence[Tensor], share: float, damping: float
    ) -> None:
        """Takes in what `look` has seen before a step and after it.

        Args:
            numbers: the block's.
            before, after: of the same data.
            share: of the newest statistics in the averages.
            damping: as a share of the layer's mean curvature.
        """


def statistics_type(like: Tensor) -> torch.dtype:
    """The type statistics and inverses are kept in: that of the parameters, float32 at least."""
    return torch.promote_types(like.dtype, torch.float32)


def squarable(gradient: Gradient) -> bool:
    """Whether the sum of squares of each tensor is finite, in the type that statistics are kept in."""
    norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(gradient))])
    limits = [math.sqrt(torch.finfo(statistics_type(g)).max) / 4 for g in gradient]
    return bool((norms < norms.new_tensor(limits)).all())


def sound(numbers: Sequence[Numbers]) -> bool:
    """Whether the traces of all statistics are finite; they are positive semi-definite, and so is then all of them."""
    matrices = [x for own in numbers for name, x in own.items() if name.startswith("statistics_")]
    traces = [S.diagonal(dim1=-2, dim2=-1).sum().double() for S in matrices]
    return not traces or bool(torch.stack(traces).isfinite().all())


def inverse(matrices: Tensor, damping: Tensor) -> Tensor:
    """(S + damping I)^-1 of symmetric positive semi-definite matrices ``[..., n, n]``, of which the lower half is read.

    By Cholesky's factorisation; where it fails, as in float32 where damping is below the rounding of S, by eigenvalues
    in float64, with those below zero taken as zero.

    Args:
        matrices: S.
        damping: positive, a number for each matrix, ``[...]``.
    """
    damped = matrices.tril(-1)
    damped += matrices.tril().mT
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(damped)
    failed = info != 0
    if not bool(failed.any()):
        return torch.cholesky_inverse(factor).contiguous()  # on every rank alike, or its products are not
    inverses = torch.empty_like(matrices)
    inverses[~failed] = torch.cholesky_inverse(factor[~failed])
    inverses[failed] = power(matrices[failed], damping[failed], -1.0)
    return inverses


def power(matrices: Tensor, damping: Tensor, exponent: float) -> Tensor:
    """(S + damping I)^exponent by eigenvalues in float64; the rest as in `inverse`.

    In float32 LAPACK's solver is twice as fast, but does not converge on many matrices of low rank.
    """
    if matrices.shape[-1] == 1:
        return matrices.clamp(min=0.0).add_(damping[..., None, None]).pow_(exponent)
    values, vectors = torch.linalg.eigh(matrices.double())
    scaled = values.clamp(min=0.0).add_(damping.double().unsqueeze(-1)).pow_(exponent)
    return ((vectors * scaled.unsqueeze(-2)) @ vectors.mT).to(matrices.dtype)


def gram_(S: Tensor, D: Tensor, keep: float, factor: float) -> None:
    """S <- keep S + factor D'D, in the lower half alone but for squares along the diagonal."""
    for first in range(0, len(S), _STRIPE):
        last = first + _STRIPE
        S[first:, first:last].addmm_(D[:, first:].T, D[:, first:last], beta=keep, alpha=factor)


def started(numbers: Numbers, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """The statistics of this name; zero if there are none yet."""
    if name not in numbers:
        numbers[name] = torch.zeros(shape, dtype=statistics_type(like), device=like.device)
    return numbers[name]


def positions(calls: Sequence[Call], layer: Layer) -> int:
    """At how many positions of how many examples a layer's linear map has been applied."""
    return sum(call.cotangent.numel() for call in calls) // len(layer.weight) if calls else 0


def shown_by(blocks: Sequence[Block]) -> list[tuple[Block, Gradient]]:
    """Those of layers that have a gradient, with it.

    Raises:
        ValueError: none has; one is sparse.
    """
    shown: list[tuple[Block, Gradient]] = []
    for block in blocks:
        if all(p.grad is None for p in block.layer.parameters):
            continue
        gradient = block.layer.gradient
        if any(g.is_sparse for g in gradient):
            raise ValueError(
                f"the gradient of {block.layer.name} is sparse: build the embedding with sparse=False, or give it to "
                "torch.optim.SparseAdam and leave it out of params"
            )
        shown.append((block, gradient))
    if not shown:
        raise ValueError("no parameter has a gradient: call backward() before step(), or give step() a closure")
    return shown


def forget(numbers: Numbers, prefix: str = "") -> None:
    """Drops what has names of this beginning, but for the momentum."""
    for name in [name for name in numbers if name.startswith(prefix) and name != "momentum"]:
        del numbers[name]


def has_statistics(numbers: Numbers) -> bool:
    """Whether a block has any."""
    return any(name.startswith("statistics_") for name in numbers)


def ready(numbers: Numbers) -> bool:
    """Whether a block has inverses, of all its statistics."""
    made = {name.removeprefix("inverse_") for name in numbers if name.startswith("inverse_")}
    wanted = {name.removeprefix("statistics_") for name in numbers if name.startswith("statistics_")}
    return bool(made) and wanted <= made


def shift_of(damping: float, mean: Tensor) -> Tensor:
    """What is added to the diagonal: a share of its mean; of no curvature, the share itself."""
    return torch.where(mean > 0, mean, torch.ones_like(mean)) * damping
