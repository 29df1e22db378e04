"""The plan of a training: how much data it sees, how often it is judged, and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quadric.data.examples import Stream
from quadric.optim.sampling import Sampler, Seen
from quadric.options import check_whole


@dataclass(frozen=True)
class Plan:
    """How much data, how often judged.

    Attributes:
        epochs: passes over the training data, by gradients.
        sampler: how much data each update sees; its curvature's is drawn from the whole set.
        evaluations: of the held-out data, evenly spaced over the run, besides the one before it.
        autocast: compute matrix products in bfloat16.
        seed: of dropout.
        patience: evaluations in a row without a lower held-out loss after which training ends early; None: it never
            does.
    """

    epochs: float
    sampler: Sampler
    evaluations: int = 20
    autocast: bool = False
    seed: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        whole = {"evaluations": self.evaluations} | ({} if self.patience is None else {"patience": self.patience})
        check_whole(**whole)
        for name, value in {"epochs": self.epochs, **whole}.items():
            if not value > 0:
                raise ValueError(f"{name}={value}: must be positive")

    def updates(self, stream: Stream) -> int:
        """Optimiser steps from the beginning of ``stream`` to the end.

        Exactly, or at most where the sampler looks at the gradient or patience may end.
        """
        total, holds = stream.total_frames, stream.rehearsal()
        updates, drawn, last = 0, 0, None
        while not self.done(drawn, total):
            last = self.sampler.sizes(Seen(updates, total, last, noise=0.0))
            updates, drawn = updates + 1, drawn + holds(last.gradient)
        return updates

    def done(self, drawn: int, total_frames: int) -> bool:
        """Whether gradients of ``drawn`` frames are all."""
        return drawn >= self.epochs * total_frames

    def looks(self, drawn: int, total_frames: int) -> int:
        """How often the held-out data is looked at in the first ``drawn`` frames."""
        return min(self.evaluations, math.floor(self.evaluations * drawn / (self.epochs * total_frames)))
