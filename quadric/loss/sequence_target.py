"""What a sequence loss needs of one utterance, and how much of its curvature it may use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int32

from quadric.lattice.lattice import Lattice, StatePath

Teacher = tuple[Int32[np.ndarray, " T K"], Float[np.ndarray, " T K"]]
"""The likeliest pdfs of every frame by another model, and their probabilities: what is missing to 1 is the others'."""

TOLERANCE = 1e-3
"""Of a sum of probabilities."""


class OutputCurvature(Enum):
    """Which matrix stands for the second derivatives of a sequence criterion in the outputs.

    With the acoustic scale k, the occupancies c of a frame's pdfs, and the criterion's derivative g in its scores
    (for MMI, that of log Z: g = c). For MMI the first three are one matrix.
    """

    SAME_FRAME = "k^2 (diag(g) - g c' - c g'): the Hessian's blocks of one frame; indefinite for MPE and sMBR"
    PRINTED = "k^2 (diag(g) - g c'): as the papers print it, which for MPE and sMBR is not symmetric"
    SURROGATE = "k^2 (diag(c) - c c'): that of log Z for every criterion, positive semi-definite"
    LATTICE = "the Hessian with the terms across frames; one pass over the lattice for each product"


@dataclass(frozen=True, eq=False)
class SequenceTarget:
    """One utterance for a sequence loss; made by the loss's ``target``. ``len`` is its frames.

    Args:
        lattice: the likely paths.
        reference: what was said, aligned.
        value: of every arc: its accuracy. None for MMI.
        most: the reference's own accuracy.
        teacher: another model's likeliest pdfs and probabilities, or None.
        boosted: for boosted MMI: the lattice with the weights of its arcs lowered by their accuracies.

    Raises:
        ValueError: parts of different lengths; a teacher's pdfs that are not different ones, or probabilities of it
            that are none.
    """

    lattice: Lattice
    reference: StatePath
    value: Float32[np.ndarray, " A"] | None = None
    most: float = 0.0
    teacher: Teacher | None = None
    boosted: Lattice | None = None

    def __post_init__(self) -> None:
        frames = len(self.lattice)
        if len(self.reference) != frames:
            raise ValueError(
                f"reference has {len(self.reference)} frames, the lattice {frames}: they must be of one utterance"
            )
        if self.value is not None and self.value.shape != (self.lattice.num_arcs,):
            raise ValueError(f"value has shape {self.value.shape}, the lattice {self.lattice.num_arcs} arcs")
        if self.boosted is not None and self.boosted.num_arcs != self.lattice.num_arcs:
            raise ValueError(f"boosted has {self.boosted.num_arcs} arcs, the lattice {self.lattice.num_arcs}")
        if self.teacher is not None:
            self._check_teacher(*self.teacher)

    def _check_teacher(self, pdfs: np.ndarray, probabilities: np.ndarray) -> None:
        frames = len(self.lattice)
        if pdfs.ndim != 2 or pdfs.shape != probabilities.shape or len(pdfs) != frames:
            raise ValueError(
                f"teacher must be pdfs and probabilities [{frames}, K], not {list(pdfs.shape)} and "
                f"{list(probabilities.shape)}"
            )
        sums = probabilities.sum(1, dtype=np.float64)
        worst = int(sums.argmax())
        if not np.all(probabilities >= 0.0) or not np.all(sums <= 1.0 + TOLERANCE):
            raise ValueError(
                f"teacher's probabilities must not be negative and sum to at most 1 in every frame; frame {worst} sums "
                f"to {sums[worst]:g}: give them as the softmax over all pdfs does"
            )
        if not np.diff(np.sort(pdfs, 1)).all():
            raise ValueError("teacher lists a pdf twice in a frame: give every pdf once")

    def __len__(self) -> int:
        return len(self.lattice)

    @cached_property
    def unlisted(self) -> float:
        """The most that the teacher gives, in any frame, to the pdfs that it does not list."""
        return 0.0 if self.teacher is None else float(1.0 - self.teacher[1].sum(1, dtype=np.float64).min())

    @cached_property
    def num_pdfs(self) -> int:
        """The fewest outputs a model may have."""
        known = [self.lattice.num_pdfs, int(self.reference.pdf.max()) + 1]
        return max(known if self.teacher is None else [*known, int(self.teacher[0].max()) + 1])
