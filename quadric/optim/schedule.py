"""When the statistics and the inverses of the block-diagonal family are made."""

from __future__ import annotations

from dataclasses import dataclass

from quadric.options import check_whole


@dataclass(frozen=True)
class Schedule:
    """When statistics and inverses are made.

    Attributes:
        statistics: every so many steps (the papers' T1).
        inverses: every so many steps (T2); before that many, after 1, 2, 4, ... steps as well.
        decay: of the moving average of the statistics; as long as they are few, all count the same.
    """

    statistics: int = 1
    inverses: int = 20
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_whole(statistics=self.statistics, inverses=self.inverses)
        for name in ("statistics", "inverses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number of steps, 1 at least")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must be at least 0 and less than 1; the papers have 0.9")

    def refreshes(self, step: int) -> bool:
        """Whether inverses are made in step number ``step``, from 0."""
        return step % self.inverses == 0 or (step < self.inverses and step & (step - 1) == 0)

    def share(self, observed: int) -> float:
        """Of the newest statistics in the average, after ``observed`` others."""
        return max(1 - self.decay, 1 / (observed + 1))
