"""Every way a numerical step can end, each with the sentence its user reads.

A numerical failure is data: it travels in the result and is reported once. It is never an exception, and never
silence.
"""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """How a solve or a step ended. ``str(outcome)`` is the sentence to show."""

    CONVERGED = "the residual fell below the tolerance"
    TRUNCATED = "the relative progress per iteration fell below the tolerance"
    STEP_LIMIT = "the iteration limit was reached"
    ZERO_RIGHT_HAND_SIDE = "the right-hand side is zero: the gradient vanishes here"
    NEGATIVE_CURVATURE = "a direction of no positive curvature was met: the best iterate before it was kept"
    INDEFINITE = "a direction of no positive curvature was met, which is no obstacle to least residuals"
    INDEFINITE_PRECONDITIONER = "the preconditioner is not positive definite: the best iterate before it was kept"
    EXHAUSTED = "the Krylov space is exhausted: the residual cannot be made smaller"
    NON_FINITE = "a product or an inner product was not finite: the best iterate before it was kept"
    NON_FINITE_OBJECTIVE = (
        "the loss or its gradient is not finite where the parameters are, which stay as they were: look for NaN or "
        "infinity in them and in the data"
    )
    ACCEPTED = "the step was accepted"
    NO_DECREASE = "no point of the path lowers the objective: the step was rejected"

    def __str__(self) -> str:
        return self.value
