"""Features on disk: Kaldi archives read one utterance at a time, and shards of them written whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import kaldiio
import numpy as np
from jaxtyping import Float32

from quadric.files import new_file
from quadric.speech.corpus import Corpus
from quadric.speech.tables import few, read_table, something


class DamagedFeatures(ValueError):
    """Features that cannot be read; ``folder`` holds their archive."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


class FeatureStore(Mapping[str, np.ndarray]):
    """Utterance id -> features, float32 [T, D], read from its archive each time it is asked for.

    Args:
        table: utterance id -> ``/path/of.ark:offset``, in the order the ids are given out.
        left_out: utterances that have no features, and why.

    Raises:
        ValueError: on reading, for an archive that is missing or damaged.
    """

    def __init__(self, table: Mapping[str, str], left_out: Mapping[str, str] | None = None) -> None:
        commands = [id for id, place in table.items() if "|" in (place[:1], place[-1:])]
        if commands:
            raise ValueError(f"features that are commands, not archives: {few(commands)}: run them with copy-feats")
        self._table = dict(table)
        self.left_out = dict(left_out or {})

    @classmethod
    def from_corpus(cls, corpus: Corpus) -> FeatureStore:
        """The features that the utterances of ``corpus`` name. Raises ``ValueError`` if some name none."""
        without = [utterance.id for utterance in corpus if utterance.features is None]
        if without:
            raise ValueError(f"utterances of {corpus.name} without features: {few(without)}: extract them from audio")
        return cls({utterance.id: utterance.features or "" for utterance in corpus})

    def place(self, id: str) -> str:
        """Where the features of ``id`` are, as ``Utterance.features`` and ``feats.scp`` name it."""
        return self._table[id]

    def __getitem__(self, id: str) -> Float32[np.ndarray, "T D"]:
        place = self._table[id]
        try:
            features = np.asarray(kaldiio.load_mat(place), np.float32)
        except Exception as error:  # a damaged archive fails in as many ways as it can be damaged
            raise DamagedFeatures(
                Path(place.rpartition(":")[0]).parent,
                f"the features of {id} cannot be read from {place} ({type(error).__name__}: {error}): extract them "
                "again into a new folder",
            ) from error
        if features.ndim != 2:
            raise DamagedFeatures(
                Path(place.rpartition(":")[0]).parent,
                f"the features of {id} in {place} are not a matrix: their shape is {features.shape}",
            )
        return features

    def __contains__(self, id: object) -> bool:
        return id in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class Shard(NamedTuple):
    """The places of the features of some utterances, and why others have none."""

    places: dict[str, str]
    left_out: dict[str, str]


def write_shard(
    folder: Path, name: str, features: Mapping[str, Float32[np.ndarray, "T D"]], left_out: Mapping[str, str]
) -> None:
    """Writes ``name.ark``, ``name.left_out`` and then ``name.scp``, whose presence says that all are complete."""
    places = {}
    with new_file(folder / f"{name}.ark") as temporary, temporary.open("wb") as file:
        for id, matrix in features.items():
            places[id] = f"{name}.ark:{file.tell() + len(id.encode()) + 1}"
            kaldiio.save_ark(file, {id: np.asarray(matrix, np.float32)})
    reasons = folder / f"{name}.left_out"
    if left_out:
        with new_file(reasons) as temporary:
            temporary.write_text(json.dumps(left_out))
    else:
        reasons.unlink(missing_ok=True)
    with new_file(folder / f"{name}.scp") as temporary:
        temporary.write_bytes("".join(f"{id} {place}\n" for id, place in places.items()).encode())


def read_shard(folder: Path, name: str) -> Shard | None:
    """A complete shard, else ``None``. Raises ``ValueError`` if a table of it is damaged."""
    scp, reasons = folder / f"{name}.scp", folder / f"{name}.left_out"
    if not scp.is_file() or not (folder / f"{name}.ark").is_file():
        return None
    places = {id: str(folder / place) for id, place in read_table(scp, something).items()}
    try:
        return Shard(places, dict(json.loads(reasons.read_text())) if reasons.is_file() else {})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{reasons} is damaged: {error}") from error
