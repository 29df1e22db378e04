"""Krylov solvers for symmetric systems: conjugate gradients, the same with a changing preconditioner, least residuals.

The first two minimise the quadratic model q(x) = 1/2 x'Ax - b'x over a growing Krylov space and need a positive
definite A; `MinRes` minimises the residual and does not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import Pair
from quadric.linalg.solver import ChangingInverse, Ending, Iterate, KrylovSolver, Progress, checked_inverse, fixed
from quadric.linalg.truncation import Residual, Truncation
from quadric.linalg.vector import dot
from quadric.options import check_whole
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


@dataclass(frozen=True, eq=False)
class Direction:
    """A search direction of `FlexibleCG` and what was learnt along it.

    Attributes:
        p: the direction.
        Ap: A p.
        pAp: p'Ap.
        alpha: the step along it.
        zr: z'r where it was made.
    """

    p: Float[Tensor, " n"]
    Ap: Float[Tensor, " n"]
    pAp: float
    alpha: float
    zr: float


class Conjugation(ABC):
    """How `FlexibleCG` makes a new direction p = z + sum_j beta_j p_j conjugate to earlier ones."""

    @abstractmethod
    def depth(self, i: int) -> int:
        """How many of the last directions enter the i-th one (the first is the 0-th); grows by 1 at most."""

    @abstractmethod
    def betas(self, z: Float[Tensor, " n"], past: Sequence[Direction]) -> list[float]:
        """beta_j for each direction of ``past``, oldest first."""


@dataclass(frozen=True)
class PolakRibiere(Conjugation):
    """beta = z_{k+1}'(r_{k+1} - r_k) / z_k'r_k, with the one direction before.

    Where the residual is r_{k+1} = r_k - alpha_k A p_k and the step exact along p_k, this is `Notay` with one direction
    up to rounding. The difference of residuals is taken as -alpha_k A p_k, so that r_k need not be held. A negative
    beta is no reason to restart here: the new direction is conjugate to the last one whatever its sign.
    """

    def depth(self, i: int) -> int:
        return 1

    def betas(self, z: Float[Tensor, " n"], past: Sequence[Direction]) -> list[float]:
        return [-d.alpha * dot(z, d.Ap) / d.zr for d in past]


@dataclass(frozen=True)
class Notay(Conjugation):
    """beta_j = -z'A p_j / p_j'A p_j: orthogonalised in the inner product of A against the last m_i directions.

    FCG(m) of Notay (2000): m_i = max(1, i mod (m + 1)) for the i-th direction: a window that grows to m
    and starts again. With ``restart=False`` the window slides instead: m_i = min(i, m).

    Args:
        directions: m; the run holds as many pairs of vectors.
        restart: the growing window rather than the sliding one.

    >>> [Notay(2).depth(i) for i in range(1, 8)], [Notay(2, restart=False).depth(i) for i in range(1, 8)]
    ([1, 2, 1, 1, 2, 1, 1], [1, 2, 2, 2, 2, 2, 2])
    """

    directions: int = 5
    restart: bool = True

    def __post_init__(self) -> None:
        check_whole(directions=self.directions)
        if self.directions < 1:
            raise ValueError(f"directions={self.directions}: at least one, or it is steepest descent")

    def depth(self, i: int) -> int:
        return max(1, i % (self.directions + 1)) if self.restart else min(i, self.directions)

    def betas(self, z: Float[Tensor, " n"], past: Sequence[Direction]) -> list[float]:
        return [-dot(z, d.Ap) / d.pAp for d in past]


@dataclass(frozen=True)
class FlexibleCG(KrylovSolver):
    """Conjugate gradients whose preconditioner may change from one iteration to the next.

    Axelsson and Vassilevski (1991), Notay (2000); for speech, Sainath et al. (2013). With one fixed preconditioner it
    gives the iterates of `ConjugateGradient`, for one inner product more.

    M may be a `ChangingInverse`: called before each iteration with the number of products so far and the pairs
    (p, Ap) that ``pairs`` has kept of this run (none at first, and none ever with ``pairs=None``), it returns the
    inverse to use now. Every step is exact along its direction, p'r / p'Ap, so q falls whatever M does.

    Attributes:
        conjugation: the form of the new direction.

    >>> import torch
    >>> from quadric.linalg.operator import Diagonal
    >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0]))
    >>> path = FlexibleCG().solve(A, torch.ones(3), M=lambda step, pairs: Diagonal(1 / (A.diagonal + 1 / (1 + step))))
    >>> path.last.x
    tensor([1.0000, 0.5000, 0.2500])
    """

    conjugation: Conjugation = PolakRibiere()

    def run(
        self,
        A: LinearOperator,
        M: LinearOperator | ChangingInverse,
        x: Float[Tensor, " n"],
        r: Float[Tensor, " n"],
        progress: Progress,
    ) -> Generator[Iterate, None, Ending]:
        pairs: tuple[Pair, ...] = ()
        past: list[Direction] = []
        yield progress.at(0, x, r)
        for step in range(1, self.max_steps + 1):
            if progress.solved:
                return Ending(Outcome.CONVERGED, pairs)
            inverse = M if isinstance(M, LinearOperator) else self._inverse(M, step - 1, pairs, A.size)
            z = inverse @ r
            zr = dot(z, r)
            if not math.isfinite(zr):
                return Ending(Outcome.NON_FINITE, pairs)
            if zr <= 0:
                return Ending(Outcome.INDEFINITE_PRECONDITIONER, pairs)
            p = z
            for beta, direction in zip(self.conjugation.betas(z, past), past, strict=True):
                p = p + beta * direction.p
            Ap = A @ p
            pAp, pr = dot(p, Ap), dot(p, r)
            if not math.isfinite(pAp) or not math.isfinite(pr):
                return Ending(Outcome.NON_FINITE, pairs)
            if pAp <= 0:
                return Ending(Outcome.NEGATIVE_CURVATURE, pairs)
            pairs = self._select(pairs, step, p, Ap)
            alpha = pr / pAp
            x = x + alpha * p
            r = r - alpha * Ap
            past = [*past, Direction(p, Ap, pAp, alpha, zr)][-self.conjugation.depth(step) :]
            point = progress.at(step, x, r)
            if not progress.finite:
                return Ending(Outcome.NON_FINITE, pairs)
            yield point
            if outcome := progress.reached():
                return Ending(outcome, pairs)
        return Ending(Outcome.STEP_LIMIT, pairs)

    def _check_changing(self, M: ChangingInverse) -> None:
        if not callable(M):
            raise ValueError(f"M={M!r}: give a LinearOperator, or a function (step, pairs) that returns one")

    def _inverse(self, M: ChangingInverse, step: int, pairs: tuple[Pair, ...], size: int) -> LinearOperator:
        inverse = M(step, pairs)
        if not isinstance(inverse, LinearOperator):
            raise ValueError(f"M({step}, pairs) returned {inverse!r}: it must return a LinearOperator")
        return checked_inverse(inverse, size, type(self).__name__)


@dataclass(frozen=True)
class MinRes(KrylovSolver):
    """Minimal residuals for a symmetric operator, which may be indefinite or singular.

    Paige and Saunders (1975): x_k minimises r'Mr, r = b - A x, over x_0 + K_k(MA, M r_0); without a
    preconditioner that is ||b - A x||. Lanczos vectors and two rotations a step: one product with A and one with M.

    Negative curvature is no failure. It is noticed at no cost (Liu and Roosta, 2022): with the rotations'
    scalars, u'Au = -phi_{k-1}^2 c_{k-1} gamma_k for u = M r_{k-1}, and A is positive definite on the k-th Krylov space
    if and only if -c_{i-1} gamma_i > 0 for every i <= k. The path's ``met`` is then `Outcome.INDEFINITE`.

    In an iterate, ``residual`` is ||b - A x|| and ``model`` is q(x), whatever M is. Only r'Mr is sure to fall; for a
    positive definite A without preconditioner q falls too (Fong and Saunders, 2012). ``RelativeProgress`` therefore
    suits definite operators only; the default rule reads the residual. The pairs are (v, Av) of the Lanczos vectors,
    of either sign of curvature.

    A Krylov space that is exhausted with a residual left (a singular A, and a b outside its range) ends the run with
    `Outcome.EXHAUSTED`, at a solution of least residual.

    >>> import torch
    >>> from quadric.linalg.operator import Diagonal
    >>> path = MinRes().solve(Diagonal(torch.tensor([2.0, -4.0])), torch.ones(2))
    >>> path.last.x, path.met.name
    (tensor([ 0.5000, -0.2500]), 'INDEFINITE')
    """

    stop: Truncation = field(default_factory=Residual)

    def run(
        self,
        A: LinearOperator,
        M: LinearOperator | ChangingInverse,
        x: Float[Tensor, " n"],
        r: Float[Tensor, " n"],
        progress: Progress,
    ) -> Generator[Iterate, None, Ending]:
        inverse, met = fixed(M), None
        pairs: tuple[Pair, ...] = ()
        negligible = 10 * torch.finfo(r.dtype).eps  # of a Lanczos coefficient, beside the largest
        yield progress.at(0, x, r)
        z, v = r, inverse @ r
        square = dot(z, v)
        if not progress.solved and square <= 0:
            return Ending(Outcome.INDEFINITE_PRECONDITIONER)
        beta = phi = math.sqrt(abs(square))
        scale = previous_beta = 0.0
        c, s, delta_next, epsilon = -1.0, 0.0, 0.0, 0.0
        previous_z, w, previous_w = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
        for step in range(1, self.max_steps + 1):
            if progress.solved:
                return Ending(Outcome.CONVERGED, pairs, met)
            if beta <= negligible * scale:
                return Ending(Outcome.EXHAUSTED, pairs, met)
            v = v / beta
            Av = A @ v
            y = Av - (beta / previous_beta) * previous_z if step > 1 else Av
            alpha = dot(v, y)
            previous_z, z = z, y - (alpha / beta) * z
            following = inverse @ z
            square = dot(z, following)
            if not math.isfinite(alpha) or not math.isfinite(square):
                return Ending(Outcome.NON_FINITE, pairs, met)
            previous_beta, beta = beta, math.sqrt(abs(square))
            scale = max(scale, abs(alpha), beta)
            if square < 0 and beta > negligible * scale:
                return Ending(Outcome.INDEFINITE_PRECONDITIONER, pairs, met)
            pairs = self._select(pairs, step, v, Av)

            delta, gamma_bar, epsilon_next = c * delta_next + s * alpha, s * delta_next - c * alpha, s * beta
            if -c * gamma_bar <= 0:
                met = Outcome.INDEFINITE
            gamma = math.hypot(gamma_bar, beta)
            if gamma <= negligible * scale:
                return Ending(Outcome.EXHAUSTED, pairs, met)
            delta_next = -c * beta
            c, s = gamma_bar / gamma, beta / gamma
            previous_w, w = w, (v - epsilon * previous_w - delta * w) / gamma
            epsilon, v = epsilon_next, following
            x = x + (c * phi) * w
            r = (s * s) * r - (c * phi / gamma) * z
            phi = s * phi
            point = progress.at(step, x, r)
            if not progress.finite:
                return Ending(Outcome.NON_FINITE, pairs, met)
            yield point
            if outcome := progress.reached():
                return Ending(outcome, pairs, met)
        return Ending(Outcome.STEP_LIMIT, pairs, met)
