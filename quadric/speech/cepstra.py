"""Log filter banks made fit for Gaussians with diagonal covariance."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from quadric.speech.normalisation import deltas


def cepstra(
    features: Float[np.ndarray, "T B"], coefficients: int | None = 13, *, order: int = 1, window: int = 1
) -> Float64[np.ndarray, "T D"]:
    """Cepstral coefficients of log mel energies, and their differences in time up to ``order``.

    An orthonormal discrete cosine transform (type II) decorrelates the bands; the first ``coefficients`` stay, the
    zeroth included (all where there are fewer bands). ``order`` and ``window`` are those of ``deltas``; D is
    coefficients (order + 1). ``coefficients=None``: the features are decorrelated already and stay as they are, without
    further differences.

    >>> cepstra(np.ones((2, 4)), 2).tolist()
    [[2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]
    """
    features = features.astype(np.float64)
    if coefficients is None:
        return features
    if coefficients < 1:
        raise ValueError(f"coefficients={coefficients} must be at least 1, or None for features that are cepstra")
    bands = features.shape[1]
    angles = np.pi / bands * np.outer(np.arange(bands) + 0.5, np.arange(min(coefficients, bands)))
    transform = np.sqrt(2.0 / bands) * np.cos(angles)
    transform[:, 0] = np.sqrt(1.0 / bands)
    return deltas(features @ transform, order, window)
