"""Preconditioners of a descent's solver: what makes its system easier, from the gradient pass or earlier solves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from quadric.linalg.lbfgs import LBFGSInverse
from quadric.linalg.operator import LinearOperator
from quadric.linalg.pairs import LastPairs, Pair, PairSelection
from quadric.linalg.solver import ChangingInverse
from quadric.objective.objective import Objective
from quadric.optim.descent import LocalModel


class Preconditioner(ABC):
    """Gives the inverse of a preconditioner for every step; ``pairs`` says what it wants of the solve before."""

    pairs: PairSelection | None = None

    @abstractmethod
    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        """The inverse's action, or None for a step without.

        Args:
            objective: the only one who sees data.
            local: the quadratic model to be solved.
            pairs: (p, B p) of the previous solve, oldest first; none in the first step.
            damping: lambda.
        """


@dataclass(frozen=True)
class LBFGS(Preconditioner):
    """The L-BFGS inverse built from the pairs of the previous solve (Sainath et al., 2013; Morales and Nocedal, 2000).

    The first step is not preconditioned.

    Attributes:
        pairs: which of them.
    """

    pairs: PairSelection = field(default_factory=LastPairs)

    def operator(
        self, objective: Objective, local: LocalModel, pairs: tuple[Pair, ...], damping: float
    ) -> LinearOperator | ChangingInverse | None:
        return LBFGSInverse(pairs, objective.space.size) if pairs else None
