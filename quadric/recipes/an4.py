"""AN4: spelled words and numbers, from ready-made cepstra."""

from __future__ import annotations

from pathlib import Path

from quadric.data.augment import SpecAugment
from quadric.speech.gaussian import GaussianBootstrap
from quadric.train.method import FirstOrder, HessianFree
from quadric.train.recipe import Decoding, FlatStart, Job, Network
from quadric.train.sources import An4


def an4(data: Path, seed: int = 0) -> Job:
    """CMU AN4: spelled names, numbers and commands, 13 cepstra a frame, 101 words.

    Args:
        data: folder of ``train.npz``, ``dev.npz``, ``test.npz`` and ``lexicon.txt``.
        seed: of everything random.
    """
    return Job(
        name="an4",
        train=An4(data, "train"),
        dev=An4(data, "dev"),
        test=An4(data, "test"),
        lexicon=data / "lexicon.txt",
        deltas=2,
        flat_start=FlatStart(gaussian=GaussianBootstrap(cepstra=None)),
        autocast=True,
        augment=SpecAugment(frequency_masks=0),
        network=Network("tdnn", (384,) * 4, offsets=((-2, -1, 0, 1, 2), (-3, 0, 3), (-6, 0, 6), (0,)), dropout=0.2),
        first_order=FirstOrder(epochs=12),
        hessian_free=HessianFree(epochs=8, gradient_frames=40_000, curvature_frames=6_000, damping=0.3, max_steps=12),
        decoding=Decoding(lm_weights=(3.0, 5.0, 8.0, 12.0), word_penalties=(-1.0, 0.0, 1.0)),
        seed=seed,
    )
