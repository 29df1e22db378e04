"""What all sequence criteria share: scores from outputs, autograd over the recursion, curvature and Fisher products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from quadric.lattice.expectation import PathSums, path_sums_batch
from quadric.lattice.lattice import Lattice, StatePath
from quadric.loss.loss import Loss, check_log_prior, check_utterances
from quadric.loss.sequence_anchor import class_means, divergence
from quadric.loss.sequence_target import TOLERANCE, OutputCurvature, SequenceTarget, Teacher

Product = Callable[[Tensor], Tensor]


class Options(TypedDict, total=False):
    """What all sequence losses take; see `SequenceLoss`."""

    scale: float
    smoothing: float
    anchor: float
    curvature: OutputCurvature
    fisher: Literal["frame", "utterance"]
    jobs: int


class SequenceLoss(Loss, ABC):
    """(1 - smoothing) sequence criterion + smoothing cross-entropy + anchor KL(teacher || model), summed.

    The cross-entropy is that of the reference's pdfs (F-smoothing: H. Su et al., "Error back propagation for sequence
    training of context-dependent deep networks", ICASSP 2013); the divergence has the pdfs that a frame's teacher does
    not list as one class (see `quadric.loss.sequence_anchor`), its constant included: 0 where the model is the teacher.
    Targets are made by `target`, once per utterance.

    The gradient is that of the recursion, from occupancies; second derivatives by autograd are exact too, at a pass
    over the lattice each. A lattice whose log Z is not finite gives NaN, in the value and in its frames.

    Args:
        log_prior: natural-log prior of the pdfs. A buffer.
        scale: k above, the acoustic scale.
        smoothing: share of the cross-entropy, 0 to 1.
        anchor: weight of the divergence; above 0 every target needs a teacher.
        curvature: which matrix `curvature` multiplies by.
        fisher: ``"frame"`` or ``"utterance"``: over what the gradients of an empirical Fisher matrix are summed.
        jobs: threads of the recursion.

    ``scale``, ``smoothing`` and ``anchor`` are plain attributes, free to follow a schedule: a value, its derivatives
    and a product are of what they were when it was asked for.

    Raises:
        ValueError: an option out of its range.
    """

    log_prior: Tensor

    def __init__(
        self,
        log_prior: Float[Tensor, " C"],
        *,
        scale: float,
        smoothing: float = 0.0,
        anchor: float = 0.0,
        curvature: OutputCurvature = OutputCurvature.SAME_FRAME,
        fisher: Literal["frame", "utterance"] = "frame",
        jobs: int = 1,
    ) -> None:
        super().__init__()
        check_log_prior(log_prior)
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale={scale} must be positive: the acoustic scale, such as 0.1")
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"smoothing={smoothing} must be a share, 0 to 1")
        if not 0.0 <= anchor < math.inf:
            raise ValueError(f"anchor={anchor} must not be negative; 0 leaves the teacher out")
        if not isinstance(curvature, OutputCurvature):
            raise ValueError(f"curvature={curvature!r}: give an OutputCurvature, such as OutputCurvature.SAME_FRAME")
        if fisher not in ("frame", "utterance"):
            raise ValueError(f"fisher={fisher!r} must be 'frame' or 'utterance'")
        if jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        self.register_buffer("log_prior", log_prior.detach().clone())
        self.scale, self.smoothing, self.anchor = scale, smoothing, anchor
        self.output_curvature, self.fisher_over, self.jobs = curvature, fisher, jobs

    @abstractmethod
    def target(self, lattice: Lattice, reference: StatePath, *, teacher: Teacher | None = None) -> SequenceTarget:
        """What this criterion needs of an utterance.

        Args:
            lattice: its likely paths.
            reference: what was said, aligned.
            teacher: for ``anchor``: another model's likeliest pdfs [T, K] and their probabilities among all pdfs.

        Raises:
            ValueError: the three are of different frames, or emit pdfs that the prior does not know.
        """

    @abstractmethod
    def _lattice(self, target: SequenceTarget) -> Lattice:
        """The lattice of the criterion."""

    @abstractmethod
    def _loss(self, target: SequenceTarget, scores: np.ndarray, sums: PathSums) -> float:
        """The criterion of one utterance."""

    @abstractmethod
    def _slope(self, target: SequenceTarget, sums: PathSums) -> np.ndarray:
        """Its derivative in the scores, [T, C]."""

    @abstractmethod
    def _second(self, target: SequenceTarget, scores: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Its second derivative in the scores times a direction, [T, C]."""

    @abstractmethod
    def _block(self, slope: Tensor, occupancy: Tensor) -> Product:
        """The product with the blocks of its second derivative in the scores of one frame."""

    def forward(self, output: Float[Tensor, "B T C"], target: Sequence[SequenceTarget]) -> Tensor:
        """The loss of logits; frames past the end of an utterance do not count."""
        self._check(output, target)
        logits = output.to(torch.promote_types(output.dtype, torch.float32))
        total = (1.0 - self.smoothing) * self._criterion(logits, target)
        if self.smoothing or self.anchor:
            total = total + self._frames(logits, target)
        return total

    def weight(self, target: Sequence[SequenceTarget]) -> Tensor:
        return torch.tensor(sum(map(len, target)))

    def curvature(self, output: Float[Tensor, "B T C"], target: Sequence[SequenceTarget]) -> Product:
        """v -> H v with the matrix that ``curvature`` chose, and the Fisher matrices of the other two terms.

        The softmax's is the cross-entropy's Hessian too; that of the teacher's classes is the divergence's at the
        teacher, and positive semi-definite where the Hessian is not.
        """
        self._check(output, target)
        logits = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        known = self._known_curvature(logits, target)
        smoothing, anchor = self.smoothing, self.anchor
        if not smoothing and not anchor:
            return known
        softmax = softmax_block(torch.where(_counting(logits, target).unsqueeze(-1), torch.softmax(logits, -1), 0.0))
        if not anchor:
            return lambda v: known(v).mul_(1.0 - smoothing) + softmax(smoothing * v)
        means = class_means(logits, [u.teacher for u in target if u.teacher is not None])
        return lambda v: known(v).mul_(1.0 - smoothing) + softmax(smoothing * v + anchor * means(v))

    def _known_curvature(self, logits: Tensor, target: Sequence[SequenceTarget]) -> Product:
        scores = self._scores(logits, target, self.scale)
        sums = self._sums(target, scores, backward=self.output_curvature is not OutputCurvature.LATTICE)
        if self.output_curvature is OutputCurvature.LATTICE:
            dead = torch.tensor([not math.isfinite(s.log_z) for s in sums], device=logits.device)[:, None, None]
            dead = dead & _counting(logits, target).unsqueeze(-1)
            along = partial(self._along, target, self.scale, logits)
            return lambda v: along(v).masked_fill_(dead, math.nan)
        occupancy = _padded(logits, [_visible(s, s.occupancy) for s in sums])
        if self.output_curvature is OutputCurvature.SURROGATE:
            block = softmax_block(occupancy)
        else:
            slopes = [_visible(s, self._slope(u, s)) for u, s in zip(target, sums, strict=True)]
            block = self._block(_padded(logits, slopes), occupancy)
        curved = self.scale**2
        return lambda v: block(v).mul_(curved)

    def fisher_factor(self, output: Float[Tensor, "B T C"], target: Sequence[SequenceTarget]) -> Float[Tensor, "B T C"]:
        """The gradient of MMI, whatever the criterion (section 5.2 of the paper).

        Without boosting, smoothing and anchor.
        """
        self._check(output, target)
        logits = output.detach().to(torch.promote_types(output.dtype, torch.float32))
        items = [(u.lattice, x, None) for u, x in zip(target, self._scores(logits, target, self.scale), strict=True)]
        sums = path_sums_batch(items, jobs=self.jobs)
        slopes = [_visible(s, less_reference(u, s)) for u, s in zip(target, sums, strict=True)]
        return _padded(logits, slopes).mul_(self.scale)

    @property
    def fisher_dims(self) -> tuple[int, ...]:
        """Those of a frame, as in the paper, or of all frames of an utterance."""
        return (-1,) if self.fisher_over == "frame" else (-2, -1)

    def _criterion(self, logits: Tensor, target: Sequence[SequenceTarget]) -> Tensor:
        """The sum of the criterion over the utterances, differentiable twice."""
        wanted = torch.is_grad_enabled() and logits.requires_grad
        scores = self._scores(logits, target, self.scale)
        sums = self._sums(target, scores, backward=wanted)
        rows = zip(target, scores, sums, strict=True)
        value = sum(self._loss(*row) if math.isfinite(row[-1].log_z) else math.nan for row in rows)
        if not wanted:
            return logits.new_tensor(value)
        slopes = [_visible(s, self._slope(u, s)) for u, s in zip(target, sums, strict=True)]
        slope = _padded(logits, slopes).mul_(self.scale)
        return _Criterion.apply(logits, value, slope, partial(self._along, target, self.scale))

    def _along(self, target: Sequence[SequenceTarget], scale: float, logits: Tensor, v: Tensor) -> Tensor:
        """The Hessian of the criterion in the logits times v; ``scale`` may have moved on since it was asked for."""
        directions = v.detach().to("cpu", logits.dtype).numpy()
        scores = self._scores(logits, target, scale)

        def product(b: int) -> np.ndarray:
            return self._second(target[b], scores[b], directions[b, : len(target[b])])

        with ThreadPoolExecutor(self.jobs) as threads:
            products = list(threads.map(product, range(len(target))))
        return _padded(logits, products).mul_(scale**2)

    def _scores(self, logits: Tensor, target: Sequence[SequenceTarget], scale: float) -> list[np.ndarray]:
        """k (a - log q) of the frames of every utterance."""
        scores = (scale * (logits.detach() - self.log_prior.to(logits))).cpu().numpy()
        return [x[: len(utterance)] for utterance, x in zip(target, scores, strict=True)]

    def _sums(
        self, target: Sequence[SequenceTarget], scores: Sequence[np.ndarray], *, backward: bool
    ) -> list[PathSums]:
        items = [(self._lattice(u), x, u.value) for u, x in zip(target, scores, strict=True)]
        return path_sums_batch(items, backward=backward, jobs=self.jobs)

    def _frames(self, logits: Tensor, target: Sequence[SequenceTarget]) -> Tensor:
        """smoothing cross-entropy + anchor KL(teacher || model)."""
        log_p = torch.log_softmax(logits[_counting(logits, target)], -1)
        total = logits.new_zeros(())
        if self.smoothing:
            pdf = torch.from_numpy(np.concatenate([u.reference.pdf for u in target])).to(logits.device, torch.int64)
            total = total + self.smoothing * functional.nll_loss(log_p, pdf, reduction="sum")
        if self.anchor:
            for u, own in zip(target, log_p.split([len(u) for u in target]), strict=True):
                assert u.teacher is not None
                total = total + self.anchor * divergence(own, u.teacher)
        return total

    def _check(self, output: Tensor, target: Sequence[SequenceTarget]) -> None:
        check_utterances(output, target, len(self.log_prior), "a lattice")
        for u in target:
            self._checked(u)
            if self.anchor and u.teacher is None:
                raise ValueError(f"anchor={self.anchor} needs a teacher in every target: make them with one")

    def _checked(self, target: SequenceTarget) -> SequenceTarget:
        if target.num_pdfs > len(self.log_prior):
            raise ValueError(
                f"the target emits pdf {target.num_pdfs - 1}, but log_prior has {len(self.log_prior)} entries: "
                "lattice, reference, teacher and model must be of one set of pdfs"
            )
        listed = 0 if target.teacher is None else target.teacher[0].shape[1]
        if listed == len(self.log_prior) and target.unlisted > TOLERANCE:
            raise ValueError(
                f"teacher lists all {listed} pdfs, but leaves {target.unlisted:g} of a frame to others: its "
                "probabilities must then sum to 1"
            )
        return target

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, smoothing={self.smoothing}, anchor={self.anchor}, "
            f"curvature={self.output_curvature.name}, fisher={self.fisher_over!r}"
        )


class _Criterion(torch.autograd.Function):
    """The criterion [] of logits [B, T, C], of known gradient and Hessian: logits, v -> H v."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, value: float, slope: Tensor, hessian: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(logits, slope)
        ctx.hessian = hessian
        return logits.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, slope = ctx.saved_tensors
        return _Slope.apply(logits, upstream, slope, ctx.hessian), None, None, None


class _Slope(torch.autograd.Function):
    """Its gradient times what comes from above; once more differentiable, by the Hessian."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, upstream: Tensor, slope: Tensor, hessian: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(logits, upstream, slope)
        ctx.hessian = hessian
        return upstream * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        logits, upstream, slope = ctx.saved_tensors
        return upstream * ctx.hessian(logits, v), (v * slope).sum(), None, None


def softmax_block(occupancy: Float[Tensor, "B T C"]) -> Product:
    """v -> (diag(c) - c c') v in every frame."""
    return lambda v: occupancy * (v - (occupancy * v).sum(-1, keepdim=True))


def less_reference(target: SequenceTarget, sums: PathSums) -> Float[np.ndarray, "T C"]:
    """The occupancies minus those of the reference: the gradient of MMI in the scores."""
    assert sums.occupancy is not None
    slope = sums.occupancy.copy()
    slope[np.arange(len(target)), target.reference.pdf] -= 1.0
    return slope


def _visible(sums: PathSums, found: np.ndarray | None) -> np.ndarray:
    """NaN where there is no path or a numerical failure, so that the utterance is not passed over in silence."""
    assert found is not None
    return found if math.isfinite(sums.log_z) else np.full_like(found, np.nan)


def _padded(like: Float[Tensor, "B T C"], parts: Sequence[np.ndarray]) -> Float[Tensor, "B T C"]:
    """The utterances' own frames, and zeros after them."""
    whole = torch.zeros(like.shape, dtype=like.dtype)
    for padded, part in zip(whole, parts, strict=True):
        padded[: len(part)] = torch.from_numpy(part)
    return whole.to(like.device)


def _counting(like: Float[Tensor, "B T C"], target: Sequence[SequenceTarget]) -> Bool[Tensor, "B T"]:
    lengths = torch.tensor([len(u) for u in target], device=like.device)
    return torch.arange(like.shape[1], device=like.device) < lengths[:, None]
