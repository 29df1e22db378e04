"""Times of words and phones: from alignments, to alignments, in CTM files, and how far two sets are apart.

A CTM file has lines ``utterance channel start duration label``, times in seconds. Frame ``t`` stands for the time
from ``t`` to ``t + 1`` frame shifts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Integer

from quadric.files import new_file
from quadric.speech.lexicon import SILENCE, Lexicon
from quadric.speech.tables import few, read_lines
from quadric.speech.topology import STATES, Segment, Tying, phone_segments

FRAME_SHIFT = 0.01
"""Seconds from one frame to the next."""


class Token(NamedTuple):
    """A word or phone from ``start`` to ``end``, in seconds."""

    label: str
    start: float
    end: float


class WordSegment(NamedTuple):
    """A word, the pronunciation used, and its frames from ``start`` up to, without, ``end``."""

    word: str
    phones: tuple[str, ...]
    start: int
    end: int


def read_ctm(path: str | os.PathLike[str]) -> dict[str, tuple[Token, ...]]:
    """The tokens of each utterance in order of time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: lines that are not ``utterance channel start duration label``, with the number of the first.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no CTM file {path}")
    tokens: dict[str, list[Token]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip() or line.startswith(";;"):
            continue
        try:
            utterance, _, start, duration, label = line.split()[:5]
            begin, length = float(start), float(duration)
        except ValueError:
            begin, length = math.nan, math.nan
        if not (0.0 <= begin < math.inf and 0.0 <= length < math.inf):
            raise ValueError(f"{path}:{number}: not `utterance channel start duration label` but {line!r}: correct it")
        tokens.setdefault(utterance, []).append(Token(label, begin, begin + length))
    return {utterance: tuple(sorted(some, key=lambda token: token[1:])) for utterance, some in tokens.items()}


def write_ctm(path: str | os.PathLike[str], tokens: Mapping[str, Sequence[Token]]) -> None:
    """Writes tokens sorted by utterance; the file appears whole or not at all."""
    lines = [
        f"{utterance} 1 {token.start:.4f} {token.end - token.start:.4f} {token.label}\n"
        for utterance in sorted(tokens)
        for token in tokens[utterance]
    ]
    with new_file(Path(path)) as temporary:
        temporary.write_bytes("".join(lines).encode())


def word_segments(
    words: Sequence[str], pdfs: Integer[np.ndarray, " T"], lexicon: Lexicon, tying: Tying
) -> list[WordSegment]:
    """Where each word of an alignment is, and which of its pronunciations was used.

    All readings of the phones as pronunciations with silence between words are searched; where several fit, the
    first pronunciations in the lexicon's order win.

    Raises:
        ValueError: the phones of the alignment are not a pronunciation of the words.
    """
    segments = phone_segments(pdfs, tying)
    spoken = [tying.phones[segment.phone] for segment in segments]
    impossible: set[tuple[int, int]] = set()  # (word, segment) from where no reading leads to the end

    def skip_silence(at: int) -> int:
        while at < len(spoken) and spoken[at] == SILENCE:
            at += 1
        return at

    chosen: list[tuple[int, tuple[tuple[str, ...], ...], int]] = []  # of each word: segment, variants, variant
    at, variant = skip_silence(0), 0
    while True:
        word = len(chosen)
        if word == len(words) and at == len(spoken):
            break
        variants = lexicon.pronunciations(words[word]) if word < len(words) and (word, at) not in impossible else ()
        fitting = (k for k in range(variant, len(variants)) if tuple(spoken[at : at + len(variants[k])]) == variants[k])
        found = next(fitting, None)
        if found is not None:
            chosen.append((at, variants, found))
            at, variant = skip_silence(at + len(variants[found])), 0
            continue
        impossible.add((word, at))
        if not chosen:
            raise ValueError(f"the alignment says {' '.join(spoken)}, which is no pronunciation of {' '.join(words)}")
        at, _, last = chosen.pop()
        variant = last + 1
    return [
        WordSegment(word, variants[k], segments[at].start, segments[at + len(variants[k]) - 1].end)
        for word, (at, variants, k) in zip(words, chosen, strict=True)
    ]


def word_tokens(segments: Sequence[WordSegment], frame_shift: float = FRAME_SHIFT) -> tuple[Token, ...]:
    """The times of words."""
    return tuple(Token(s.word, s.start * frame_shift, s.end * frame_shift) for s in segments)


def phone_tokens(pdfs: Integer[np.ndarray, " T"], tying: Tying, frame_shift: float = FRAME_SHIFT) -> tuple[Token, ...]:
    """The times of the phones of an alignment, silence included."""
    return tuple(
        Token(tying.phones[s.phone], s.start * frame_shift, s.end * frame_shift) for s in phone_segments(pdfs, tying)
    )


def spread(segments: Sequence[Segment], tying: Tying) -> Int32[np.ndarray, " T"]:
    """The pdf of each frame when every phone shares its frames evenly among its states.

    ``segments`` follow one another without a gap from frame 0. A phone of fewer frames than states leaves states out.
    """
    phones = [0, *(segment.phone for segment in segments), 0]
    targets = np.empty(segments[-1].end if segments else 0, np.int32)
    for k, (phone, start, end) in enumerate(segments):
        window = (phone,) if tying.context == 1 else phones[k : k + 3]
        states = np.arange(end - start) * STATES // max(end - start, 1)
        targets[start:end] = np.array(tying.pdfs(window), np.int32)[states]
    return targets


def targets_from_phones(
    tokens: Sequence[Token], frames: int, tying: Tying, *, frame_shift: float = FRAME_SHIFT, tolerance: int = 2
) -> Int32[np.ndarray, " T"]:
    """Frame targets of an utterance of ``frames`` frames from the times of its phones; gaps become silence.

    A stress mark or word position (``AH0``, ``AH_B``) is taken off where the tying does not know the phone with it.

    Raises:
        ValueError: a phone that the tying lacks, phones that overlap, or that end more than ``tolerance`` frames
            behind the last frame.
    """
    index = {phone: number for number, phone in enumerate(tying.phones)}
    segments: list[Segment] = []
    at = 0
    for label, begin, finish in sorted(tokens, key=lambda token: token[1:]):
        name = label if label in index else label.split("_")[0]
        name = name if name in index else name.rstrip("012")
        if name not in index:
            raise ValueError(f"tokens holds the phone {label}, which the tying lacks: use the lexicon's phones")
        start, end = round(begin / frame_shift), round(finish / frame_shift)
        if start < at - 1:
            raise ValueError(f"tokens overlap: {label} begins at {begin:g} s, before the phone in front of it ends")
        if end > frames + tolerance:
            raise ValueError(f"tokens end at frame {end}, the utterance has {frames}: do they belong together?")
        start, end = max(start, at), min(end, frames)
        if start > at:
            segments.append(Segment(0, at, start))
        if end > start:
            segments.append(Segment(index[name], start, end))
        at = max(at, start, end)
    if at < frames:
        segments.append(Segment(0, at, frames))
    return spread(segments, tying)


def targets_from_words(
    tokens: Sequence[Token],
    frames: int,
    lexicon: Lexicon,
    tying: Tying,
    *,
    frame_shift: float = FRAME_SHIFT,
    tolerance: int = 2,
) -> Int32[np.ndarray, " T"]:
    """As :func:`targets_from_phones`, from the times of words: a word's first pronunciation shares its time evenly."""
    phones = []
    for word, start, end in tokens:
        pronunciation = lexicon.pronunciations(word)[0]
        edges = np.linspace(start, end, len(pronunciation) + 1).tolist()
        phones += [Token(phone, a, b) for phone, a, b in zip(pronunciation, edges[:-1], edges[1:], strict=True)]
    return targets_from_phones(phones, frames, tying, frame_shift=frame_shift, tolerance=tolerance)


def word_start_errors(
    alignment: Mapping[str, Sequence[Token]], reference: Mapping[str, Sequence[Token]]
) -> Float64[np.ndarray, " N"]:
    """By how many milliseconds each word of ``alignment`` begins too early or too late (absolute values).

    Raises:
        ValueError: utterances without a reference, or whose words differ from it.
    """
    unknown = [utterance for utterance in alignment if utterance not in reference]
    if unknown:
        raise ValueError(f"utterances without reference times: {few(unknown)}")
    errors = []
    for utterance, tokens in alignment.items():
        truth = reference[utterance]
        if [token.label for token in tokens] != [token.label for token in truth]:
            raise ValueError(f"the words of {utterance} differ from those of its reference")
        errors += [abs(a.start - b.start) * 1000.0 for a, b in zip(tokens, truth, strict=True)]
    return np.array(errors)
