"""The L-BFGS inverse as an operator: a preconditioner from what an earlier run, or this one, has learnt."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import Pair
from quadric.linalg.vector import dot


class LBFGSInverse(LinearOperator):
    """v -> H v, the inverse of an operator as curvature pairs (s, y) tell it.

    Two-loop recursion, algorithm 7.4 of Nocedal and Wright (2006), on H_0 = gamma I with gamma = s'y / y'y of the
    newest pair (equation 7.20), or on a given H_0. It equals the BFGS updates of H_0 with the pairs in order (equation
    7.16), so H y = s for the newest pair. As a preconditioner from the pairs of a run of conjugate gradients: Morales
    and Nocedal (2000); for Hessian-free training, Sainath et al. (2013).

    Symmetric, and positive definite because pairs without s'y > epsilon ||s|| ||y|| are SKIPPED, not damped: noise in a
    product must not be turned into curvature. Multiplying a pair by a number changes nothing in exact arithmetic.

    Memory: the pairs', which are held as they are; an application costs 4 m n multiplications and two vectors.

    Args:
        pairs: oldest first, of vectors of ``size``; without any usable one, H = H_0, the identity unless given.
        size: n.
        H0: the initial inverse, symmetric positive definite.
        epsilon: least cosine of the angle between s and y. That of a symmetric positive definite operator of condition
            k is 2 sqrt(k) / (k + 1) at least.

    Attributes:
        pairs: those in use, oldest first.
        skipped: how many were not.
        scaling: gamma (1 without pairs or with H0).

    Raises:
        ValueError: a pair or H0 of another size, H0 not declared symmetric, or epsilon not positive.

    >>> import torch
    >>> pair = Pair(1, torch.tensor([1.0, 0.0]), torch.tensor([4.0, 2.0]))
    >>> LBFGSInverse([pair], 2) @ pair.y
    tensor([1., 0.])
    """

    symmetric = True

    def __init__(
        self, pairs: Iterable[Pair], size: int, *, H0: LinearOperator | None = None, epsilon: float = 1e-8
    ) -> None:
        pairs = tuple(pairs)
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon}: must be positive, or the operator may not be positive definite")
        for pair in pairs:
            if pair.s.shape != (size,) or pair.y.shape != (size,):
                raise ValueError(
                    f"pairs: the one of step {pair.step} has shapes {tuple(pair.s.shape)} and {tuple(pair.y.shape)}, "
                    f"the operator acts on ({size},): give pairs of this system"
                )
        if H0 is not None and (H0.size != size or not H0.symmetric):
            raise ValueError(f"H0 has size {H0.size}, symmetric={H0.symmetric}: give a symmetric one of size {size}")
        self.size, self.H0 = size, H0
        self.pairs = tuple(pair for pair in pairs if _curved(pair, epsilon))
        self.skipped = len(pairs) - len(self.pairs)
        self.scaling = self.pairs[-1].sy / self.pairs[-1].yy if self.pairs and H0 is None else 1.0

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        q, shares = v.clone(), []
        for pair in reversed(self.pairs):
            shares.append(dot(pair.s, q) / pair.sy)
            q.sub_(pair.y, alpha=shares[-1])
        z = q.mul_(self.scaling) if self.H0 is None else (self.H0 @ q).clone()
        for pair, share in zip(self.pairs, reversed(shares), strict=True):
            z.add_(pair.s, alpha=share - dot(pair.y, z) / pair.sy)
        return z


def _curved(pair: Pair, epsilon: float) -> bool:
    """Finite, and of enough curvature; written so that NaN fails."""
    largest = math.sqrt(pair.ss) * math.sqrt(pair.yy)
    return math.isfinite(largest) and pair.sy > epsilon * largest
