"""The divergence from another model, the teacher, of which the likeliest outputs of every frame are known.

The others are one class. With the teacher's probabilities q of the outputs L of a frame and r = 1 - sum_L q of the
others together, the model's p, and rho for what it gives the others,

    D = sum_L q log(q / p) + r log(r / rho)

is at most the divergence over all outputs, and 0 where the model gives every class what the teacher gives it. With
s = p / rho outside L and 0 in L, its derivatives in the logits are

    gradient  p - q in L, (rho - r) s outside
    Hessian   diag(p) - p p' - r (diag(s) - s s')
    Fisher    diag(p) - p p' - rho (diag(s) - s s')

The Hessian is indefinite where r > rho. The Fisher matrix of the classes is always positive semi-definite, and the same
where r = rho: at the teacher, and where all outputs are listed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from quadric.loss.sequence_target import Teacher


def divergence(log_p: Float[Tensor, "T C"], teacher: Teacher) -> Tensor:
    """D of one utterance, summed over its frames; twice differentiable."""
    pdfs = torch.from_numpy(teacher[0]).to(log_p.device, torch.int64)
    total = teacher[1].sum(1, dtype=np.float64, keepdims=True)
    all_listed = pdfs.shape[1] == log_p.shape[1]
    shares = torch.from_numpy(teacher[1] / (total if all_listed else total.clip(1.0))).to(log_p)
    value = (torch.xlogy(shares, shares) - shares * log_p.gather(1, pdfs)).sum()
    if all_listed:
        return value
    rest = torch.from_numpy((1.0 - total[:, 0]).clip(0.0)).to(log_p)
    log_rho = torch.logsumexp(log_p.scatter(1, pdfs, -math.inf), 1)
    return value + (torch.xlogy(rest, rest) - rest * log_rho).sum()


def class_means(logits: Float[Tensor, "B T C"], teachers: Sequence[Teacher]) -> Callable[[Tensor], Tensor]:
    """v -> the mean of v by p over the class of every output: v itself in L, s'v outside.

    With such means u, the product with the Fisher matrix is p (u - p'u). Frames past a teacher's are left as they are.
    """
    others = torch.zeros(logits.shape, dtype=torch.bool)
    for row, (pdfs, _) in zip(others, teachers, strict=True):
        row[: len(pdfs)] = True
        row[: len(pdfs)].scatter_(1, torch.from_numpy(pdfs).long(), False)
    others = others.to(logits.device)
    s = torch.where(others, torch.softmax(logits.masked_fill(~others, -math.inf), -1), 0.0)
    return lambda v: torch.where(others, (s * v).sum(-1, keepdim=True), v)
