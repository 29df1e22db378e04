"""English read by Mandarin speakers: speechocean762."""

from __future__ import annotations

from pathlib import Path

from quadric.data.augment import SpecAugment
from quadric.speech.features import Fbank
from quadric.speech.tree import TreeOptions
from quadric.train.method import FirstOrder, HessianFree
from quadric.train.recipe import Decoding, FlatStart, Job, Network
from quadric.train.sources import KaldiDirectory


def speechocean(data: Path, seed: int = 0) -> Job:
    """speechocean762: sentences read by learners, 16 kHz, closed lexicon of 2,604 words, training-text bigram.

    Args:
        data: the data set's folder (``data/``, ``flac/``, ``lexicon.txt``).
        seed: of everything random.
    """
    return Job(
        name="speechocean",
        train=KaldiDirectory(data / "data" / "train"),
        dev=KaldiDirectory(data / "data" / "dev"),
        test=KaldiDirectory(data / "data" / "test"),
        lexicon=data / "lexicon.txt",
        fbank=Fbank(high=-400.0),
        speeds=(0.9, 1.0, 1.1),
        flat_start=FlatStart(rounds=3),
        realign=FirstOrder(epochs=1, gradient_frames=1024),
        tree=TreeOptions(leaves=800),
        network=Network("tdnn", (512,) * 5, dropout=0.1),
        augment=SpecAugment(),
        chunk=80,
        first_order=FirstOrder(epochs=6, gradient_frames=1024),
        hessian_free=HessianFree(epochs=1, gradient_frames=120_000, curvature_frames=10_000, max_steps=12),
        decoding=Decoding(11.0, 2000, lm_weights=(8.0, 9.0, 10.0, 11.0, 12.0), word_penalties=(0.0, 0.5, 1.0, 1.5)),
        autocast=True,
        seed=seed,
    )
