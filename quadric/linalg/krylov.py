"""Krylov solvers for symmetric systems: conjugate gradients, the same with a changing preconditioner, least residuals.

The first two minimise the quadratic model q(x) = 1/2 x'Ax - b'x over a growing Krylov space and need a positive
definite A; `MinRes` minimises the residual and does not.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import Pair
from quadric.linalg.solver import ChangingInverse, Ending, Iterate, KrylovSolver, Progress, fixed
from quadric.linalg.vector import dot
from quadric.outcome import Outcome


@dataclass(frozen=True)
class ConjugateGradient(KrylovSolver):
    """Preconditioned conjugate gradients for a symmetric positive definite operator.

    Hestenes and Stiefel (1952); truncated and stored as in Martens (2010), section 4.

    >>> import torch
    >>> from quadric.linalg.operator import Identity
    >>> A = 2.0 * Identity(3)
    >>> ConjugateGradient().solve(A, torch.ones(3)).last.x
    tensor([0.5000, 0.5000, 0.5000])
    """

    def run(
        self,
        A: LinearOperator,
        M: LinearOperator | ChangingInverse,
        x: Float[Tensor, " n"],
        r: Float[Tensor, " n"],
        progress: Progress,
    ) -> Generator[Iterate, None, Ending]:
        inverse = fixed(M)
        pairs: tuple[Pair, ...] = ()
        z = inverse @ r
        p, rz = z, dot(r, z)
        yield progress.at(0, x, r)
        for step in range(1, self.max_steps + 1):
            if progress.solved:
                return Ending(Outcome.CONVERGED, pairs)
            Ap = A @ p
            pAp = dot(p, Ap)
            if not math.isfinite(pAp) or not math.isfinite(rz):
                return Ending(Outcome.NON_FINITE, pairs)
            if pAp <= 0 or rz <= 0:  # the second: of the preconditioner
                return Ending(Outcome.NEGATIVE_CURVATURE, pairs)
            pairs = self._select(pairs, step, p, Ap)
            alpha = rz / pAp
            x = x + alpha * p
            r = r - alpha * Ap
            z = inverse @ r
            rz, previous = dot(r, z), rz
            p = z + (rz / previous) * p
            point = progress.at(step, x, r)
            if not progress.finite:
                return Ending(Outcome.NON_FINITE, pairs)
            yield point
            if outcome := progress.reached():
                return Ending(outcome, pairs)
        return Ending(Outcome.STEP_LIMIT, pairs)
