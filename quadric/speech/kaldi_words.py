"""Kaldi's tables of words, ``words.txt``, and what their labels are in a lexicon."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from quadric.files import new_file
from quadric.speech.lexicon import RESERVED_WORDS, Lexicon
from quadric.speech.tables import few, one_field, read_table

_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class WordLabels:
    """What the labels of a Kaldi table of words are in a lexicon.

    ``label[k]`` is the label in the lexicon, index in ``lexicon.words`` plus 1, of Kaldi's label k: 0 for a word that
    counts as none, -1 for one that the lexicon lacks. ``names[k]`` is the word.
    """

    label: Int32[np.ndarray, " K"]
    names: tuple[str, ...]

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], lexicon: Lexicon, instead: Mapping[str, str | None] | None = None
    ) -> WordLabels:
        """Reads Kaldi's ``words.txt``, lines ``word label``.

        Symbols that no path says, such as ``<eps>``, count as none. ``instead`` names a word of the lexicon for others
        of the table, or None for those that shall count as no word. Words that the lexicon lacks are an error only
        where a lattice holds them.

        Raises:
            FileNotFoundError: there is no such table.
            ValueError: malformed lines, a label of two words, or a word of ``instead`` that one of them lacks.
        """
        path, instead = Path(path), dict(instead or {})
        table = read_table(path, _label)
        strange = [word for word in instead if word not in table]
        strange += [word for word in instead.values() if word is not None and word not in lexicon]
        if strange:
            raise ValueError(f"instead: {few(strange)} not in {path} or not in the lexicon: correct the names")
        own = {word: label for label, word in enumerate(lexicon.words, 1)}
        label = np.full(max(table.values()) + 1, _UNKNOWN, np.int32)
        names = [""] * len(label)
        for word, number in table.items():
            if names[number]:
                raise ValueError(f"{path}: label {number} of both {names[number]} and {word}: correct the table")
            said = instead.get(word, None if word in RESERVED_WORDS else word)
            names[number], label[number] = word, 0 if said is None else own.get(said, _UNKNOWN)
        label[0] = 0
        return cls(label, tuple(names))

    @property
    def missing(self) -> tuple[str, ...]:
        """The words of the table that the lexicon lacks."""
        return tuple(name for name, label in zip(self.names, self.label, strict=True) if name and label == _UNKNOWN)

    def __call__(self, labels: Int32[np.ndarray, " A"]) -> Int32[np.ndarray, " A"]:
        """Labels of the lexicon for labels of the table. Raises ``ValueError`` naming words that the lexicon lacks."""
        beyond = np.unique(labels[labels >= len(self.label)])
        if len(beyond):
            raise ValueError(f"the label {beyond[0]} is not in the table of words: pass the table of the same graph")
        found = self.label[labels]
        lost = [self.names[label] or str(label) for label in np.unique(labels[found == _UNKNOWN]).tolist()]
        if lost:
            raise ValueError(
                f"words that the lexicon lacks: {few(lost)}: add them to the lexicon, or say with instead= which words "
                "they are to count as"
            )
        return found


def _label(value: str) -> int:
    text = one_field(value)
    if not text.isdecimal():
        raise ValueError(f"a label expected after the word, not {text!r}")
    return int(text)


def write_words(path: str | os.PathLike[str], lexicon: Lexicon) -> None:
    """Writes the table ``words.txt`` of the labels in our own lattices, for Kaldi's tools."""
    with new_file(Path(path)) as temporary:
        lines = [f"{word} {label}\n" for label, word in enumerate(("<eps>", *lexicon.words))]
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
