"""Why utterances are left out: kept from where it is found out to where it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from quadric.speech.alignment import Alignments
from quadric.speech.corpus import Corpus
from quadric.speech.tables import few


class LeftOut(NamedTuple):
    """Why an utterance is not used: what it has in common with others, and more of its own."""

    kind: str
    why: str


def counts(left_out: Mapping[str, LeftOut]) -> dict[str, int]:
    """Facts for the report: how many, and how many of each kind.

    >>> counts({"a": LeftOut("no words", ""), "b": LeftOut("no words", "")})
    {'utterances left out': 2, 'left out: no words': 2}
    """
    kinds = Counter(reason.kind for reason in left_out.values())
    return {"utterances left out": len(left_out)} | {f"left out: {kind}": n for kind, n in kinds.most_common()}


def listed(left_out: Mapping[str, LeftOut]) -> str:
    """How many, and the first of them with what is wrong, for a message."""
    return few([f"{id}: {reason.why}" for id, reason in left_out.items()])


def lines(left_out: Mapping[str, LeftOut], prefix: str = "") -> str:
    """A line for each, in the order of their ids: ``prefix``, id and what is wrong.

    >>> lines({"b": LeftOut("short", "2 frames"), "a": LeftOut("no lattice", "no\\npath")}, "dev ")
    'dev a no path\\ndev b 2 frames\\n'
    """
    return "".join(f"{prefix}{id} {' '.join(reason.why.split())}\n" for id, reason in sorted(left_out.items()))


def unread(corpus: Corpus) -> dict[str, LeftOut]:
    """What was not taken up when the corpus was read."""
    return {id: LeftOut(why, why) for id, why in corpus.left_out.items()}


def bad_audio(reason: str) -> LeftOut:
    """What `quadric.speech.features.extract` leaves out."""
    return LeftOut("audio that cannot be used", f"audio {reason}")


def unknown_words(words: Iterable[str]) -> LeftOut:
    """What has words that the lexicon lacks."""
    return LeftOut("words that the lexicon lacks", f"the lexicon lacks {', '.join(sorted(words))}")


def not_aligned(found: Alignments) -> dict[str, LeftOut]:
    """What has no forced alignment."""
    short = {id: too_short(frames, least) for id, frames, least in found.too_short}
    return short | {id: unaligned(why) for id, why in found.failed.items()}


def unaligned(why: str) -> LeftOut:
    """What has frames enough, and yet no forced alignment."""
    return LeftOut("not aligned with its words", why)


def too_short(frames: int, least: int) -> LeftOut:
    """What has fewer frames than its words have states."""
    return LeftOut("too short for its words", f"{frames} frames, its words take at least {least}")
