"""Where a set of utterances comes from: each source gives a corpus and, where there is no audio, its features."""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from quadric.progress import Progress
from quadric.speech.an4 import read_an4
from quadric.speech.corpus import Corpus, read_data_dir
from quadric.speech.digit_strings import render_strings
from quadric.speech.feature_store import FeatureStore
from quadric.speech.synthesis import DigitCorpus, synthesise
from quadric.speech.tables import read_lines

Split = Literal["train", "dev", "test"]


class Material(NamedTuple):
    """A corpus; ``features`` where it came with them instead of audio."""

    corpus: Corpus
    features: Mapping[str, np.ndarray] | None


def material(corpus: Corpus) -> Material:
    """A corpus with audio, or with the features that it names."""
    has_audio = all(utterance.audio is not None for utterance in corpus)
    return Material(corpus, None if has_audio else FeatureStore.from_corpus(corpus))


class Source(ABC):
    """A set of utterances that is yet to be read, rendered or synthesised."""

    @abstractmethod
    def load(self, cache: Path, *, jobs: int, progress: Progress) -> Material:
        """Reads the set; what has to be made first is made in ``cache``, once."""


@dataclass(frozen=True)
class KaldiDirectory(Source):
    """A Kaldi data directory with audio (``wav.scp``) or features (``feats.scp``).

    Attributes:
        path: the directory.
        root: what relative paths inside start from; default: found.
        allow_commands: run the shell commands of ``wav.scp``.
        on_mismatch: ``"error"``, or ``"drop"`` utterances that are not in every table.
        on_empty: ``"error"``, or ``"drop"`` utterances without words.
        keep: a file of utterance ids, one a line; the others are left out.
    """

    path: Path
    root: Path | None = None
    allow_commands: bool = False
    on_mismatch: Literal["error", "drop"] = "error"
    on_empty: Literal["error", "drop"] = "error"
    keep: Path | None = None

    def load(self, cache: Path, *, jobs: int, progress: Progress) -> Material:
        corpus = read_data_dir(
            self.path,
            root=self.root,
            allow_commands=self.allow_commands,
            on_mismatch=self.on_mismatch,
            on_empty=self.on_empty,
        )
        if self.keep is not None:
            if not self.keep.is_file():
                raise FileNotFoundError(f"keep={self.keep}: there is no such file; write one utterance id a line")
            kept = corpus.subset(id for line in read_lines(self.keep) for id in line.split())
            corpus = replace(kept, left_out={})  # what is not to be kept was not lost
        return material(corpus)


@dataclass(frozen=True)
class DigitStrings(Source):
    """Connected digits rendered from the Free Spoken Digit Dataset by the data set's own tool.

    Attributes:
        data: the data set's folder.
        split: of its lists.
    """

    data: Path
    split: Split

    def load(self, cache: Path, *, jobs: int, progress: Progress) -> Material:
        return Material(read_data_dir(render_strings(self.data, self.split, cache / f"strings-{self.split}")), None)


@dataclass(frozen=True)
class An4(Source):
    """The AN4 corpus as ready-made cepstra.

    Attributes:
        data: folder of ``train.npz``, ``dev.npz`` and ``test.npz``.
        split: one of them.
    """

    data: Path
    split: Split

    def load(self, cache: Path, *, jobs: int, progress: Progress) -> Material:
        return Material(*read_an4(self.data, self.split))


@dataclass(frozen=True)
class SpokenDigits(Source):
    """Connected digits spoken by the built-in synthesiser.

    Attributes:
        corpus: what to synthesise.
        split: voices are disjoint between splits.
    """

    split: Split
    corpus: DigitCorpus = field(default_factory=DigitCorpus)

    def load(self, cache: Path, *, jobs: int, progress: Progress) -> Material:
        made = synthesise(self.corpus, cache, jobs=jobs, progress=progress)
        return Material(read_data_dir(made / self.split), None)


SPLITS: tuple[Split, ...] = typing.get_args(Split)
