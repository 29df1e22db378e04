"""English read by Mandarin speakers: speechocean762."""

from __future__ import annotations

from pathlib import Path

from quadric.data.augment import SpecAugment
from quadric.speech.features import Fbank
from quadric.speech.tree import TreeOptions
from quadric.train.recipe import FirstOrder, HessianFree, Job, Network
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
        tree=TreeOptions(leaves=800),
        augment=SpecAugment(),
        network=Network("tdnn", (640,) * 5, dropout=0.1),
        adam=FirstOrder(epochs=8),
        hessian_free=HessianFree(epochs=8),
        autocast=True,
        seed=seed,
    )
