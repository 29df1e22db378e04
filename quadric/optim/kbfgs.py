"""K-BFGS: Kronecker factors of layers whose inverses quasi-Newton pairs tell (Goldfarb, Ren and Bahamou, 2020).

The Hessian of a linear layer's weight is taken as A x G, with the mean A of the a a' of its inputs a, as in KFAC, and
the Hessian G at its outputs z, of which no product is made: a second pass at the point that the step has led to shows
how z and the gradient there have changed, and BFGS makes H_g, an estimate of G^-1, of such pairs. In K-BFGS(L) it is
L-BFGS. H_a = A^-1 is made once and then follows A by BFGS updates as well. For convolutions, whose inputs are the
patches under their kernels: Ren, Bahamou and Goldfarb (2021).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quadric.linalg.bfgs import compact, damp, update_
from quadric.optim.block_diagonal import BlockDiagonal
from quadric.optim.blocks import (
    Block,
    Numbers,
    SecondLook,
    Seen,
    inverse,
    positions,
    shift_of,
    started,
    statistics_type,
)
from quadric.optim.capture import UNCALLED, obstacle
from quadric.optim.damping import Damping
from quadric.optim.kfac import Kronecker, KroneckerFactors, KroneckerPatches
from quadric.optim.layers import Layer
from quadric.optim.mini_block import MiniBlocks
from quadric.options import check_whole

_LEAST = 1e-4
"""Curvature s'y / s's of a pair that is used, over the norm of the gradient: more than this."""


@dataclass(frozen=True)
class QuasiNewton:
    """How the inverses of a layer's two factors are found.

    Attributes:
        memory: pairs that H_g is made of by L-BFGS, the newest; None: H_g is a matrix, and BFGS updates it.
        powell: s'y over y'H_g y at least (the paper's mu_1): s is moved towards H_g y where it is less.
        start: so many statistics of A are enough for its inverse, which is made anew until then whenever the schedule
            has inverses made; it stands for the paper's pass over the data before the first step. Afterwards BFGS
            updates alone move H_a.
        otherwise: the blocks of layers that have no such factors.
    """

    memory: int | None = None
    powell: float = 0.2
    start: int = 20
    otherwise: Callable[[Layer], Block] = MiniBlocks()

    def __post_init__(self) -> None:
        check_whole(start=self.start, memory=1 if self.memory is None else self.memory)
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"memory={self.memory}: at least one pair; None keeps a matrix in their place")
        if self.start < 0:
            raise ValueError(f"start={self.start}: give a number of statistics, or 0 for an inverse of the first alone")
        if not 0 < self.powell < 1:
            raise ValueError(f"powell={self.powell}: must be between 0 and 1; the paper has 0.2")

    def __call__(self, layer: Layer) -> Block:
        other, reason = self.otherwise(layer), obstacle(layer)
        other.reason = UNCALLED if reason is None else reason
        if reason is not None:
            return other
        kind = KroneckerPairsPatches if isinstance(layer.module, nn.Conv1d | nn.Conv2d) else KroneckerPairs
        block = kind(layer, self)
        block.otherwise = other
        return block


def kbfgs(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    damping: float | Damping = 0.3,
    blocks: QuasiNewton = QuasiNewton(),
    **options: Any,
) -> BlockDiagonal:
    """K-BFGS (Goldfarb, Ren and Bahamou, 2020), in the place of Adam; it needs ``step(closure)``.

    After a step whose statistics are due the closure is called once more, for the same data at the new point, with the
    same random numbers; its gradients are dropped. What else a closure draws or counts, it draws and counts twice.

    Damping, a share d of the mean curvature: sqrt(d) tr(A) / n is added to A, and pairs of the other factor are given
    a curvature s'y / s's of sqrt(d) tau at least, with tau = ||y|| / ||s||, a root mean square over the last pairs. The
    paper has sqrt(lambda) in both places, and H_g = I at first where this has I / tau: the same lambda = d where both
    means are one. So H_g follows a loss that is multiplied by a number, and steps of the default length do not.

    Args:
        model: whose layers have the factors.
        params: parameters or groups of it; None: all that are trainable.
        lr: with the default lengths, what it is in Adam.
        damping: as a share of the mean curvature; a rule may make it follow the loss.
        blocks: how inverses are found.
        options: momentum, weight decay, schedule and length, as in `BlockDiagonal`.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> optimizer = kbfgs(model)
    >>> for layer in optimizer.coverage:
    ...     print(layer)
    0.weight, 0.bias: KroneckerPairsPatches, 10 x 10 and 2 x 2 (Conv2d: kernels)
    2.weight, 2.bias: KroneckerPairs, 9 x 9 and 1 x 1 (Linear: a matrix)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(5, 1, 4, 4)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> bool(optimizer.step(closure) > closure())
    True
    """
    return BlockDiagonal(model, blocks, params, lr=lr, damping=damping, **options)


def kbfgs_l(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    lr: float = 1e-3,
    blocks: QuasiNewton = QuasiNewton(memory=100),
    **options: Any,
) -> BlockDiagonal:
    """K-BFGS(L): `kbfgs` with L-BFGS for H_g, of 100 pairs at most."""
    return kbfgs(model, params, lr=lr, blocks=blocks, **options)


class KroneckerPairs(Kronecker, SecondLook):
    """H_a and H_g of the inputs a, with a 1 appended for the bias, and of the outputs z. The direction is H_g D H_a.

    Of N examples at R positions each, s is the change of the mean of z over all N R, and y that of the gradient of the
    mean loss in a shift of all z: in the bias, where there is one.
    """

    def __init__(self, layer: Layer, quasi_newton: QuasiNewton) -> None:
        super().__init__(layer, KroneckerFactors())
        self.quasi_newton = quasi_newton
        memory = quasi_newton.memory
        self.inverse: Inverse = Whole() if memory is None else Limited(memory)

    @property
    def elements(self) -> int:
        return 2 * self.inputs**2 + self.inverse.elements(self.outputs)

    @property
    def work(self) -> float:
        return float(self.inputs) ** 3

    def observe(self, numbers: Numbers, seen: Seen, share: float) -> None:
        A = started(numbers, "statistics_A", (self.inputs, self.inputs), self.layer.weight)
        if "observed" not in numbers:
            numbers["observed"] = torch.tensor(0)
            numbers |= {"s": A.new_zeros(self.outputs), "y": A.new_zeros(self.outputs), "squares": A.new_zeros(2)}
            self.inverse.start(numbers, self.outputs, A)
        numbers["observed"] += 1
        count, keep = seen.positions or positions(seen.calls, self.layer), 1 - share
        for call in seen.calls:
            self._add_inputs(A, call, keep, share / count)
            keep = 1.0
        if not seen.calls:  # on this rank, of those whose statistics are put together
            A.mul_(keep)

    def refresh(self, numbers: Numbers, damping: float) -> None:
        if "inverse_A" not in numbers or int(numbers["observed"]) <= self.quasi_newton.start:
            A = numbers["statistics_A"]
            numbers["inverse_A"] = inverse(A, self._shift(A, damping))

    def look(self, seen: Seen) -> list[Tensor]:
        """The sums over examples and positions of z, of the gradient there and of a, and their number."""
        weight = self.layer.weight
        entries, z = weight[0].numel(), torch.zeros(self.outputs, dtype=statistics_type(weight), device=weight.device)
        y, a, count = torch.zeros_like(z), z.new_zeros(self.inputs), z.new_zeros(1)
        for call in seen.calls:
            assert call.outputs is not None
            at = positions([call], self.layer)
            z += call.outputs
            inputs, gradients = self._sums(call, a.dtype)
            y += gradients.sum(0) / seen.scale
            a[:entries] += inputs.sum(0)
            a[entries:] += at * call.biased
            count += at
        return [z, y, a, count]

    def learn(
        self, numbers: Numbers, before: Sequence[Tensor], after: Sequence[Tensor], share: float, damping: float
    ) -> None:
        (z, gradient, a, count), (z_after, gradient_after, _, count_after) = before, after
        pair = z / count - z_after / count_after, gradient - gradient_after
        self._learn_pair(numbers, pair, gradient.norm(), share, damping**0.5)
        A, H = numbers["statistics_A"], numbers["inverse_A"]
        s = H @ (a / count)  # the paper's code has the mean of the others in the place of the 1 that is appended
        update_(H, s, A.tril() @ s + A.tril(-1).T @ s + self._shift(A, damping) * s)

    def _learn_pair(
        self, numbers: Numbers, pair: tuple[Tensor, Tensor], gradient: Tensor, share: float, damping: float
    ) -> None:
        """Moves the averages of s and y, and H_g by the pair that these are, damped.

        A pair that is not finite moves neither, one of too little curvature, as of no step, not H_g.
        """
        s, y, squares = numbers["s"], numbers["y"], numbers["squares"]
        finite = torch.stack(pair).isfinite().all()
        for average, new in zip((s, y), pair, strict=True):
            average.lerp_(torch.where(finite, new, average), share)
        squares.lerp_(torch.where(finite, torch.stack([s @ s, y @ y]), squares), share)
        unit = (squares[1] / squares[0]).sqrt()
        usable = finite & unit.isfinite() & (unit > 0)
        self.inverse.scale(numbers, torch.where(usable, 1 / unit, 0.0))
        Hy = self.inverse.product(numbers, y.unsqueeze(1)).squeeze(1)
        s, y = damp(s, y, Hy, powell=self.quasi_newton.powell, share=damping, unit=unit)
        self.inverse.update(numbers, s, y, usable & (s @ y > _LEAST * (s @ s) * gradient))

    def _shift(self, A: Tensor, damping: float) -> Tensor:
        return shift_of(damping**0.5, A.trace() / len(A))

    def _from_left(self, numbers: Numbers, x: Tensor) -> Tensor:
        """H_g x."""
        return self.inverse.product(numbers, x if x.dim() == 2 else x.unsqueeze(1)).view_as(x)


class KroneckerPairsPatches(KroneckerPairs, KroneckerPatches):
    """The same of a convolution, whose inputs are the patches under its kernels."""


class Inverse(ABC):
    """H_g, as it is kept in a block's numbers."""

    @abstractmethod
    def elements(self, n: int) -> int:
        """Numbers that are kept."""

    @abstractmethod
    def start(self, numbers: Numbers, n: int, like: Tensor) -> None:
        """The identity."""

    @abstractmethod
    def scale(self, numbers: Numbers, scale: Tensor) -> None:
        """Takes ``scale`` I for H_0; of 0, what it was."""

    @abstractmethod
    def update(self, numbers: Numbers, s: Tensor, y: Tensor, use: Tensor) -> None:
        """Takes in a pair, if it is of ``use``."""

    @abstractmethod
    def product(self, numbers: Numbers, x: Tensor) -> Tensor:
        """H_g x, of columns."""


class Whole(Inverse):
    """A matrix. H_0 counts until the first pair is there."""

    def elements(self, n: int) -> int:
        return n * n

    def start(self, numbers: Numbers, n: int, like: Tensor) -> None:
        numbers["inverse_G"] = torch.eye(n, dtype=like.dtype, device=like.device)
        numbers["pairs"] = torch.zeros((), dtype=torch.int64, device=like.device)

    def scale(self, numbers: Numbers, scale: Tensor) -> None:
        H = numbers["inverse_G"]
        counts = (numbers["pairs"] == 0) & (scale > 0)
        H.mul_(torch.where(counts, scale / H[0, 0], 1.0))

    def update(self, numbers: Numbers, s: Tensor, y: Tensor, use: Tensor) -> None:
        numbers["pairs"] += update_(numbers["inverse_G"], s, y, use)

    def product(self, numbers: Numbers, x: Tensor) -> Tensor:
        return numbers["inverse_G"] @ x


@dataclass(frozen=True)
class Limited(Inverse):
    """The last ``memory`` pairs, of L-BFGS from the newest H_0."""

    memory: int

    def elements(self, n: int) -> int:
        return 2 * self.memory * n

    def start(self, numbers: Numbers, n: int, like: Tensor) -> None:
        numbers |= {"pairs_s": like.new_zeros((0, n)), "pairs_y": like.new_zeros((0, n)), "scale": like.new_ones(())}

    def scale(self, numbers: Numbers, scale: Tensor) -> None:
        numbers["scale"].copy_(torch.where(scale > 0, scale, numbers["scale"]))

    def update(self, numbers: Numbers, s: Tensor, y: Tensor, use: Tensor) -> None:
        size = (s @ y).sqrt()  # pairs of s'y = 1 are the same to L-BFGS, and to solve with them is sound
        if bool(use & size.isfinite()):
            for name, new in (("pairs_s", s), ("pairs_y", y)):
                numbers[name] = torch.cat([numbers[name], (new / size).unsqueeze(0)])[-self.memory :]

    def product(self, numbers: Numbers, x: Tensor) -> Tensor:
        return compact(numbers["pairs_s"], numbers["pairs_y"], numbers["scale"], x)
