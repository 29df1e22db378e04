"""Mini-block Fisher: a block-diagonal Fisher matrix of many small blocks (Bahamou, Goldfarb and Ren, 2023).

The Fisher matrix of a layer is itself taken as block-diagonal: a convolution has one small block for each kernel, that
is for each pair of an output and an input channel, and a fully connected layer one for each output, or the average of
these for all of them. Blocks are outer products of the gradient of a batch's mean loss, averaged over the steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import Block, Numbers, Seen, gram_, inverse, power, shift_of, started, statistics_type
from quadric.optim.capture import UNCALLED, obstacle
from quadric.optim.layers import Gradient, Kind, Layer
from quadric.optim.per_example import factors_of_examples


@dataclass(frozen=True)
class MiniBlocks:
    """Which mini-blocks a layer has.

    Attributes:
        averaged: one block for all outputs of a matrix, the mean of theirs, instead of one for each.
        largest: inputs of a block of a matrix at most; wider ones are cut into blocks of about equal width. Costs fall
            in proportion; on autoencoders the loss for steps is the same down to 64.
        exponent: of the inverse: -1, or -1/2 for its square root.
        per_example: blocks of the gradients of single examples, the mean of their outer products (the empirical
            Fisher matrix), instead of those of the batch's gradient. Where a layer's calls do not show them, of the
            batch's. Dimension 0 of what a module is called with is taken for the examples: of inputs ``[T, B, d]`` to
            `torch.nn.Linear`, time first, an example is a frame of all B sequences, and its gradient their sum. Have
            such inputs batch first. Recurrent layers and attention say themselves, by ``batch_first``.
    """

    averaged: bool = True
    largest: int = 256
    exponent: float = -1.0
    per_example: bool = False

    def __post_init__(self) -> None:
        if self.exponent not in (-1.0, -0.5):
            raise ValueError(f"exponent={self.exponent}: give -1 for the inverse or -0.5 for its square root")
        if self.largest < 1:
            raise ValueError(f"largest={self.largest}: a block has at least one input")

    def __call__(self, layer: Layer) -> Block:
        if layer.kind is Kind.MATRIX:
            block: Block = Averaged(layer, self) if self.averaged else Rows(layer, self)
        else:
            block = Kernels(layer, self) if layer.kind is Kind.KERNELS else Entries(layer, self)
        return self._of_examples(layer, block) if self.per_example else block

    def _of_examples(self, layer: Layer, otherwise: Block) -> Block:
        reason = obstacle(layer)
        why = UNCALLED if reason is None else reason
        otherwise.reason = f"{why}: of the batch's gradient" if why else "of the batch's gradient"
        if reason is not None:
            return otherwise
        block: Block
        if layer.kind is Kind.MATRIX:
            block = ExampleAveraged(layer, self) if self.averaged else ExampleRows(layer, self)
        else:
            block = ExampleKernels(layer, self)
        block.otherwise = otherwise
        return block

    def inverted(self, matrices: Tensor, damping: Tensor) -> Tensor:
        """The damped inverses, or their roots."""
        if self.exponent == -1.0:
            return inverse(matrices, damping)
        return power(matrices, damping, self.exponent)


def mini_block_fisher(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    blocks: MiniBlocks = MiniBlocks(),
    **options: Any,
) -> BlockDiagonal:
    """Mini-block Fisher (Bahamou, Goldfarb and Ren, 2023), in the place of Adam.

    Args:
        model: whose layers have the blocks.
        params: parameters or groups of it; None: all that are trainable.
        lr: with the default lengths, what it is in Adam.
        blocks: which mini-blocks layers have.
        options: momentum, weight decay, damping, schedule, length and fisher, as in `BlockDiagonal`; the paper's length
            is `quadric.optim.length.Natural`.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> optimizer = mini_block_fisher(model)
    >>> for layer in optimizer.coverage:
    ...     print(layer)
    0.weight, 0.bias: Kernels, 2 of 9 x 9 and 2 of 1 x 1 (Conv2d: kernels)
    2.weight, 2.bias: Averaged, 1 of 9 x 9 (Linear: a matrix)
    >>> model(torch.randn(5, 1, 4, 4)).square().mean().backward()
    >>> optimizer.step()
    """
    return BlockDiagonal(model, blocks, params, lr=lr, **options)


class Separate(Block):
    """Blocks d d' of the rows d of the matrices that `parts` makes of a gradient."""

    def __init__(self, layer: Layer, options: MiniBlocks) -> None:
        super().__init__(layer)
        self.options = options
        self.shapes = [part.shape for part in self.parts([p.detach() for p in layer.parameters])]

    @abstractmethod
    def parts(self, gradient: Gradient) -> list[Tensor]:
        """Matrices ``[blocks, size]`` of all entries of a gradient, each once."""

    def joined(self, parts: Sequence[Tensor]) -> Gradient:
        """The gradient that `parts` has taken apart."""
        return [part.reshape(p.shape) for part, p in zip(parts, self.layer.parameters, strict=True)]

    @property
    def shape(self) -> str:
        return " and ".join(f"{blocks:,} of {n:,} x {n:,}" for blocks, n in self.shapes)

    @property
    def elements(self) -> int:
        return 2 * sum(blocks * n * n for blocks, n in self.shapes)

    @property
    def work(self) -> float:
        return sum(float(blocks) * n**3 for blocks, n in self.shapes)

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        for k, d in enumerate(self.parts(seen.gradient)):
            S = started(numbers, f"statistics_{k}", (*d.shape, d.shape[1]), d)
            d = d.to(S.dtype)
            S.mul_(1 - share).addcmul_(d.unsqueeze(2), d.unsqueeze(1), value=share)

    def mean_curvature(self, numbers: Numbers) -> Tensor:
        totals = [numbers[f"statistics_{k}"].diagonal(dim1=1, dim2=2).sum() for k in range(len(self.shapes))]
        return torch.stack(totals).sum() / sum(blocks * n for blocks, n in self.shapes)

    def refresh(self, numbers: Numbers, damping: float) -> None:
        shift = shift_of(damping, self.mean_curvature(numbers))
        for k, (blocks, n) in enumerate(self.shapes):
            S = numbers[f"statistics_{k}"]
            if n == 1:
                numbers[f"inverse_{k}"] = (S + shift).pow_(self.options.exponent)
            else:
                numbers[f"inverse_{k}"] = self.options.inverted(S, shift.expand(blocks))

    def apply(self, numbers: Numbers, gradient: Gradient) -> Gradient:
        steps = []
        for k, d in enumerate(self.parts(gradient)):
            P = numbers[f"inverse_{k}"]
            steps.append(torch.bmm(P, d.to(P.dtype).unsqueeze(2)).squeeze(2) if d.shape[1] > 1 else P[:, :, 0] * d)
        return self.joined(steps)


class Entries(Separate):
    """A block for each parameter: of tables of embeddings, and of what is no linear map."""

    def parts(self, gradient: Gradient) -> list[Tensor]:
        return [g.reshape(-1, 1) for g in gradient]


class Kernels(Separate):
    """A block for each kernel of a convolution, and one for each bias."""

    def parts(self, gradient: Gradient) -> list[Tensor]:
        weight, *bias = gradient
        return [weight.flatten(2).flatten(0, 1), *(b.reshape(-1, 1) for b in bias)]


class Rows(Separate):
    """A block for each output of a matrix, of its row of weights and its bias."""

    def __init__(self, layer: Layer, options: MiniBlocks) -> None:
        self.cuts = cuts(layer, options.largest)
        super().__init__(layer, options)

    def parts(self, gradient: Gradient) -> list[Tensor]:
        weight, *bias = gradient
        return list(torch.cat([weight.flatten(1), *(b.unsqueeze(1) for b in bias)], 1).split(self.cuts, 1))

    def joined(self, parts: Sequence[Tensor]) -> Gradient:
        D, weight = torch.cat(list(parts), 1), self.layer.weight
        return [D[:, : weight[0].numel()].reshape(weight.shape), *D[:, weight[0].numel() :].unbind(1)]


class Averaged(Block):
    """One block for all outputs of a matrix: S = D'D / O of the gradient D = [D_W, D_b], ``[O, I + 1]``.

    The direction is D (S + lambda I)^-1: that of Shampoo from the right alone, with exponent -1.
    """

    def __init__(self, layer: Layer, options: MiniBlocks) -> None:
        super().__init__(layer)
        self.options = options
        self.cuts = cuts(layer, options.largest)

    @property
    def shape(self) -> str:
        return " and ".join(f"1 of {n:,} x {n:,}" for n in self.cuts)

    @property
    def elements(self) -> int:
        return 2 * sum(n * n for n in self.cuts)

    @property
    def work(self) -> float:
        return sum(float(n) ** 3 for n in self.cuts)

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        for k, (D, *b) in enumerate(self._parts(seen.gradient)):
            S = started(numbers, f"statistics_{k}", (self.cuts[k], self.cuts[k]), D)
            D = D.to(S.dtype)
            gram_(S[: D.shape[1], : D.shape[1]], D, 1 - share, share / len(D))
            for bias in b:
                bias = bias.to(S.dtype)
                S[-1, :-1].mul_(1 - share).add_(bias @ D, alpha=share / len(D))
                S[-1, -1].mul_(1 - share).add_(bias @ bias, alpha=share / len(D))

    def mean_curvature(self, numbers: Numbers) -> Tensor:
        traces = [numbers[f"statistics_{k}"].trace() for k in range(len(self.cuts))]
        return torch.stack(traces).sum() / sum(self.cuts)

    def refresh(self, numbers: Numbers, damping: float) -> None:
        shift = shift_of(damping, self.mean_curvature(numbers))
        for k in range(len(self.cuts)):
            numbers[f"inverse_{k}"] = self.options.inverted(numbers[f"statistics_{k}"], shift)

    def apply(self, numbers: Numbers, gradient: Gradient) -> Gradient:
        steps, biases = [], []
        for k, (D, *b) in enumerate(self._parts(gradient)):
            P, width = numbers[f"inverse_{k}"], D.shape[1]
            steps.append(D @ P[:width, :width])
            for bias in b:
                steps[-1].addr_(bias, P[-1, :-1])
                biases.append(torch.addmv(bias * P[-1, -1], D, P[:-1, -1]))
        d = steps[0] if len(steps) == 1 else torch.cat(steps, 1)
        return [d.view(self.layer.weight.shape), *biases]

    def _parts(self, gradient: Gradient) -> list[list[Tensor]]:
        """Columns of D_W, and with the last of them D_b."""
        weight, *bias = gradient
        widths = [*self.cuts[:-1], self.cuts[-1] - len(bias)]
        columns = [[D] for D in weight.flatten(1).split(widths, 1)]
        columns[-1] += bias
        return columns


class ExampleRows(Rows):
    """S_o = 1/N sum_n d_no d_no' of the rows d_no of the gradient of each of N examples."""

    wants_calls = True

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        _observe_examples(self, numbers, seen, share)

    def of_examples(self, D: Tensor) -> list[Tensor]:
        """As `parts`, ``[blocks, n, size]``, of gradients ``D [n, outputs, entries]``."""
        return list(D.transpose(0, 1).split(self.cuts, 2))


class ExampleKernels(Kernels):
    """The same of each kernel of a convolution, and of its biases."""

    wants_calls = True

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        _observe_examples(self, numbers, seen, share)

    def of_examples(self, D: Tensor) -> list[Tensor]:
        weight = self.layer.weight
        entries, height = weight[0].numel(), weight.shape[2]
        kernels = D[:, :, :entries].unflatten(2, (height, weight.shape[1], -1)).transpose(2, 3)
        parts = [kernels.flatten(3).flatten(1, 2).transpose(0, 1)]
        return parts if self.layer.bias is None else [*parts, D[:, :, -1].T.unsqueeze(2)]


def _observe_examples(block: ExampleRows | ExampleKernels, numbers: Numbers, seen: Seen, share: float) -> None:
    weight = block.layer.weight
    statistics = [started(numbers, f"statistics_{k}", (c, n, n), weight) for k, (c, n) in enumerate(block.shapes)]
    torch._foreach_mul_(statistics, 1 - share)
    for a, g in factors_of_examples(block.layer, seen.calls, statistics_type(weight), wide=True):
        for S, d in zip(statistics, block.of_examples(g.mT @ a), strict=True):
            S.baddbmm_(d.mT, d, alpha=share * seen.squares)


class ExampleAveraged(Averaged):
    """S = 1/(N O) sum_n D_n' D_n of the gradients D_n of N examples, with O outputs."""

    wants_calls = True

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        weight = self.layer.weight
        statistics = [started(numbers, f"statistics_{k}", (n, n), weight) for k, n in enumerate(self.cuts)]
        torch._foreach_mul_(statistics, 1 - share)
        positions = max((call.cotangent[0].numel() for call in seen.calls), default=0) // len(weight)
        whole = positions > len(weight)
        for a, g in factors_of_examples(self.layer, seen.calls, statistics_type(weight), wide=whole):
            # D = g'a, and D'D = a'(g g')a
            left = (g.mT @ a if whole else a).flatten(0, 1)
            right = left if whole else ((g @ g.mT) @ a).flatten(0, 1)
            pairs = zip(left.split(self.cuts, 1), right.split(self.cuts, 1), strict=True)
            for S, (one, other) in zip(statistics, pairs, strict=True):
                S.addmm_(one.T, other, alpha=share * seen.squares / len(weight))


def cuts(layer: Layer, largest: int) -> list[int]:
    """Widths of blocks of about equal width that the inputs of a matrix are cut into; its bias is in the last."""
    inputs = layer.weight[0].numel()
    count = -(-inputs // largest)
    widths = [inputs // count + (k < inputs % count) for k in range(count)]
    widths[-1] += layer.bias is not None
    return widths
