"""Connected strings of the Free Spoken Digit Dataset: real speakers, unseen in training."""

from __future__ import annotations

from pathlib import Path

from quadric.data.augment import SpecAugment
from quadric.speech.features import Fbank
from quadric.train.method import FirstOrder, HessianFree
from quadric.train.recipe import Decoding, FlatStart, Job, Network
from quadric.train.sources import DigitStrings


def fsdd(data: Path, seed: int = 0) -> Job:
    """Digit strings of the Free Spoken Digit Dataset, 8 kHz: three training speakers, others for dev and test.

    Args:
        data: the data set's folder (``strings/``, ``data/``, ``flac/``), with ``make_strings.py`` in it or above it.
        seed: of everything random.
    """
    return Job(
        name="fsdd",
        train=DigitStrings(data, "train"),
        dev=DigitStrings(data, "dev"),
        test=DigitStrings(data, "test"),
        fbank=Fbank(rate=8000),
        speeds=(0.85, 1.0, 1.15),
        autocast=True,
        augment=SpecAugment(),
        flat_start=FlatStart(rounds=2),
        network=Network(
            "tdnn", (256,) * 3, offsets=((-2, -1, 0, 1, 2), (-3, 0, 3), (-6, 0, 6)), dropout=0.2, norm="none"
        ),
        first_order=FirstOrder(epochs=2),
        hessian_free=HessianFree(
            epochs=0.5, gradient_frames=60_000, curvature_frames=10_000, damping=0.3, max_steps=10
        ),
        decoding=Decoding(lm_weights=(3.0, 5.0, 8.0, 12.0), word_penalties=(-1.0, 0.0, 1.0)),
        seed=seed,
    )
