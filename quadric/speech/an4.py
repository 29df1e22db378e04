"""AN4 as it comes without audio: one npz file of cepstra and transcripts per split."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quadric.speech.corpus import Corpus, Utterance
from quadric.speech.tables import fields

_ARRAYS = ("feats", "lengths", "utts", "spks", "text")


def read_an4(folder: str | os.PathLike[str], split: str) -> tuple[Corpus, Mapping[str, np.ndarray]]:
    """Reads ``<folder>/<split>.npz``: the corpus ``an4-<split>`` and its features, id -> float32 [T, 13].

    The file holds ``feats`` [frames, 13], the utterances one after another, and for each of them its length in
    ``lengths``, its id in ``utts``, its speaker in ``spks`` and its words in ``text``. Features are raw: normalise
    them.

    Raises:
        FileNotFoundError: there is no such file; the message lists the splits that are there.
        ValueError: the file is not of this form.
    """
    path = Path(os.path.abspath(folder)) / f"{split}.npz"
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.npz"))
        raise FileNotFoundError(f"there is no {path}: the folder holds the splits {', '.join(there) or '(none)'}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS if name in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error
    _check(path, arrays)
    utterances = (
        Utterance(str(id), str(speaker), fields(str(words)))
        for id, speaker, words in zip(arrays["utts"], arrays["spks"], arrays["text"], strict=True)
    )
    matrices = np.split(arrays["feats"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1])
    features = {str(id): matrix for id, matrix in zip(arrays["utts"], matrices, strict=True)}
    return Corpus(f"an4-{split}", tuple(utterances)), dict(sorted(features.items()))


def _check(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {', '.join(missing)}: it is not a split of AN4")
    counts = {name: len(arrays[name]) for name in _ARRAYS[1:]}
    frames, total = len(arrays["feats"]), int(arrays["lengths"].sum())
    if len(set(counts.values())) > 1 or frames != total or arrays["feats"].ndim != 2:
        raise ValueError(
            f"{path} contradicts itself: {frames} frames in feats, {total} in lengths; entries of the others: {counts}"
        )
    if not np.isfinite(arrays["feats"]).all():
        raise ValueError(f"{path} holds features that are not finite: fetch it again")
