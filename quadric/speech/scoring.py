"""Word error rate: alignment of hypotheses with references, in Kaldi's and sclite's forms, and paired comparison.

Symbols: an insertion is a hypothesis word with no reference word, a deletion the reverse, a substitution a pair of
unequal words; the word error rate is their number over the number of reference words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import kaldialign
import numpy as np

from quadric.files import new_file
from quadric.speech.tables import read_lines

Pair = tuple[str | None, str | None]
"""A reference word and the hypothesis word aligned with it; ``None`` where there is none."""

GAP = "<eps>"
"""How files write the missing half of a pair."""

_WORD = re.compile(r"[^ \t\n\r\f\v]+")
_SHOWN = 10
_CHUNK = 512


@dataclass(frozen=True)
class Errors:
    """Counts of words and of the three kinds of error; they add.

    >>> print((Errors(4, substitutions=1) + Errors(3, insertions=1, deletions=1)).line)
    %WER 42.86 [ 3 / 7, 1 ins, 1 del, 1 sub ]
    """

    words: int = 0
    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.words + other.words,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.substitutions + other.substitutions,
        )

    @property
    def errors(self) -> int:
        """All errors together."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def correct(self) -> int:
        """Reference words that were recognised."""
        return self.words - self.deletions - self.substitutions

    @property
    def rate(self) -> float:
        """Percent; without reference words 0 if there are no errors, else infinite."""
        return _percent(self.errors, self.words)

    @property
    def line(self) -> str:
        """As Kaldi's compute-wer prints it."""
        return (
            f"%WER {_rounded(self.rate)} [ {self.errors} / {self.words}, "
            f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub ]"
        )


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance's alignment.

    Attributes:
        id: of the utterance.
        speaker: who spoke, where known.
        pairs: the alignment.
        missing: there was no hypothesis; every reference word counts as deleted.
    """

    id: str
    speaker: str | None
    pairs: tuple[Pair, ...]
    missing: bool = False

    @cached_property
    def errors(self) -> Errors:
        """Counted on the alignment."""
        return count(self.pairs)

    @property
    def reference(self) -> tuple[str, ...]:
        """The words that were said."""
        return tuple(word for word, _ in self.pairs if word is not None)

    @property
    def hypothesis(self) -> tuple[str, ...]:
        """The words that were recognised."""
        return tuple(word for _, word in self.pairs if word is not None)


@dataclass(frozen=True)
class Score:
    """A set of utterances, scored.

    Attributes:
        utterances: sorted by id.
    """

    utterances: tuple[ScoredUtterance, ...]

    @cached_property
    def total(self) -> Errors:
        """Over all utterances."""
        return sum((u.errors for u in self.utterances), Errors())

    @cached_property
    def per_utterance(self) -> Mapping[str, ScoredUtterance]:
        """By utterance id."""
        return {u.id: u for u in self.utterances}

    @cached_property
    def per_speaker(self) -> Mapping[str, Errors]:
        """By speaker, sorted; empty where speakers are unknown."""
        sums: dict[str, Errors] = {}
        for u in self.utterances:
            if u.speaker is not None:
                sums[u.speaker] = sums.get(u.speaker, Errors()) + u.errors
        return dict(sorted(sums.items()))

    @cached_property
    def sentence_errors(self) -> int:
        """Utterances with at least one error."""
        return sum(u.errors.errors > 0 for u in self.utterances)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Ids of utterances that had no hypothesis."""
        return tuple(u.id for u in self.utterances if u.missing)

    @property
    def lines(self) -> tuple[str, str, str]:
        """The three lines of Kaldi's compute-wer: words, sentences, and how many hypotheses were absent."""
        n = len(self.utterances)
        return (
            self.total.line + (" [PARTIAL]" if self.missing else ""),
            f"%SER {_rounded(_percent(self.sentence_errors, n))} [ {self.sentence_errors} / {n} ]",
            f"Scored {n} sentences, {len(self.missing)} not present in hyp.",
        )

    def worst(self, n: int) -> tuple[ScoredUtterance, ...]:
        """The ``n`` utterances with the most errors; those with the higher rate first among equals, then by id."""
        wrong = [u for u in self.utterances if u.errors.errors]
        return tuple(sorted(wrong, key=lambda u: (-u.errors.errors, -u.errors.rate, u.id))[:n])


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[Pair, ...]:
    """An alignment with the fewest errors.

    >>> align("a b c".split(), "a c d".split())
    (('a', 'a'), ('b', None), ('c', 'c'), (None, 'd'))
    """
    aligned = kaldialign.align(reference, hypothesis, "")
    return tuple((said or None, heard or None) for said, heard in aligned)


def count(pairs: Iterable[Pair]) -> Errors:
    """The errors of an alignment."""
    operations = [operation(pair) for pair in pairs]
    inserted = operations.count("I")
    return Errors(len(operations) - inserted, inserted, operations.count("D"), operations.count("S"))


def operation(pair: Pair) -> Literal["C", "S", "I", "D"]:
    """Whether a pair is correct, a substitution, an insertion or a deletion."""
    reference, hypothesis = pair
    if reference is None:
        return "I"
    if hypothesis is None:
        return "D"
    return "C" if reference == hypothesis else "S"


def score(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, Sequence[str]],
    *,
    speakers: Mapping[str, str] | None = None,
    on_missing: Literal["error", "count"] = "error",
) -> Score:
    """Aligns every hypothesis with its reference.

    Args:
        references: utterance id -> words said; may be empty for an utterance.
        hypotheses: utterance id -> words recognised.
        speakers: utterance id -> speaker, for results by speaker.
        on_missing: what to do where a reference has no hypothesis: ``"count"`` takes it as empty, so that its words
            are deletions.

    Raises:
        ValueError: for missing hypotheses under ``on_missing="error"``, for hypotheses without reference, for
            utterances without speaker, and for words no file could hold (empty, with white space, ``<eps>``).
    """
    if on_missing not in ("error", "count"):
        raise ValueError(f"on_missing={on_missing!r}: must be 'error' or 'count'")
    if not references:
        raise ValueError("references: there are none, so no error rate is defined")
    absent = references.keys() - hypotheses.keys()
    if absent and on_missing == "error":
        raise ValueError(
            f"hypotheses: none for {_listed(absent)}; recognise them, or pass on_missing='count' to count deletions"
        )
    if extra := hypotheses.keys() - references.keys():
        raise ValueError(f"hypotheses: no reference for {_listed(extra)}; add the references or leave these out")
    if speakers is not None and (unknown := references.keys() - speakers.keys()):
        raise ValueError(f"speakers: none given for {_listed(unknown)}; add them, or pass speakers=None")
    scored = []
    for key in sorted(references):
        said, heard = references[key], hypotheses.get(key, ())
        _check_words("references", key, said)
        _check_words("hypotheses", key, heard)
        speaker = None if speakers is None else speakers[key]
        scored.append(ScoredUtterance(key, speaker, align(said, heard), missing=key in absent))
    return Score(tuple(scored))


@dataclass(frozen=True)
class Comparison:
    """The difference in word error rate between two systems on the same utterances.

    Attributes:
        difference: rate of the second minus rate of the first, in percent points; negative is an improvement.
        low: lower end of the confidence interval of ``difference``.
        high: its upper end.
        confidence: of the interval.
        probability: share of resamples in which the second system has the lower rate; ties count half.
        groups: speakers or utterances that were resampled.
    """

    difference: float
    low: float
    high: float
    confidence: float
    probability: float
    groups: int


def paired_bootstrap(
    first: Score,
    second: Score,
    *,
    by: Literal["speaker", "utterance"] = "speaker",
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Whether ``second`` is better than ``first``, by resampling both on the same speakers.

    Draws as many speakers as there are, with replacement, and takes both systems' rates on the draw; the interval is
    that of the percentiles. Errors of one speaker are not independent, so utterances are the right unit only where
    each has a speaker of its own. M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR
    performance evaluation", ICASSP 2004; ``probability`` is their probability of improvement.

    Raises:
        ValueError: if the two scores are not of the same utterances, references and speakers, or there are fewer
            than two to draw from.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: must be positive")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1, such as 0.95")
    table = _paired_counts(first, second, by)
    groups = len(table)
    if groups < 2:
        raise ValueError(f"by={by!r}: {groups} {by} is not enough to resample; at least 2 are needed")
    words, errors_first, errors_second = table.sum(axis=0)
    rng = np.random.default_rng(seed)
    draws = []
    for start in range(0, samples, _CHUNK):
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(_CHUNK, samples - start))
        draws.append(times @ table)
    drawn = np.concatenate(draws)
    drawn = drawn[drawn[:, 0] > 0]
    difference = 100.0 * (drawn[:, 2] - drawn[:, 1]) / drawn[:, 0]
    low, high = np.quantile(difference, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Comparison(
        difference=100.0 * float(errors_second - errors_first) / float(words),
        low=float(low),
        high=float(high),
        confidence=confidence,
        probability=float(np.mean(difference < 0) + 0.5 * np.mean(difference == 0)),
        groups=groups,
    )


def _paired_counts(first: Score, second: Score, by: str) -> np.ndarray:
    """Rows of (reference words, errors of the first, errors of the second), one per speaker or utterance."""
    if by not in ("speaker", "utterance"):
        raise ValueError(f"by={by!r}: must be 'speaker' or 'utterance'")
    if unpaired := first.per_utterance.keys() ^ second.per_utterance.keys():
        raise ValueError(f"second: {_listed(unpaired)} scored by one system only; score both on the same utterances")
    rows: dict[str, np.ndarray] = {}
    for a, b in zip(first.utterances, second.utterances, strict=True):
        if a.reference != b.reference or a.speaker != b.speaker:
            raise ValueError(f"second: the reference or speaker of {a.id} differs; score both against the same ones")
        if by == "speaker" and a.speaker is None:
            raise ValueError("by='speaker': the scores know no speakers; pass speakers= to score(), or by='utterance'")
        row = np.array([a.errors.words, a.errors.errors, b.errors.errors], dtype=np.int64)
        key = a.id if a.speaker is None or by == "utterance" else a.speaker
        rows[key] = rows[key] + row if key in rows else row
    table = np.stack([rows[key] for key in sorted(rows)])
    if not table[:, 0].any():
        raise ValueError("first: its references hold no words, so no error rate is defined")
    return table


def read_text(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Reads Kaldi's ``text``: on each line an utterance id and its words, perhaps none.

    Raises:
        FileNotFoundError: naming the path.
        ValueError: naming the line, where it is empty, not UTF-8, or repeats an id.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={path}: no such file; expected lines of an utterance id and its words")
    texts: dict[str, tuple[str, ...]] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        # Only ASCII white space parts words, as in Kaldi; other spaces of Unicode belong to them.
        key, *words = _WORD.findall(line) or [""]
        if not key:
            raise ValueError(f"{path}:{number}: the line is empty; remove it or give its utterance id")
        if key in texts:
            raise ValueError(f"{path}:{number}: utterance {key} is already on line {seen[key]}; keep one of them")
        texts[key], seen[key] = tuple(words), number
    return texts


def write_text(path: str | Path, texts: Mapping[str, Sequence[str]]) -> None:
    """Writes Kaldi's ``text``, sorted by utterance id."""
    for key, words in texts.items():
        _check_words("texts", key, words)
    _write(path, (" ".join((key, *texts[key])) for key in sorted(texts)))


def write_trn(path: str | Path, texts: Mapping[str, Sequence[str]], speakers: Mapping[str, str] | None = None) -> None:
    """Writes sclite's ``trn``: on each line the words and ``(speaker-utterance)``, or ``(utterance)`` without speakers.

    Write references and hypotheses so, then ``sclite -r ref.trn trn -h hyp.trn trn -i spu_id``.
    """
    for key, words in texts.items():
        _check_words("texts", key, words)
    if speakers is not None and (unknown := texts.keys() - speakers.keys()):
        raise ValueError(f"speakers: none given for {_listed(unknown)}; add them, or pass speakers=None")
    names = {key: key if speakers is None else f"{speakers[key]}-{key}" for key in texts}
    _write(path, (" ".join((*texts[key], f"({names[key]})")) for key in sorted(texts)))


def write_per_utt(path: str | Path, score: Score) -> None:
    """Writes Kaldi's ``per_utt``: four lines an utterance, with reference, hypothesis, operations and counts."""
    _write(path, (line for u in score.utterances for line in _per_utt_lines(u)))


def _per_utt_lines(u: ScoredUtterance) -> Iterable[str]:
    rows: list[list[str]] = [[], [], []]
    for pair in u.pairs:
        column = [pair[0] or GAP, pair[1] or GAP, operation(pair)]
        width = max(map(len, column))
        for row, cell in zip(rows, column, strict=True):
            right = (width - len(cell)) // 2
            row.append(" " * (width - len(cell) - right) + cell + " " * right)
    for name, row in zip(("ref ", "hyp ", "op  "), rows, strict=True):
        yield f"{u.id} {name} " + "  ".join(row)
    e = u.errors
    yield f"{u.id} #csid {e.correct} {e.substitutions} {e.insertions} {e.deletions}"


def write_per_spk(path: str | Path, score: Score) -> None:
    """Writes Kaldi's ``per_spk``: two lines a speaker, counts and percentages, and their sum.

    Raises:
        ValueError: if the score knows no speakers.
    """
    if not score.per_speaker:
        raise ValueError("score: it knows no speakers; pass speakers= to score()")
    heads = ("#SENT", "#WORD", "Corr", "Sub", "Ins", "Del", "Err", "S.Err")
    width = max(15, *map(len, score.per_speaker))
    groups: dict[str, list[ScoredUtterance]] = {speaker: [] for speaker in score.per_speaker}
    for u in score.utterances:
        groups[str(u.speaker)].append(u)
    lines = [f"{'SPEAKER':<{width}} id  " + " ".join(f"{head:>10}" for head in heads)]
    for name, utterances in (*groups.items(), ("SUM", list(score.utterances))):
        e = sum((u.errors for u in utterances), Errors())
        n, wrong = len(utterances), sum(u.errors.errors > 0 for u in utterances)
        counts = (e.correct, e.substitutions, e.insertions, e.deletions, e.errors)
        raw = " ".join(f"{value:10d}" for value in (n, e.words, *counts, wrong))
        lines.append(f"{name:<{width}} raw {raw}")
        if e.words:
            shares = [*(100.0 * value / e.words for value in counts), 100.0 * wrong / n]
            lines.append(f"{name:<{width}} sys {n:10d} {e.words:10d} " + " ".join(f"{s:10.2f}" for s in shares))
    _write(path, lines)


def _write(path: str | Path, lines: Iterable[str]) -> None:
    with new_file(Path(path)) as temporary:
        temporary.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def _check_words(argument: str, key: str, words: Sequence[str]) -> None:
    if isinstance(words, str):
        raise ValueError(f"{argument}: the words of {key} are one string, {words!r}; split it into words")
    if not _WORD.fullmatch(key):
        raise ValueError(f"{argument}: the utterance id {key!r} is empty or holds white space; rename it")
    for word in words:
        if word == GAP or not _WORD.fullmatch(word):
            raise ValueError(f"{argument}: {key} holds {word!r}, which is no word; remove or rename it")


def _listed(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    shown = ", ".join(ordered[:_SHOWN])
    return shown if len(ordered) <= _SHOWN else f"{shown} and {len(ordered) - _SHOWN} more"


def _percent(part: int, whole: int) -> float:
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return 100.0 * part / whole


def _rounded(percent: float) -> str:
    # compute-wer rounds a float32: 223 errors in 20000 words are 1.12 there, and 1.11 in float64.
    return f"{float(np.float32(percent)):.2f}"
