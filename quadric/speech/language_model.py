"""n-gram language models with a closed vocabulary.

Estimation is interpolated modified Kneser-Ney: S. F. Chen, J. Goodman, "An empirical study of smoothing
techniques for language modeling", Computer Speech and Language 13, 1999, section 3 (equations 17 and 26 to 29).

Symbols: c count, D discount, γ back-off weight, h history, w word, N vocabulary with the end of sentence.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from quadric.files import new_file
from quadric.speech.lexicon import RESERVED_WORDS
from quadric.speech.tables import read_lines

logger = logging.getLogger(__name__)

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"

SAFE_DISCOUNTS = (0.5, 1.0, 1.5)
"""The discounts where counts of counts say nothing: too little text."""

# The probability of a beginning of sentence inside a sentence, by the convention of the format.
_NEVER = -99.0 * math.log(10.0)

Words = tuple[str, ...]


class Entry(NamedTuple):
    """Of an n-gram: the log probability of its last word, and the log weight of backing off from it."""

    log_prob: float
    back_off: float = 0.0


@dataclass(frozen=True)
class NGram:
    """A back-off model: the probability of a word after at most ``order - 1`` words.

    ``entries`` maps the n-grams of all orders to natural logs. The probability of a word after a history is
    that of the longest entry ``history + word``, times the back-off weights of the longer histories. The
    outcomes are the vocabulary and the end of sentence.

    >>> model = NGram.estimate([("A", "B"), ("A", "A")], vocabulary=("A", "B", "C"), order=2)
    >>> round(sum(math.exp(model.log_prob(word, ("A",))) for word in (*model.vocabulary, END)), 12)
    1.0
    """

    entries: Mapping[Words, Entry]

    @cached_property
    def order(self) -> int:
        """The length of the longest n-gram."""
        return max(map(len, self.entries))

    @classmethod
    def estimate(cls, sentences: Iterable[Sequence[str]], vocabulary: Iterable[str], order: int) -> NGram:
        """The interpolated modified Kneser-Ney model of ``sentences``.

        The orders below the highest are estimated from the numbers of different words in front of an n-gram (for
        n-grams at the beginning of a sentence: from counts), the unigrams are interpolated with a uniform
        distribution over ``vocabulary`` and the end of sentence. Each order has three discounts from its counts
        of counts; where these are degenerate, :data:`SAFE_DISCOUNTS`.

        Raises:
            ValueError: no sentences, words outside the vocabulary, a reserved word in it, or ``order < 1``.
        """
        if order < 1:
            raise ValueError(f"order={order} must be at least 1; 2 is a bigram")
        words = sorted(set(vocabulary))
        if reserved := sorted(RESERVED_WORDS.intersection(words)):
            raise ValueError(f"vocabulary holds the reserved {', '.join(reserved)}: leave them out")
        return cls(_kneser_ney(sentences, words, order))

    @classmethod
    def read_arpa(cls, path: Path) -> NGram:
        """Reads a model in the ARPA format. Raises ``ValueError`` with file and line for what is not."""
        entries: dict[Words, Entry] = {}
        for order, where, fields in _arpa_lines(path):
            if len(fields) not in (order + 1, order + 2):
                raise ValueError(f"{where}: expected {_arpa_form(order)}")
            try:
                logs = [float(field) * math.log(10.0) for field in (fields[0], *fields[order + 1 :])]
            except ValueError:
                raise ValueError(f"{where}: expected {_arpa_form(order)}") from None
            if not all(map(math.isfinite, logs)):
                raise ValueError(f"{where}: expected {_arpa_form(order)}, all finite; write -99 for never")
            entries[tuple(fields[1 : order + 1])] = Entry(*logs)
        if (END,) not in entries:
            raise ValueError(f"{path}: the model has no unigram {END}: sentences cannot end")
        entries.setdefault((BEGIN,), Entry(_NEVER))
        return cls(entries)

    @cached_property
    def vocabulary(self) -> Words:
        """All words, sorted, without the marks of the sentence."""
        return tuple(sorted(ngram[0] for ngram in self.entries if len(ngram) == 1 and ngram[0] not in (BEGIN, END)))

    def log_prob(self, word: str, history: Sequence[str] = ()) -> float:
        """The natural log of the probability of ``word`` after ``history``.

        The history of the first word of a sentence is ``(BEGIN,)``, and the word behind the last is ``END``.
        A word outside the vocabulary counts as ``<unk>`` where the model has that; otherwise ValueError.
        """
        if (word,) not in self.entries:
            if (UNKNOWN,) not in self.entries:
                raise ValueError(f"word={word!r} is not in the vocabulary and the model has no {UNKNOWN}")
            word = UNKNOWN
        context = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
        back_off = 0.0
        while (ngram := (*context, word)) not in self.entries:
            back_off += self.back_off(context)
            context = context[1:]
        return back_off + self.entries[ngram].log_prob

    def back_off(self, history: Words) -> float:
        """The natural log of the weight of backing off from ``history`` to its words but the first."""
        return self.entries[history].back_off if history in self.entries else 0.0

    def within(self, words: Container[str]) -> NGram:
        """The model without the n-grams that hold other words; what it gave to them is not given to others."""
        kept = {
            ngram: entry
            for ngram, entry in self.entries.items()
            if all(word in words or word in (BEGIN, END) for word in ngram)
        }
        return NGram(kept)

    def sentence_log_prob(self, sentence: Sequence[str]) -> float:
        """The natural log of the probability of a sentence, its end included."""
        padded = (BEGIN, *sentence, END)
        return sum(self.log_prob(padded[i], padded[max(0, i - self.order + 1) : i]) for i in range(1, len(padded)))

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> float:
        """The inverse geometric mean of the probabilities of all words and ends of sentences."""
        total, events = 0.0, 0
        for sentence in sentences:
            total += self.sentence_log_prob(sentence)
            events += len(sentence) + 1
        if not events:
            raise ValueError("sentences is empty: a perplexity needs text")
        return math.exp(-total / events)

    def write_arpa(self, path: Path) -> None:
        """Writes the model in the ARPA format; the file appears whole or not at all."""
        orders = [sorted(ngram for ngram in self.entries if len(ngram) == order) for order in range(1, self.order + 1)]
        with new_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write("\\data\\\n")
            file.writelines(f"ngram {order}={len(ngrams)}\n" for order, ngrams in enumerate(orders, start=1))
            for order, ngrams in enumerate(orders, start=1):
                file.write(f"\n\\{order}-grams:\n")
                file.writelines(self._arpa_line(ngram) for ngram in ngrams)
            file.write("\n\\end\\\n")

    def _arpa_line(self, ngram: Words) -> str:
        entry = self.entries[ngram]
        fields = [f"{entry.log_prob / math.log(10.0):.12g}", " ".join(ngram)]
        if entry.back_off != 0.0:
            fields.append(f"{entry.back_off / math.log(10.0):.12g}")
        return "\t".join(fields) + "\n"


def _kneser_ney(sentences: Iterable[Sequence[str]], words: Sequence[str], order: int) -> dict[Words, Entry]:
    """The entries of the model that :meth:`NGram.estimate` describes, from the unigrams up."""
    entries: dict[Words, Entry] = {(BEGIN,): Entry(_NEVER)}
    outcomes: list[Words] = [(word,) for word in (*words, END)]
    shorter: dict[Words, float] = {(): 1.0 / len(outcomes)}
    for k, counts in enumerate(_kneser_ney_counts(sentences, set(words), order), start=1):
        discounts = _discounts(counts, k)
        totals, taken = Counter[Words](), defaultdict[Words, float](float)
        for ngram, count in counts.items():
            totals[ngram[:-1]] += count
            taken[ngram[:-1]] += discounts[min(count, 3)]
        gamma = {history: taken[history] / total for history, total in totals.items()}
        found: dict[Words, float] = {}
        for ngram in outcomes if k == 1 else counts:
            history, count = ngram[:-1], counts[ngram]
            seen = (count - discounts[min(count, 3)]) / totals[history]
            found[ngram] = seen + gamma[history] * shorter[ngram[1:]]
        for history, weight in gamma.items() if k > 1 else ():
            entries[history] = entries[history]._replace(back_off=math.log(weight))
        entries.update((ngram, Entry(math.log(probability))) for ngram, probability in found.items())
        shorter = found
    return entries


def _arpa_form(order: int) -> str:
    return f"a log probability, {order} words and perhaps a back-off weight"


def _arpa_lines(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Of every n-gram its order, its place in the file and its fields."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such language model")
    order, started, ended = 0, False, False
    for number, line in enumerate(read_lines(path), start=1):
        text, where = line.strip(), f"{path}:{number}"
        started = started or text == "\\data\\"
        if text == "\\end\\":
            ended = True
            break
        if not started or not text or text == "\\data\\" or (order == 0 and text.startswith("ngram ")):
            continue
        if text.startswith("\\") and text.endswith("-grams:"):
            order += 1
            if text != f"\\{order}-grams:":
                raise ValueError(f"{where}: expected the section \\{order}-grams:, found {text}")
        elif order == 0:
            raise ValueError(f"{where}: expected a line 'ngram N=COUNT' or \\1-grams:, found {text!r}")
        else:
            yield order, where, text.split()
    if not ended or order == 0:
        raise ValueError(f"{path}: not a whole model in the ARPA format: no \\1-grams: or no \\end\\")


def _kneser_ney_counts(sentences: Iterable[Sequence[str]], vocabulary: set[str], order: int) -> list[Counter[Words]]:
    """The counts of every order: of occurrences for the highest, of different words in front below."""
    occurrences: list[Counter[Words]] = [Counter() for _ in range(order)]
    outside: Counter[str] = Counter()
    for sentence in sentences:
        outside.update(word for word in sentence if word not in vocabulary)
        padded = (BEGIN, *sentence, END)
        for end in range(2, len(padded) + 1):
            for k in range(1, min(order, end) + 1):
                occurrences[k - 1][padded[end - k : end]] += 1
    if outside:
        listed = ", ".join(f"{word} ({count})" for word, count in outside.most_common())
        raise ValueError(f"sentences hold words outside the vocabulary: {listed}")
    if not occurrences[0]:
        raise ValueError("sentences is empty: a language model needs text")
    counts = [Counter({g: c for g, c in grams.items() if g[0] == BEGIN}) for grams in occurrences[:-1]]
    for continued, longer in zip(counts, occurrences[1:], strict=True):
        continued.update(ngram[1:] for ngram in longer)
    return [*counts, occurrences[-1]]


def _discounts(counts: Mapping[Words, int], order: int) -> tuple[float, ...]:
    """D(0) = 0, D(1), D(2) and D(3+) of equation (26)."""
    n = Counter(min(count, 5) for count in counts.values())
    safe = (0.0, *SAFE_DISCOUNTS)
    if not all(n[k] for k in (1, 2, 3, 4)):
        logger.info("order %d: too little text to estimate discounts, %s are used", order, SAFE_DISCOUNTS)
        return safe
    y = n[1] / (n[1] + 2 * n[2])
    found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    if not all(0.0 < discount <= k for k, discount in enumerate(found, start=1)):
        logger.info("order %d: degenerate discounts %s, %s are used", order, found, SAFE_DISCOUNTS)
        return safe
    return (0.0, *found)
