"""The full-sum criterion: a network trained on words, with no alignment.

The state sequence of an utterance is hidden; the loss sums over all that its words allow. With ``p`` the softmax
of the network, ``q`` the prior of the pdfs, and the arcs' own weights,

    loss = -1/k sum_b log sum_paths prod_t weight(a_t) (p(c_t | x_t) / q(c_t)^r)^k

where ``k`` is the scale and ``r`` the scale of the prior. Its gradient is the cross-entropy gradient with the
posteriors of the automaton as soft targets, so each step is a generalised EM step. The prior keeps the network
from spending its frames on one pdf (silence). A. Zeyer, E. Beck, R. Schlüter, H. Ney, "CTC in the context of
generalized full-sum HMM training", Interspeech 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from quadric.lattice.automaton import Automaton
from quadric.lattice.semiring import forward_backward_batch
from quadric.loss.loss import Loss, check_log_prior, check_utterances


@dataclass(frozen=True)
class FullSumTarget:
    """What one utterance allows: the paths of ``automaton`` over its ``frames``. ``len`` is its frames.

    Raises ``ValueError`` when the utterance is too short for its shortest path.
    """

    automaton: Automaton
    frames: int

    def __post_init__(self) -> None:
        if self.frames < self.automaton.min_frames:
            raise ValueError(
                f"frames={self.frames} is too short: the words take at least {self.automaton.min_frames} frames; "
                "drop the utterance"
            )

    def __len__(self) -> int:
        return self.frames


class FullSum(Loss):
    """``-log Z / scale`` of each utterance, summed.

    Args:
        log_prior: natural-log prior of the pdfs. A buffer: copy a better estimate into it between epochs.
        scale: ``k`` above. Small values soften the posteriors; raise it towards 1 as the network learns.
        prior_scale: ``r`` above. 0 ignores the prior.
        jobs: threads of the recursion.

    ``scale`` and ``prior_scale`` are plain attributes, free to follow a schedule.

    >>> coin = Automaton.from_arcs([(0, 0, 0, 0.0), (0, 0, 1, 0.0)], final={0: 0.0})
    >>> loss = FullSum(torch.zeros(3))
    >>> round(float(loss(torch.zeros(1, 5, 3), [FullSumTarget(coin, 5)])), 5)  # 5 log(3/2)
    2.02733
    """

    log_prior: Tensor

    def __init__(
        self, log_prior: Float[Tensor, " C"], *, scale: float = 1.0, prior_scale: float = 0.0, jobs: int = 1
    ) -> None:
        super().__init__()
        check_log_prior(log_prior)
        if scale <= 0.0:
            raise ValueError(f"scale={scale} must be positive")
        self.register_buffer("log_prior", log_prior.detach().clone())
        self.scale = scale
        self.prior_scale = prior_scale
        self.jobs = jobs

    def forward(self, output: Float[Tensor, "B T C"], target: Sequence[FullSumTarget]) -> Tensor:
        """The loss of logits; frames past the end of an utterance do not count."""
        self._check(output, target)
        precision = torch.promote_types(output.dtype, torch.float32)
        log_posterior = torch.log_softmax(output.to(precision), -1)
        scores = self.scale * (log_posterior - self.prior_scale * self.log_prior.to(precision))
        return _SumLogZ.apply(scores, target, self.jobs) / -self.scale

    def weight(self, target: Sequence[FullSumTarget]) -> Tensor:
        return torch.tensor(sum(map(len, target)))

    def extra_repr(self) -> str:
        """The options, by which ranks are compared."""
        return f"outputs={len(self.log_prior)}, scale={self.scale}, prior_scale={self.prior_scale}"

    def _check(self, output: Tensor, target: Sequence[FullSumTarget]) -> None:
        check_utterances(output, target, len(self.log_prior), "an utterance")


class _SumLogZ(torch.autograd.Function):
    """The sum of the utterances' log Z [] of scores [B, T, C]; its gradient is the posteriors."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Sequence[FullSumTarget], jobs: int) -> Tensor:
        matrices = scores.detach().to("cpu", torch.float64).numpy()
        pairs = [(utterance.automaton, x[: len(utterance)]) for utterance, x in zip(target, matrices, strict=True)]
        statistics = forward_backward_batch(pairs, jobs=jobs)
        posteriors = torch.zeros(scores.shape, dtype=scores.dtype)
        for padded, (_, occupied) in zip(posteriors, statistics, strict=True):
            padded[: len(occupied)] = torch.from_numpy(occupied)
        ctx.save_for_backward(posteriors.to(scores.device))
        return scores.new_tensor(sum(log_z for log_z, _ in statistics))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (posteriors,) = ctx.saved_tensors
        return upstream * posteriors, None, None
