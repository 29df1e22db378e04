"""Sequence criteria over lattices: MMI, boosted MMI, MPE and sMBR, with their curvature.

With the outputs a, the prior q of the pdfs and the acoustic scale k, the scores of an utterance are k (a - log q): the
softmax's normaliser is the same on every path and cancels. With log Z the log of the sum over the lattice's paths of
exp(score), and a path's accuracy A against the reference,

    MMI = log Z - score(reference)                boosted: the paths of the lattice score b A less
    MPE, sMBR = A(reference) - sum_paths exp(score - log Z) A

A. Haider, C. Zhang, F. Kreyssig and P. Woodland, "A distributed optimisation framework combining natural gradient
with Hessian-free for discriminative sequence training", Neural Networks 143, 2021 (arXiv 2103.07554), sections 3 to 5;
D. Povey et al., "Boosted MMI for model and feature-space discriminative training", ICASSP 2008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from quadric.lattice.accuracy import (
    approximate_phone_accuracy,
    exact_phone_accuracy,
    frame_phone_accuracy,
    right_frames,
    spoken_phones,
    state_accuracy,
)
from quadric.lattice.expectation import PathSums, arc_values, mean_curvature, path_sums
from quadric.lattice.lattice import Lattice, StatePath
from quadric.loss.sequence_loss import Options, Product, SequenceLoss, less_reference, softmax_block
from quadric.loss.sequence_target import OutputCurvature, SequenceTarget, Teacher

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MMI(SequenceLoss):
    """Maximum mutual information; with ``boost``, boosted MMI: paths with errors count for more.

    Args:
        log_prior: see `SequenceLoss`, as for what is not told here.
        boost: b: every arc's weight is lowered by b times its frame accuracy, by phones. Targets made before keep
            theirs. (Kaldi raises weights by b times the error: the same up to a constant, where silence in place of a
            word is an error.)
        silence_phones, one_silence_class: of the accuracy, see `quadric.lattice.accuracy.frame_phone_accuracy`.

    Its Hessian in the scores of a frame is diag(c) - c c' with the occupancies c of the lattice.
    """

    def __init__(
        self,
        log_prior: Float[Tensor, " C"],
        *,
        boost: float = 0.0,
        silence_phones: Sequence[int] = (),
        one_silence_class: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(log_prior, **options)
        if not 0.0 <= boost < math.inf:
            raise ValueError(f"boost={boost} must not be negative; 0 is MMI")
        self.boost, self.silence_phones, self.one_silence_class = boost, tuple(silence_phones), one_silence_class

    def target(self, lattice: Lattice, reference: StatePath, *, teacher: Teacher | None = None) -> SequenceTarget:
        boosted = None
        if self.boost:
            accuracy = frame_phone_accuracy(lattice, reference, self.silence_phones, self.one_silence_class)
            boosted = replace(lattice, weight=lattice.weight - np.float32(self.boost) * accuracy)
        return self._checked(SequenceTarget(lattice, reference, teacher=teacher, boosted=boosted))

    def _lattice(self, target: SequenceTarget) -> Lattice:
        return target.lattice if target.boosted is None else target.boosted

    def _loss(self, target: SequenceTarget, scores: np.ndarray, sums: PathSums) -> float:
        own = scores[np.arange(len(target)), target.reference.pdf].sum(dtype=np.float64)
        return sums.log_z - float(own) - target.reference.weight

    def _slope(self, target: SequenceTarget, sums: PathSums) -> np.ndarray:
        return less_reference(target, sums)

    def _second(self, target: SequenceTarget, scores: np.ndarray, direction: np.ndarray) -> np.ndarray:
        lattice = self._lattice(target)
        product = path_sums(lattice, scores, arc_values(lattice, direction)).derivative
        assert product is not None
        return product

    def _block(self, slope: Tensor, occupancy: Tensor) -> Product:
        return softmax_block(occupancy)

    def extra_repr(self) -> str:
        return (
            f"boost={self.boost}, silence_phones={self.silence_phones}, one_silence_class={self.one_silence_class}, "
            f"{super().extra_repr()}"
        )


class _ExpectedAccuracy(SequenceLoss):
    """The reference's accuracy minus the expected accuracy of the lattice's paths.

    With c the occupancies of a frame and g the derivative of the loss in its scores, the block of its Hessian is
    diag(g) - g c' - c g'. The paper prints diag(g) - g c' (its equation 11): what is left where the expected accuracy
    is held constant, and not symmetric. (The product that follows there has c for the first g, a misprint.) The g of
    a frame sum to 0: where more than two pdfs compete, a block has eigenvalues of both signs.
    """

    def __init__(self, log_prior: Float[Tensor, " C"], **options: Unpack[Options]) -> None:
        super().__init__(log_prior, **options)
        self.symmetric = self.output_curvature is not OutputCurvature.PRINTED

    def _lattice(self, target: SequenceTarget) -> Lattice:
        return target.lattice

    def _check(self, output: Tensor, target: Sequence[SequenceTarget]) -> None:
        super()._check(output, target)
        if any(u.value is None for u in target):
            raise ValueError(f"target has no accuracies: make it with the target of {type(self).__name__}, not of MMI")

    def _loss(self, target: SequenceTarget, scores: np.ndarray, sums: PathSums) -> float:
        return target.most - sums.mean

    def correct(self, output: Float[Tensor, "B T C"], target: Sequence[SequenceTarget]) -> tuple[float, float]:
        """The expected accuracy, and the reference's own."""
        self._check(output, target)
        scores = self._scores(output.to(torch.promote_types(output.dtype, torch.float32)), target, self.scale)
        expected = sum(sums.mean for sums in self._sums(target, scores, backward=False))
        return expected, sum(u.most for u in target)

    def _slope(self, target: SequenceTarget, sums: PathSums) -> np.ndarray:
        assert sums.derivative is not None
        return -sums.derivative

    def _second(self, target: SequenceTarget, scores: np.ndarray, direction: np.ndarray) -> np.ndarray:
        assert target.value is not None
        return -mean_curvature(target.lattice, scores, target.value, direction)

    def _block(self, slope: Tensor, occupancy: Tensor) -> Product:
        if self.output_curvature is OutputCurvature.PRINTED:
            return lambda v: slope * (v - (occupancy * v).sum(-1, keepdim=True))

        def product(v: Tensor) -> Tensor:
            along, across = ((x * v).sum(-1, keepdim=True) for x in (occupancy, slope))
            return slope * (v - along) - occupancy * across

        return product


class MPE(_ExpectedAccuracy):
    """Minimum phone error: the accuracy counts phones, or frames by phones (MPFE).

    Args:
        log_prior: see `SequenceLoss`, as for what is not told here.
        accuracy: ``"approximate"``, by overlap, Povey's; ``"exact"``, by edit distance; ``"frame"``, Kaldi's MPFE. The
            first two refine the lattice.
        silence_phones: the phones that are silence.
        one_silence_class: of ``"frame"`` alone, see `quadric.lattice.accuracy.frame_phone_accuracy`.
    """

    def __init__(
        self,
        log_prior: Float[Tensor, " C"],
        *,
        accuracy: Literal["approximate", "exact", "frame"] = "approximate",
        silence_phones: Sequence[int] = (),
        one_silence_class: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(log_prior, **options)
        if accuracy not in ("approximate", "exact", "frame"):
            raise ValueError(f"accuracy={accuracy!r} must be 'approximate', 'exact' or 'frame'")
        self.counts, self.silence_phones, self.one_silence_class = accuracy, tuple(silence_phones), one_silence_class

    def target(self, lattice: Lattice, reference: StatePath, *, teacher: Teacher | None = None) -> SequenceTarget:
        if self.counts == "frame":
            value = frame_phone_accuracy(lattice, reference, self.silence_phones, self.one_silence_class)
            most = right_frames(reference, self.silence_phones, self.one_silence_class)
        else:
            refine = approximate_phone_accuracy if self.counts == "approximate" else exact_phone_accuracy
            lattice, value = refine(lattice, reference, self.silence_phones)
            most = spoken_phones(reference, self.silence_phones)
        return self._checked(SequenceTarget(lattice, reference, value, float(most), teacher))

    def extra_repr(self) -> str:
        return (
            f"accuracy={self.counts!r}, silence_phones={self.silence_phones}, "
            f"one_silence_class={self.one_silence_class}, {super().extra_repr()}"
        )


class SMBR(_ExpectedAccuracy):
    """State-level minimum Bayes risk: the accuracy counts frames of the reference's pdf.

    Args:
        log_prior: see `SequenceLoss`, as for what is not told here.
        silence_phones, one_silence_class: see `quadric.lattice.accuracy.state_accuracy`.
    """

    def __init__(
        self,
        log_prior: Float[Tensor, " C"],
        *,
        silence_phones: Sequence[int] = (),
        one_silence_class: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(log_prior, **options)
        self.silence_phones, self.one_silence_class = tuple(silence_phones), one_silence_class

    def target(self, lattice: Lattice, reference: StatePath, *, teacher: Teacher | None = None) -> SequenceTarget:
        value = state_accuracy(lattice, reference, self.silence_phones, self.one_silence_class)
        most = right_frames(reference, self.silence_phones, self.one_silence_class)
        return self._checked(SequenceTarget(lattice, reference, value, float(most), teacher))

    def extra_repr(self) -> str:
        return (
            f"silence_phones={self.silence_phones}, one_silence_class={self.one_silence_class}, {super().extra_repr()}"
        )
