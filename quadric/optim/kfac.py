"""KFAC: a Fisher matrix of layers, each the Kronecker product of two small ones (Martens and Grosse, 2015).

The gradient of a linear layer for one example is g a', with its inputs a and the gradient g at its outputs. Its Fisher
matrix, the mean of the (a a') x (g g'), is taken as A x G, with A and G the means of the two factors. Convolutions have
the patches under their kernels for inputs (KFC: Grosse and Martens, 2016). Recurrent layers have those of all steps,
taken for independent as in the simplest model of Martens, Ba and Johnson (2018), attention those of its projections.
Layers without calls that show a and g have mini-blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import Block, Call, Numbers, Seen, gram_, inverse, positions, shift_of, started
from quadric.optim.capture import UNCALLED, examples, obstacle
from quadric.optim.convolution import Patches
from quadric.optim.layers import Gradient, Layer
from quadric.optim.mini_block import MiniBlocks
from quadric.optim.per_example import passes
from quadric.options import check_whole


@dataclass(frozen=True)
class KroneckerFactors:
    """Which factors a layer has, and how they are damped.

    Attributes:
        sharing: what a layer that is applied at several positions of an example, such as frames or pixels, or several
            times, makes of them: ``"expand"`` takes every position for an example, ``"reduce"`` the mean of the inputs
            and the sum of the gradients (Eschenhagen et al., 2023). ``"reduce"`` takes dimension 0 of what a module is
            called with for the examples: of inputs ``[T, B, d]`` to `torch.nn.Linear`, time first, it reduces over the
            B sequences and not over time. Have such inputs batch first, or give ``"expand"``, whose factors differ by
            their scale alone.
        pi: how damping is split. lambda, a share of the mean curvature tr(A) tr(G) / (n_A n_G), adds pi sqrt(lambda) to
            A and sqrt(lambda) / pi to G. ``"trace"``: pi^2 = (tr(A) / n_A) / (tr(G) / n_G), each factor's diagonal
            grows by the same share, and steps of a given length are those of the loss times any number
            (Martens and Grosse, 2015, section 6.3). ``"one"``: pi = 1.
        every: of the examples of a batch, only every so many are in the factors, which costs less in proportion
            (Martens and Grosse, 2015, have one in eight).
        otherwise: the blocks of layers that have no such factors.
    """

    sharing: Literal["expand", "reduce"] = "expand"
    pi: Literal["trace", "one"] = "trace"
    every: int = 1
    otherwise: Callable[[Layer], Block] = MiniBlocks()

    def __post_init__(self) -> None:
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing={self.sharing!r}: give 'expand' or 'reduce'")
        if self.pi not in ("trace", "one"):
            raise ValueError(f"pi={self.pi!r}: give 'trace' or 'one'")
        check_whole(every=self.every)
        if self.every < 1:
            raise ValueError(f"every={self.every}: give 1 for all examples, or a larger number for fewer")

    def __call__(self, layer: Layer) -> Block:
        other, reason = self.otherwise(layer), obstacle(layer)
        other.reason = UNCALLED if reason is None else reason
        if reason is not None:
            return other
        convolution = isinstance(layer.module, nn.Conv1d | nn.Conv2d)
        block = KroneckerPatches(layer, self) if convolution else Kronecker(layer, self)
        block.otherwise = other
        return block


def kfac(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    factors: KroneckerFactors = KroneckerFactors(),
    **options: Any,
) -> BlockDiagonal:
    """KFAC (Martens and Grosse, 2015), in the place of Adam.

    The loss is taken for the mean over examples, the entries of the first dimension of a layer's inputs; where the
    gradients of several backward passes are accumulated, for the mean over those of all. Of another loss, such as a
    sum, the factors are another multiple: damping and the default lengths follow it, pi = 1 and other lengths do not.

    Args:
        model: whose layers have the factors.
        params: parameters or groups of it; None: all that are trainable.
        lr: with the default lengths, what it is in Adam.
        factors: which factors layers have.
        options: momentum, weight decay, damping, schedule and length, as in `BlockDiagonal`.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> optimizer = kfac(model)
    >>> for layer in optimizer.coverage:
    ...     print(layer)
    0.weight, 0.bias: KroneckerPatches, 10 x 10 and 2 x 2 (Conv2d: kernels)
    2.weight, 2.bias: Kronecker, 9 x 9 and 1 x 1 (Linear: a matrix)
    >>> model(torch.randn(5, 1, 4, 4)).square().mean().backward()
    >>> optimizer.step()
    """
    return BlockDiagonal(model, factors, params, lr=lr, **options)


class Kronecker(Block):
    """A = E[a a'] and G = E[g g'] of the inputs a, with a 1 appended for the bias, and the gradients g at the outputs.

    Where a module with another bias, or none, shares the weight, a 0 is appended in its calls.

    The direction is G^-1 D A^-1, D = [D_W, D_b]. Of N examples at R positions each, A is the mean over all N R and G
    the mean over the N of the sum over the R, so that A x G is of the Fisher matrix's scale.
    """

    wants_calls = True

    def __init__(self, layer: Layer, options: KroneckerFactors) -> None:
        super().__init__(layer)
        self.options = options
        self.inputs = layer.weight[0].numel() + (layer.bias is not None)
        self.outputs = len(layer.weight)

    @property
    def shape(self) -> str:
        return f"{self.inputs:,} x {self.inputs:,} and {self.outputs:,} x {self.outputs:,}"

    @property
    def elements(self) -> int:
        return 2 * (self.inputs**2 + self.outputs**2)

    @property
    def work(self) -> float:
        return float(self.inputs) ** 3 + float(self.outputs) ** 3

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        A = started(numbers, "statistics_A", (self.inputs, self.inputs), self.layer.weight)
        G = started(numbers, "statistics_G", (self.outputs, self.outputs), self.layer.weight)
        keep = 1 - share
        if not seen.calls:  # on this rank, of those whose statistics are put together
            torch._foreach_mul_([A, G], keep)
            return
        n = self.options.every
        calls = [replace(call, inputs=call.inputs[::n], cotangent=call.cotangent[::n]) for call in seen.calls]
        taken, own = examples(calls), examples(seen.calls)
        of_G = share * seen.squares * own / taken
        if self.options.sharing == "reduce":
            for a, g in self._reduced(calls, A.dtype):
                gram_(A, a, keep, share * (own / seen.examples) / taken)
                gram_(G, g, keep, of_G)
                keep = 1.0
            return
        at, all_of = positions(calls, self.layer), positions(seen.calls, self.layer)
        of_A = share * (all_of / (seen.positions or all_of)) / at
        for call in calls:
            self._add_inputs(A, call, keep, of_A)
            gram_(G, self._at_outputs(call.cotangent).to(G.dtype), keep, of_G)
            keep = 1.0

    def mean_curvature(self, numbers: Numbers) -> Tensor:
        A, G = numbers["statistics_A"], numbers["statistics_G"]
        return A.trace() * G.trace() / (len(A) * len(G))

    def refresh(self, numbers: Numbers, damping: float) -> None:
        A, G = numbers["statistics_A"], numbers["statistics_G"]
        of_A, of_G = A.trace() / len(A), G.trace() / len(G)
        if self.options.pi == "one":
            of_A = of_G = (of_A * of_G).sqrt()
        numbers["inverse_A"] = inverse(A, shift_of(damping**0.5, of_A))
        numbers["inverse_G"] = inverse(G, shift_of(damping**0.5, of_G))

    def apply(self, numbers: Numbers, gradient: Gradient) -> Gradient:
        A = numbers["inverse_A"]
        weight, *bias = gradient
        D = self._matrix(weight)
        step, biases = D @ A[: D.shape[1], : D.shape[1]], []
        for b in bias:
            step.addr_(b, A[-1, :-1])
            biases.append(self._from_left(numbers, torch.addmv(b * A[-1, -1], D, A[:-1, -1])))
        return [self._weight(self._from_left(numbers, step)), *biases]

    def _from_left(self, numbers: Numbers, x: Tensor) -> Tensor:
        """G^-1 x."""
        return numbers["inverse_G"] @ x

    def _reduced(self, calls: Sequence[Call], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Of each pass the mean input over the positions of each example, with its 1, and the sum of the gradients."""
        pairs = []
        for own in passes(self.layer, calls, "give sharing='expand'"):
            sums, totals = zip(*(self._sums(call, dtype) for call in own), strict=True)
            positions = torch.zeros(len(sums[0]), 1, dtype=dtype, device=sums[0].device)
            ones = torch.zeros_like(positions)
            for call in own:
                R, some = call.cotangent[0].numel() / self.outputs, slice(len(call.inputs) - call.filled)
                positions[some] += R
                ones[some] += R * call.biased
            laid = [torch.stack(sums).sum(0), ones][: 1 if self.layer.bias is None else 2]
            pairs.append((torch.cat(laid, 1) / positions, torch.stack(totals).sum(0)))
        return pairs

    def _add_inputs(self, A: Tensor, call: Call, keep: float, factor: float) -> None:
        """A <- keep A + factor sum [a, 1]' [a, 1], without the 1 where A is as wide as a is."""
        rows = call.inputs.reshape(-1, call.inputs.shape[-1]).to(A.dtype)
        width = rows.shape[1]
        gram_(A[:width, :width], rows, keep, factor)
        if width < len(A):
            _add_bias(A, rows.sum(0), len(rows), keep, factor * call.biased)

    def _at_outputs(self, cotangent: Tensor) -> Tensor:
        """``[positions, outputs]``."""
        return cotangent.reshape(-1, self.outputs)

    def _sums(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The sums over the positions of each example: inputs ``[N, inputs]``, gradients ``[N, outputs]``."""
        inputs, cotangent = (x.unsqueeze(1).flatten(1, -2) for x in (call.inputs, call.cotangent))
        return inputs.sum(1, dtype=dtype), cotangent.sum(1, dtype=dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _weight(self, matrix: Tensor) -> Tensor:
        return matrix


class KroneckerPatches(Kronecker):
    """The same of a convolution, whose inputs are the patches under its kernels (KFC)."""

    def __init__(self, layer: Layer, options: KroneckerFactors) -> None:
        super().__init__(layer, options)
        assert isinstance(layer.module, nn.Conv1d | nn.Conv2d)
        self.patches = Patches(layer.module)

    def _add_inputs(self, A: Tensor, call: Call, keep: float, factor: float) -> None:
        inputs, entries = call.inputs, self.layer.weight[0].numel()
        self.patches.gram_(A[:entries, :entries], inputs, keep, factor)
        if entries < self.inputs:
            positions = self.patches.positions(inputs)
            _add_bias(A, self.patches.sums(inputs, A.dtype).sum(0), positions, keep, factor * call.biased)

    def _at_outputs(self, cotangent: Tensor) -> Tensor:
        return cotangent.transpose(0, 1).flatten(1).T

    def _sums(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.patches.sums(call.inputs, dtype), call.cotangent.flatten(2).sum(2, dtype=dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        return self.patches.matrix(weight)

    def _weight(self, matrix: Tensor) -> Tensor:
        return self.patches.weight(matrix, self.layer.weight)


def _add_bias(A: Tensor, sums: Tensor, positions: int, keep: float, factor: float) -> None:
    """The last row of A, from the sum of the inputs and their number."""
    A[-1, :-1].mul_(keep).add_(sums, alpha=factor)
    A[-1, -1].mul_(keep).add_(factor * positions)
