"""What workers and a parameter server say to each other: plain records that travel by pickle without copies."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from quadric.comm.message import Message

Vector = Float[np.ndarray, " n"]

NO_UNIT = -1
"""The unit of a push that is of no unit of data."""


class Verdict(Enum):
    """What became of a push. ``str(verdict)`` is the sentence to show."""

    APPLIED = "applied"
    REPEATED = "it had been applied before"
    DUPLICATE = "its unit of data had been applied before, by another"
    STALE = "its parameters were older than the bound on staleness"
    NOT_FINITE = "it was not finite"
    SUPERSEDED = "its worker has been replaced"
    DROPPED = "its worker had sent too many that were not finite"

    def __str__(self) -> str:
        return self.value

    @property
    def settles(self) -> bool:
        """Whether nothing is left to be done about the unit of data."""
        return self in (Verdict.APPLIED, Verdict.REPEATED, Verdict.DUPLICATE, Verdict.NOT_FINITE)

    @property
    def arrived(self) -> bool:
        """Whether the push is in the parameters."""
        return self in (Verdict.APPLIED, Verdict.REPEATED)


class Push(NamedTuple):
    """A part of a gradient, or of what a worker sends in its place, for one shard.

    Attributes:
        worker, incarnation, sequence: who sends it, the how-manieth process of that worker it is, and the how-manieth
            push of that: a shard applies each such triple once.
        unit: the unit of data it is of, applied once whoever sends it, or `NO_UNIT`.
        life, clock: of the parameters it was computed at.
        content: [n] of the parameters' type, a compressed `Message`, or None for a gradient that is not finite.
    """

    worker: int
    incarnation: int
    sequence: int
    unit: int
    life: int
    clock: int
    content: Vector | Message | None


class Answer(NamedTuple):
    """Of a shard.

    Attributes:
        verdict: on the push; None where there was none.
        staleness: how many pushes were applied after the parameters that this one was computed at.
        life: how often the shard has been started.
        clock: pushes applied so far.
        rate: by which a plain step on a gradient would be multiplied, where the shard's rule takes such steps.
        theta: its parameters.
    """

    verdict: Verdict | None
    staleness: int
    life: int
    clock: int
    rate: float | None
    theta: Vector
