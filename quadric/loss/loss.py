"""Losses: a sum over frames, its curvature in output space, and how many frames it summed.

A loss never takes a mean. Sums are divided once, by the global number of frames, where all the data is known:
in the `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

PADDING = -1  # that of quadric.data.batch, which lies on this floor and cannot be imported
"""The target of a frame that does not count."""


class Loss(nn.Module):
    """A loss of a model's output, summed over frames.

    To add one, write ``forward``, ``weight`` and, for second-order training, ``curvature``.

    Attributes:
        symmetric: whether ``curvature`` is meant to be; an objective verifies it. Solvers take it as if it were.
    """

    symmetric: bool = True

    def forward(self, output: Tensor, target: Any) -> Tensor:
        """The sum of the loss over all frames, a scalar."""
        raise NotImplementedError

    def weight(self, target: Any) -> Tensor:
        """The number of frames that count, a scalar."""
        raise NotImplementedError

    def correct(self, output: Tensor, target: Any) -> tuple[float, float] | None:
        """How much of ``target`` the output has right, and how much there is; None where a loss knows no such thing."""
        return None

    def curvature(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        """v -> H v with the loss's Hessian H with respect to ``output``, in the shape of ``output``.

        What H needs of the data is computed once, and not in every product.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no curvature in output space: train it with a first-order optimiser"
        )

    def fisher(self, output: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
        """v -> u (u'v) for every frame, with the u of `fisher_factor`; the inner product is over `fisher_dims`.

        The empirical Fisher matrix in output space; at targets from `sample`, the Fisher matrix in expectation.
        """
        u, dims = self.fisher_factor(output, target), self.fisher_dims
        return lambda v: u * (u * v).sum(dims, keepdim=True)

    def fisher_factor(self, output: Tensor, target: Any) -> Tensor:
        """The u of `fisher`, in the shape of ``output``: the gradient of the loss."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (u,) = torch.autograd.grad(self(leaf, target), leaf)
        return u

    @property
    def fisher_dims(self) -> tuple[int, ...]:
        """The dimensions of an output that one u of `fisher` spans: the last, the outputs of a frame."""
        return (-1,)

    def sample(self, output: Tensor, target: Any, generator: torch.Generator) -> Any:
        """A target drawn from the model's own distribution given ``output``, with the padding of ``target``."""
        raise NotImplementedError(
            f"{type(self).__name__} is no distribution of targets: use the empirical Fisher matrix or another curvature"
        )


def check_log_prior(log_prior: Tensor) -> None:
    """Refuses what is no vector of finite log probabilities."""
    if log_prior.ndim != 1 or not bool(torch.isfinite(log_prior).all()):
        raise ValueError(
            f"log_prior must be a vector of finite log probabilities, not {tuple(log_prior.shape)} with "
            f"{int((~torch.isfinite(log_prior)).sum())} entries not finite: floor the prior"
        )


def check_utterances(output: Tensor, target: Sequence[Sized], outputs: int, what: str) -> None:
    """Refuses an output that is not [B, T, ``outputs``] or has too few utterances or frames for its targets."""
    if output.ndim != 3 or output.shape[-1] != outputs:
        raise ValueError(f"output must be [B, T, {outputs}], not {list(output.shape)}")
    if len(target) != len(output):
        raise ValueError(f"target has {len(target)} utterances, output has {len(output)}")
    longest = max(map(len, target), default=0)
    if longest > output.shape[1]:
        raise ValueError(f"target has {what} of {longest} frames, output only {output.shape[1]}")


class CrossEntropy(Loss):
    """Softmax cross-entropy of logits against class indices; frames of target -1 do not count.

    Its Hessian per frame is diag(p) - p p', which is also the Fisher matrix of the softmax.

    >>> loss = CrossEntropy()
    >>> float(loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -1]]))) / 2 == torch.log(torch.tensor(4.0)).item()
    True
    """

    def forward(self, output: Float[Tensor, "*B C"], target: Int[Tensor, "*B"]) -> Tensor:
        logits = output.reshape(-1, output.shape[-1])
        return functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            target.reshape(-1),
            ignore_index=PADDING,
            reduction="sum",
        )

    def weight(self, target: Int[Tensor, "*B"]) -> Tensor:
        return (target != PADDING).sum()

    def correct(self, output: Float[Tensor, "*B C"], target: Int[Tensor, "*B"]) -> tuple[float, float]:
        """Frames whose likeliest class is the target's, and frames that count."""
        counts = target != PADDING
        return float(((output.argmax(-1) == target) & counts).sum()), float(counts.sum())

    def curvature(
        self, output: Float[Tensor, "*B C"], target: Int[Tensor, "*B"]
    ) -> Callable[[Float[Tensor, "*B C"]], Float[Tensor, "*B C"]]:
        p = torch.softmax(output, -1) * (target != PADDING).unsqueeze(-1)
        return lambda v: p * (v - (p * v).sum(-1, keepdim=True))

    def sample(
        self, output: Float[Tensor, "*B C"], target: Int[Tensor, "*B"], generator: torch.Generator
    ) -> Int[Tensor, "*B"]:
        p = torch.softmax(output, -1).flatten(0, -2)
        drawn = torch.multinomial(p, 1, generator=generator).view(target.shape)
        return torch.where(target == PADDING, target, drawn)


class SquaredError(Loss):
    """1/2 ||output - target||^2 for every leading index; the Hessian is the identity."""

    def forward(self, output: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"]) -> Tensor:
        return 0.5 * (output - target).square().sum()

    def weight(self, target: Float[Tensor, "*B C"]) -> Tensor:
        return torch.tensor(target[..., 0].numel())

    def curvature(
        self, output: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"]
    ) -> Callable[[Float[Tensor, "*B C"]], Float[Tensor, "*B C"]]:
        return lambda v: v

    def sample(
        self, output: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"], generator: torch.Generator
    ) -> Float[Tensor, "*B C"]:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        return output + noise


class Bernoulli(Loss):
    """Logistic cross-entropy of logits against probabilities, summed over outputs; every leading index is a frame.

    Its Hessian is diag(p (1 - p)).
    """

    def forward(self, output: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"]) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output, target, reduction="sum")

    def weight(self, target: Float[Tensor, "*B C"]) -> Tensor:
        return torch.tensor(target[..., 0].numel())

    def curvature(
        self, output: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"]
    ) -> Callable[[Float[Tensor, "*B C"]], Float[Tensor, "*B C"]]:
        p = torch.sigmoid(output)
        variance = p * (1 - p)
        return lambda v: variance * v

    def sample(
        self, output: Float[Tensor, "*B C"], target: Float[Tensor, "*B C"], generator: torch.Generator
    ) -> Float[Tensor, "*B C"]:
        return torch.bernoulli(torch.sigmoid(output), generator=generator)
