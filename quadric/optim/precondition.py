"""Preconditioners of a descent's solver: what makes its system easier, from the gradient pass or earlier solves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from quadric.linalg.lbfgs import LBFGSInverse
from quadric.linalg.operator import Diagonal, LinearOperator
from quadric.linalg.pairs import LastPairs, Pair, PairSelection
from quadric.linalg.solver import ChangingInverse
from quadric.objective.objective import Objective
from quadric.optim.descent import LocalModel
from quadric.options import check_whole


class Preconditioner(ABC):
    """Gives the inverse of a preconditioner for every step.

    ``pairs`` says what it wants of the solve before; ``changes`` whether its inverse changes within a solve: the solver
    must then be a `FlexibleCG`.
    """

    pairs: PairSelection | None = None
    changes: bool = False

    @abstractmethod
    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        """The inverse's action, or None for a step without.

        Args:
            objective: the only one who sees data.
            local: the quadratic model to be solved.
            pairs: (p, B p) of the previous solve, oldest first; none in the first step.
            damping: what is added to the diagonal of the matrix that is solved with.
        """


@dataclass(frozen=True)
class LBFGS(Preconditioner):
    """The L-BFGS inverse built from the pairs of the previous solve (Sainath et al., 2013; Morales and Nocedal, 2000).

    The first step is not preconditioned.

    Attributes:
        pairs: which of them.
        changes: take those of the solve under way as well, as they come: for flexible conjugate gradients.
    """

    pairs: PairSelection = field(default_factory=LastPairs)
    changes: bool = False

    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        size = objective.space.size
        if self.changes:
            return lambda step, new: LBFGSInverse((*pairs, *new), size)
        return LBFGSInverse(pairs, size) if pairs else None


@dataclass(frozen=True)
class FisherDiagonal(Preconditioner):
    """M = (diag(F) + lambda I)^exponent with the empirical Fisher matrix F (Martens, 2010, section 4.7).

    Attributes:
        exponent: 0.75 in the paper.
        draws: of the estimate of the diagonal (`Objective.fisher_diagonal`).
        floor: added to lambda, as a share of the diagonal's mean: without it M is singular where lambda is 0 and a
            gradient vanishes.
    """

    exponent: float = 0.75
    draws: int = 4
    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.exponent <= 1:
            raise ValueError(f"exponent={self.exponent}: must be over 0 and at most 1; the paper's is 0.75")
        check_whole(draws=self.draws)
        if self.draws < 1:
            raise ValueError(f"draws={self.draws}: at least one is needed")

    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        diagonal = objective.fisher_diagonal(local.theta, self.draws)
        floor = damping + self.floor * float(diagonal.mean())
        if not floor > 0:
            return None
        return Diagonal((diagonal + floor).pow_(-self.exponent))


@dataclass(frozen=True)
class SharedCounts(Preconditioner):
    """M = diag(n) with the number n_i of uses of each parameter for a frame (Haider et al., 2021, section 4.3).

    The paper divides gradients and products by n: the same Krylov space, but not symmetric in the inner products that
    conjugate gradients take. This is the symmetric form.
    """

    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        return Diagonal(objective.shared_counts(local.theta).reciprocal_())
