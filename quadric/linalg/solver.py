"""What Krylov solvers share, as an optimiser needs them: truncated, warm-started, with the path remembered.

Their iterates are candidates for a step, so a path of them is kept, and whatever goes wrong is an `Outcome` beside the
best iterate found until then.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from quadric.linalg.operator import Identity, LinearOperator
from quadric.linalg.pairs import Pair, PairSelection
from quadric.linalg.truncation import RelativeProgress, Truncation
from quadric.linalg.vector import dot
from quadric.options import check_whole
from quadric.outcome import Outcome


@dataclass(frozen=True)
class Iterate:
    """One point of a Krylov path.

    Attributes:
        step: how many products with A led here (0 is the start).
        x: the point; the solver never writes to it again.
        model: q(x) = 1/2 x'Ax - b'x.
        residual: ||b - A x||.
    """

    step: int
    x: Float[Tensor, " n"]
    model: float
    residual: float


@dataclass(frozen=True)
class Path:
    """What a solve leaves behind.

    Attributes:
        points: stored iterates, the last of them the final one.
        outcome: how it ended.
        pairs: curvature pairs (p, Ap) of the run, as the solver's ``pairs`` selects them; oldest first.
        met: what was met on the way and is no failure (`MinRes`: `Outcome.INDEFINITE`).
    """

    points: tuple[Iterate, ...]
    outcome: Outcome
    pairs: tuple[Pair, ...] = ()
    met: Outcome | None = None

    @property
    def last(self) -> Iterate:
        return self.points[-1]

    @property
    def steps(self) -> int:
        """Products with A that led to the last point."""
        return self.last.step


ChangingInverse = Callable[[int, tuple[Pair, ...]], LinearOperator]
"""A preconditioner that may change: the inverse's action after so many products, given the pairs kept until then."""


@dataclass(frozen=True)
class Ending:
    """How a run ended, and what it leaves beside its iterates (see `Path`)."""

    outcome: Outcome
    pairs: tuple[Pair, ...] = ()
    met: Outcome | None = None


class Progress:
    """The model values and residual norms of a run so far, as its truncation rule reads them."""

    def __init__(self, b: Float[Tensor, " n"], stop: Truncation) -> None:
        self.b, self.stop = b, stop
        self.models: list[float] = []
        self.residuals: list[float] = []

    def at(self, step: int, x: Float[Tensor, " n"], r: Float[Tensor, " n"]) -> Iterate:
        """The iterate at x, whose residual vector is r; q(x) = -1/2 x'(b + r)."""
        self.models.append(-0.5 * dot(x, self.b + r))
        self.residuals.append(math.sqrt(dot(r, r)))
        return Iterate(step, x, self.models[-1], self.residuals[-1])

    @property
    def finite(self) -> bool:
        return math.isfinite(self.models[-1])

    @property
    def solved(self) -> bool:
        """The residual is zero: there is nowhere to go on to."""
        return self.residuals[-1] == 0

    def reached(self) -> Outcome | None:
        return self.stop.reached(self.models, self.residuals)


@dataclass(frozen=True)
class KrylovSolver(ABC):
    """A x = b for a symmetric operator, from products with A alone.

    Attributes:
        max_steps: products with A at most.
        stop: the truncation rule.
        storage_ratio: iterates are stored at steps ceil(ratio^j), and the final one always.
        pairs: which curvature pairs of the run to hand over in the path; None holds none.
    """

    max_steps: int = 250
    stop: Truncation = field(default_factory=RelativeProgress)
    storage_ratio: float = 1.3
    pairs: PairSelection | None = None

    def __post_init__(self) -> None:
        check_whole(max_steps=self.max_steps)
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: at least one step is needed")
        if self.storage_ratio <= 1:
            raise ValueError(f"storage_ratio={self.storage_ratio}: must be over 1, for example 1.3")

    @abstractmethod
    def run(
        self,
        A: LinearOperator,
        M: LinearOperator | ChangingInverse,
        x: Float[Tensor, " n"],
        r: Float[Tensor, " n"],
        progress: Progress,
    ) -> Generator[Iterate, None, Ending]:
        """The method itself: every iterate from the start x on, whose residual vector is r.

        For those who write a solver. The arguments are checked, b is not zero; ``progress.at`` makes the iterates.
        """

    def iterates(
        self,
        A: LinearOperator,
        b: Float[Tensor, " n"],
        *,
        x0: Float[Tensor, " n"] | None = None,
        M: LinearOperator | ChangingInverse | None = None,
    ) -> Iterator[Iterate | Outcome]:
        """Every iterate from the start on; ends with the `Outcome`.

        Args:
            A: symmetric; positive definite where the solver needs it.
            b: right-hand side.
            x0: start (default: zero).
            M: the action of the preconditioner's INVERSE, symmetric positive definite. `FlexibleCG`, and it alone,
                also takes one that changes.

        Raises:
            ValueError: A or M is not declared symmetric, shapes do not agree, or M changes and the solver is fixed.
        """
        for item in self._walk(A, b, x0, M):
            yield item.outcome if isinstance(item, Ending) else item

    def solve(
        self,
        A: LinearOperator,
        b: Float[Tensor, " n"],
        *,
        x0: Float[Tensor, " n"] | None = None,
        M: LinearOperator | ChangingInverse | None = None,
    ) -> Path:
        """Runs `iterates` to its end and stores the iterates at geometrically spaced steps and the final one."""
        stored: list[Iterate] = []
        store_at, current = 1.0, None
        for item in self._walk(A, b, x0, M):
            if isinstance(item, Ending):
                if current is not None and (not stored or stored[-1] is not current):
                    stored.append(current)
                return Path(tuple(stored), item.outcome, item.pairs, item.met)
            current = item
            if item.step >= math.ceil(store_at):
                stored.append(item)
                while math.ceil(store_at) <= item.step:
                    store_at *= self.storage_ratio
        raise AssertionError("a run ended without an outcome")

    def _walk(
        self, A: LinearOperator, b: Tensor, x0: Tensor | None, M: LinearOperator | ChangingInverse | None
    ) -> Iterator[Iterate | Ending]:
        M = M if M is not None else Identity(A.size)
        self._check(A, b, x0, M)
        if not bool(b.any()):
            yield Iterate(0, torch.zeros_like(b), 0.0, 0.0)
            yield Ending(Outcome.ZERO_RIGHT_HAND_SIDE)
            return
        warm = x0 is not None and bool(x0.any())
        x = x0.clone() if warm and x0 is not None else torch.zeros_like(b)
        r = b - A @ x if warm else b.clone()
        yield (yield from self.run(A, M, x, r, Progress(b, self.stop)))

    def _check(self, A: LinearOperator, b: Tensor, x0: Tensor | None, M: LinearOperator | ChangingInverse) -> None:
        name = type(self).__name__
        if not A.symmetric:
            raise ValueError(f"A is not symmetric: {name} would not solve it; symmetrise A first")
        if b.shape != (A.size,) or (isinstance(M, LinearOperator) and M.size != A.size):
            size = f" and M size {M.size}" if isinstance(M, LinearOperator) else ""
            raise ValueError(f"b has shape {tuple(b.shape)}{size}, A acts on ({A.size},): give all of them one size")
        if x0 is not None and x0.shape != b.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)}, b {tuple(b.shape)}: give both one size")
        if isinstance(M, LinearOperator):
            checked_inverse(M, A.size, name)
        else:
            self._check_changing(M)

    def _check_changing(self, M: ChangingInverse) -> None:
        raise ValueError(
            f"M={M!r}: {type(self).__name__} needs one preconditioner throughout; give a LinearOperator, or solve with "
            "FlexibleCG, which lets it change"
        )

    def _select(self, pairs: tuple[Pair, ...], step: int, s: Tensor, y: Tensor) -> tuple[Pair, ...]:
        return pairs if self.pairs is None else self.pairs.keep(pairs, Pair(step, s, y))


def checked_inverse(M: LinearOperator, size: int, solver: str) -> LinearOperator:
    """M, if the solver can use it as the inverse of a preconditioner."""
    if not M.symmetric:
        raise ValueError(f"M is not symmetric: {solver} would not solve with it; symmetrise M first")
    if M.size != size:
        raise ValueError(f"M has size {M.size}, A acts on ({size},): give both one size")
    return M


def fixed(M: LinearOperator | ChangingInverse) -> LinearOperator:
    """M of a solver whose preconditioner cannot change, as its type says after the check."""
    assert isinstance(M, LinearOperator)
    return M
