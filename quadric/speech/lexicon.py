"""The lexicon: which phones a word may be spoken as.

The phones are those of the words alone. Silence is not a phone of any word: the graphs add it between words,
under the reserved name :data:`SILENCE`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from quadric.speech.tables import read_lines

SILENCE = "SIL"

RESERVED_WORDS = frozenset({"<eps>", "<s>", "</s>", "#0"})

_STRESS = re.compile(r"(?<=[A-Z])[0-2]$")
_VARIANT = re.compile(r".\(\d+\)$")
_PROBABILITY = re.compile(r"\d*\.\d+(e-?\d+)?$")


@dataclass(frozen=True)
class Lexicon:
    """Words and their pronunciations.

    ``entries`` holds one ``(word, phones)`` pair a pronunciation, in the order of the file. Several entries of
    one word are its variants; several words may share a pronunciation. Raises ``ValueError`` for an empty
    lexicon, an empty pronunciation, a repeated entry and a reserved name.

    >>> lexicon = Lexicon((("TO", ("T", "UW")), ("TWO", ("T", "UW")), ("TO", ("T", "AH"))))
    >>> lexicon.words, lexicon.phones
    (('TO', 'TWO'), ('AH', 'T', 'UW'))
    >>> lexicon.pronunciations("TO")
    (('T', 'UW'), ('T', 'AH'))
    """

    entries: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError("entries is empty: a lexicon needs at least one word with its pronunciation")
        for word, phones in self.entries:
            if fault := _fault(word, phones):
                raise ValueError(f"entries: {fault}")
        if len(set(self.entries)) != len(self.entries):
            raise ValueError("entries holds a pronunciation twice; read_lexicon removes duplicates")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All words, sorted. Output label ``i + 1`` of a graph is ``words[i]``."""
        return tuple(sorted(self._pronunciations))

    @cached_property
    def phones(self) -> tuple[str, ...]:
        """All phones, sorted, without silence."""
        return tuple(sorted({phone for _, phones in self.entries for phone in phones}))

    def pronunciations(self, word: str) -> tuple[tuple[str, ...], ...]:
        """The pronunciations of ``word`` in the order of the file."""
        try:
            return self._pronunciations[word]
        except KeyError:
            raise ValueError(f"word={word!r} is not in the lexicon: add a line for it") from None

    def __contains__(self, word: object) -> bool:
        return word in self._pronunciations

    def unknown_words(self, word_counts: Mapping[str, int]) -> dict[str, int]:
        """The words of ``word_counts`` that the lexicon lacks, the most frequent first."""
        unknown = [(word, count) for word, count in word_counts.items() if word not in self]
        return dict(sorted(unknown, key=lambda item: (-item[1], item[0])))

    def check(self, word_counts: Mapping[str, int]) -> None:
        """Raises ``ValueError`` naming every unknown word of ``word_counts`` with its count."""
        unknown = self.unknown_words(word_counts)
        if unknown:
            listed = ", ".join(f"{word} ({count})" for word, count in unknown.items())
            raise ValueError(
                f"{len(unknown)} words of the text are not in the lexicon: {listed}. Add their pronunciations "
                "to the lexicon, or choose the option that drops the utterances which hold them"
            )

    @cached_property
    def _pronunciations(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        grouped: dict[str, list[tuple[str, ...]]] = {}
        for word, phones in self.entries:
            grouped.setdefault(word, []).append(phones)
        return {word: tuple(variants) for word, variants in grouped.items()}


def read_lexicon(path: Path, *, strip_stress: bool = True) -> Lexicon:
    """Reads a lexicon of lines ``WORD P1 P2 ...``; a word with several pronunciations has several lines.

    ``strip_stress`` removes a final 0, 1 or 2 from phones in capital letters, as in ``AH0``. Duplicates, also
    those that only differ by stress, are removed; empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: with file and line, for what cannot be a pronunciation. Variants marked in the word,
            ``WORD(2)``, and columns of pronunciation probabilities are not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such lexicon file")
    entries: dict[tuple[str, tuple[str, ...]], None] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        word, *tokens = line.split()
        phones = tuple(_STRESS.sub("", token) if strip_stress else token for token in tokens)
        if fault := _unsupported(word, phones) or _fault(word, phones):
            raise ValueError(f"{path}:{number}: {fault}")
        entries[word, phones] = None
    if not entries:
        raise ValueError(f"{path}: the lexicon is empty; write one line `WORD P1 P2 ...` a pronunciation")
    return Lexicon(tuple(entries))


def _unsupported(word: str, phones: tuple[str, ...]) -> str | None:
    if _VARIANT.search(word):
        plain = word[: word.rindex("(")]
        return f"variants marked in the word ({word}) are not supported: write the line with the word {plain}"
    if phones and _PROBABILITY.match(phones[0]):
        return f"the column of pronunciation probabilities ({phones[0]}) is not supported: remove it"
    return None


def _fault(word: str, phones: tuple[str, ...]) -> str | None:
    """What makes this entry unusable, or None."""
    if not word or word.split() != [word]:
        return f"{word!r} is not a word: it must not be empty or hold a space"
    if word in RESERVED_WORDS:
        return f"the word {word} is reserved for the graphs: rename or remove it"
    if not phones:
        return f"the word {word} has an empty pronunciation: write its phones, or remove the line"
    for phone in phones:
        if phone == SILENCE:
            return (
                f"the phone {SILENCE} in the word {word} is reserved for silence, which the graphs add between "
                "words: rename the phone or remove the line"
            )
        if phone.split() != [phone] or phone.startswith("#") or phone == "<eps>":
            return f"the word {word} holds {phone!r}, which cannot name a phone: rename it"
    return None
