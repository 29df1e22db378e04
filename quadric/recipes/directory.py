"""Your own corpus, in Kaldi data directories."""

from __future__ import annotations

from pathlib import Path

from quadric.data.augment import SpecAugment
from quadric.train.recipe import Job
from quadric.train.sources import KaldiDirectory


def directory(data: Path, lexicon: Path, train: str = "train", dev: str = "dev", test: str = "test") -> Job:
    """Your own corpus: Kaldi data directories and a lexicon.

    Args:
        data: folder of the data directories.
        lexicon: pronunciations, ``WORD P1 P2 ...`` a line.
        train: name of the training directory in ``data``.
        dev: of the development directory.
        test: of the test directory.
    """
    return Job(
        name=data.resolve().name,
        train=KaldiDirectory(data / train),
        dev=KaldiDirectory(data / dev),
        test=KaldiDirectory(data / test),
        lexicon=lexicon,
        augment=SpecAugment(),
    )
