"""Curvature pairs (s, y = A s) that a Krylov run leaves behind, and which of them to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from quadric.linalg.vector import dot
from quadric.options import check_whole


@dataclass(frozen=True, eq=False)
class Pair:
    """A direction and what the operator makes of it.

    Of a run of conjugate gradients, s = p_k and y = A p_k: up to the factor alpha_k, which a BFGS update does not see,
    the step x_{k+1} - x_k and the change of the gradient of q along it (Morales and Nocedal, 2000). The
    inner products are computed once, when asked for.

    Attributes:
        step: the iteration it comes from, from 1 on.
        s: the direction.
        y: A s.
    """

    step: int
    s: Float[Tensor, " n"]
    y: Float[Tensor, " n"]

    @cached_property
    def ss(self) -> float:
        """s's."""
        return dot(self.s, self.s)

    @cached_property
    def sy(self) -> float:
        """s'y, the curvature along s."""
        return dot(self.s, self.y)

    @cached_property
    def yy(self) -> float:
        """y'y."""
        return dot(self.y, self.y)


class PairSelection(ABC):
    """Which pairs of a run to keep; a run holds these and no others (two vectors each)."""

    @abstractmethod
    def keep(self, held: tuple[Pair, ...], new: Pair) -> tuple[Pair, ...]:
        """What to hold after ``new``, oldest first. A run offers every iteration's pair, in order."""


@dataclass(frozen=True)
class LastPairs(PairSelection):
    """The last pairs of a run.

    Args:
        memory: how many; with the solver's ``max_steps``, all of them.
    """

    memory: int = 16

    def __post_init__(self) -> None:
        _check(self.memory)

    def keep(self, held: tuple[Pair, ...], new: Pair) -> tuple[Pair, ...]:
        return (*held, new)[-self.memory :]


@dataclass(frozen=True)
class SpreadPairs(PairSelection):
    """Pairs spread evenly over a run whose length is not known beforehand.

    In the manner of SAMPLE in Morales and Nocedal (2000): with the memory full of steps 1, 1 + d, 1 + 2d, ..., only
    every second further step of that spacing is taken, each in the place of the oldest that lies between two of the
    wider spacing 2d. The memory stays full from then on, and its gaps are d and 2d.

    Args:
        memory: how many.

    >>> import torch
    >>> held = ()
    >>> for step in range(1, 10):
    ...     held = SpreadPairs(4).keep(held, Pair(step, torch.ones(1), torch.ones(1)))
    >>> [pair.step for pair in held]
    [1, 5, 7, 9]
    """

    memory: int = 16

    def __post_init__(self) -> None:
        _check(self.memory)

    def keep(self, held: tuple[Pair, ...], new: Pair) -> tuple[Pair, ...]:
        if len(held) < self.memory:
            return (*held, new)
        if self.memory == 1:
            return held
        first = held[0].step
        spacing = held[1].step - first
        if all((pair.step - first) % spacing == 0 for pair in held):
            spacing *= 2
        if (new.step - first) % spacing:
            return held
        between = next(i for i, pair in enumerate(held) if (pair.step - first) % spacing)
        return (*held[:between], *held[between + 1 :], new)


def _check(memory: int) -> None:
    check_whole(memory=memory)
    if memory < 1:
        raise ValueError(f"memory={memory}: at least one pair; to keep none, give the solver pairs=None")
