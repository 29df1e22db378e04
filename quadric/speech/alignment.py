"""Forced alignment: the best state sequence that says the known words, one pdf a frame.

The work runs in processes that load no torch. Each keeps the graphs of its own utterances, so that an
:class:`Aligner` called again and again, as in Viterbi training, builds every graph once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import kaldi_decoder
import kaldifst
import kaldiio
import numpy as np
from jaxtyping import Float, Int32

from quadric.files import new_file
from quadric.progress import Progress, silent
from quadric.speech.graph import AlignmentGraphs
from quadric.speech.kaldi_vectors import read_alignments
from quadric.speech.lexicon import Lexicon
from quadric.speech.tables import few
from quadric.speech.topology import STATES, Tying
from quadric.speech.workers import in_order, worker_pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForcedAlignment:
    """How to align.

    Attributes:
        beams: the width of the search in natural-log units; the next one is tried where the words' end is not reached.
        acoustic_scale: factor of the log likelihoods against the graph's probabilities.
        silence_probability: of a silence before, between or behind words.
        self_loop: probability that a state lasts another frame.
        on_too_short: what to do about utterances with fewer frames than their words need.
    """

    beams: tuple[float, ...] = (200.0, 800.0, 3200.0)
    acoustic_scale: float = 1.0
    silence_probability: float = 0.5
    self_loop: float = 0.5
    on_too_short: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        if not self.beams or min(self.beams) <= 0.0:
            raise ValueError(f"beams={self.beams} must hold at least one width above 0")
        if self.acoustic_scale <= 0.0:
            raise ValueError(f"acoustic_scale={self.acoustic_scale} must be positive")
        if self.on_too_short not in ("error", "drop"):
            raise ValueError(f'on_too_short={self.on_too_short!r} must be "error" or "drop"')


class TooShort(NamedTuple):
    """An utterance of ``frames`` frames whose words take at least ``min_frames``."""

    id: str
    frames: int
    min_frames: int


@dataclass(frozen=True)
class Alignments:
    """The pdf of every frame of the utterances that could be aligned, and the others with the reason.

    ``score`` is the sum of the best paths' log scores, graph included.
    """

    pdfs: dict[str, Int32[np.ndarray, " T"]]
    too_short: tuple[TooShort, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    score: float = 0.0

    @property
    def frames(self) -> int:
        return sum(map(len, self.pdfs.values()))


def min_frames(words: Sequence[str], lexicon: Lexicon) -> int:
    """The fewest frames the words can take: one for each state of their shortest pronunciations."""
    return STATES * sum(min(map(len, lexicon.pronunciations(word))) for word in words)


class Aligner:
    """Aligns the same utterances as often as it is called; a context manager that ends its processes.

    Args:
        transcripts: the words of each utterance.
        lexicon, tying: what the words are made of.
        options: how to align.
        jobs: processes; 1 aligns in this one.

    Raises ``ValueError`` naming all words that the lexicon lacks.
    """

    def __init__(
        self,
        transcripts: Mapping[str, Sequence[str]],
        lexicon: Lexicon,
        tying: Tying,
        *,
        options: ForcedAlignment | None = None,
        jobs: int = 1,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        self.options = options or ForcedAlignment()
        self.num_pdfs = tying.num_pdfs
        counts: dict[str, int] = {}
        for words in transcripts.values():
            for word in words:
                counts[word] = counts.get(word, 0) + 1
        lexicon.check(counts)
        self._min_frames = {id: min_frames(words, lexicon) for id, words in transcripts.items()}
        self._owner = {id: number % jobs for number, id in enumerate(transcripts)}
        self._here = _Searcher(dict(transcripts), lexicon, tying, self.options) if jobs == 1 else None
        self._processes = [
            worker_pool(
                1,
                _start,
                {id: tuple(words) for id, words in transcripts.items() if self._owner[id] == job},
                lexicon,
                tying,
                self.options,
            )
            for job in range(jobs if jobs > 1 else 0)
        ]

    def __enter__(self) -> Aligner:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.shutdown(wait=True, cancel_futures=True)

    def __call__(
        self,
        log_likelihoods: Iterable[tuple[str, Float[np.ndarray, "T C"]]],
        *,
        progress: Progress = silent,
        total: int | None = None,
        what: str = "aligning",
    ) -> Alignments:
        """Aligns utterances under ``(id, log likelihoods)``, read as the work goes; results in their order.

        Raises:
            ValueError: likelihoods of an utterance without a transcript or with another number of pdfs; utterances
                too short for their words (all of them at once), unless the options drop them.
        """
        pdfs: dict[str, np.ndarray] = {}
        failed: dict[str, str] = {}
        score, too_short = 0.0, list[TooShort]()
        items = self._long_enough(log_likelihoods, too_short)
        for id, found, path_score in progress(self._search(items), total=total, what=what):
            if isinstance(found, str):
                failed[id] = found
            else:
                pdfs[id] = found
                score += path_score
        self._report(too_short, failed)
        return Alignments(pdfs, tuple(too_short), failed, score)

    def _long_enough(
        self, log_likelihoods: Iterable[tuple[str, np.ndarray]], too_short: list[TooShort]
    ) -> Iterator[tuple[str, np.ndarray]]:
        for id, scores in log_likelihoods:
            if id not in self._min_frames:
                raise ValueError(f"log_likelihoods holds the utterance {id}, which has no transcript")
            # The decoder checks no bounds.
            if scores.ndim != 2 or scores.shape[1] != self.num_pdfs:
                raise ValueError(
                    f"log_likelihoods of {id} have shape {scores.shape}, the tying has {self.num_pdfs} pdfs"
                )
            if len(scores) < max(self._min_frames[id], 1):
                too_short.append(TooShort(id, len(scores), max(self._min_frames[id], 1)))
            else:
                yield id, scores

    def _search(self, items: Iterator[tuple[str, np.ndarray]]) -> Iterator[_Found]:
        if self._here is not None:
            for id, scores in items:
                yield self._here(id, scores)
            return
        futures = (
            self._processes[self._owner[id]].submit(_search, id, np.ascontiguousarray(scores, np.float32))
            for id, scores in items
        )
        yield from in_order(futures, len(self._processes), "an alignment")

    def _report(self, too_short: Sequence[TooShort], failed: Mapping[str, str]) -> None:
        if too_short:
            listed = few([f"{id}: {frames} frames, at least {least}" for id, frames, least in too_short])
            if self.options.on_too_short == "error":
                raise ValueError(
                    f'utterances too short for their words: {listed}: correct them, or pass on_too_short="drop" to '
                    "leave them out"
                )
            logger.warning("left out utterances too short for their words: %s", listed)
        if failed:
            logger.warning("could not align: %s", few([f"{id}: {reason}" for id, reason in failed.items()]))


def align(
    transcripts: Mapping[str, Sequence[str]],
    log_likelihoods: Iterable[tuple[str, Float[np.ndarray, "T C"]]],
    lexicon: Lexicon,
    tying: Tying,
    *,
    options: ForcedAlignment | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Alignments:
    """Aligns once; see :class:`Aligner`."""
    with Aligner(transcripts, lexicon, tying, options=options, jobs=jobs) as aligner:
        return aligner(log_likelihoods, progress=progress, total=len(transcripts))


_Found = tuple[str, "Int32[np.ndarray, ' T'] | str", float]
"""An utterance, its pdfs or why there are none, and the score of the path."""


class _Searcher:
    """The best path of each utterance; graphs are built when first asked for and kept."""

    def __init__(
        self, transcripts: Mapping[str, Sequence[str]], lexicon: Lexicon, tying: Tying, options: ForcedAlignment
    ) -> None:
        self._transcripts, self._options = transcripts, options
        self._graphs = AlignmentGraphs(
            lexicon, tying, silence_probability=options.silence_probability, self_loop=options.self_loop
        )
        self._kept: dict[str, kaldifst.StdVectorFst] = {}

    def __call__(self, id: str, scores: Float[np.ndarray, "T C"]) -> _Found:
        if not np.isfinite(scores).all():
            return id, "the log likelihoods are not finite", 0.0
        if id not in self._kept:
            self._kept[id] = self._graphs.graph(self._transcripts[id])
        scaled = np.ascontiguousarray(self._options.acoustic_scale * scores, np.float32)
        for beam in self._options.beams:
            decoder = kaldi_decoder.FasterDecoder(self._kept[id], kaldi_decoder.FasterDecoderOptions(beam=beam))
            decoder.decode(kaldi_decoder.DecodableCtc(scaled))
            if not decoder.reached_final():
                continue
            _, path = decoder.get_best_path()
            _, labels, _, cost = kaldifst.get_linear_symbol_sequence(path)
            return id, np.array(labels, np.int32) - 1, -(cost.value1 + cost.value2)
        return id, f"no path to the end of the words within a beam of {self._options.beams[-1]:g}", 0.0


_searcher: _Searcher | None = None


def _start(transcripts: Mapping[str, Sequence[str]], lexicon: Lexicon, tying: Tying, options: ForcedAlignment) -> None:
    global _searcher
    _searcher = _Searcher(transcripts, lexicon, tying, options)


def _search(id: str, scores: np.ndarray) -> _Found:
    assert _searcher is not None
    return _searcher(id, scores)


# ------------------------------------------------------------------------------------------- keeping alignments


def save_alignments(path: str | os.PathLike[str], pdfs: Mapping[str, Int32[np.ndarray, " T"]]) -> None:
    """Writes a Kaldi archive of integer vectors; the file appears whole or not at all."""
    with new_file(Path(path)) as temporary, temporary.open("wb") as file:
        kaldiio.save_ark(file, {id: np.asarray(pdfs[id], np.int32) for id in sorted(pdfs)})


def load_alignments(path: str | os.PathLike[str]) -> dict[str, Int32[np.ndarray, " T"]]:
    """Reads a Kaldi archive of integer vectors, as :func:`save_alignments` writes it; see :func:`read_alignments`.

    Kaldi's ``ali-to-pdf`` writes this form as well, with the pdfs numbered as in Kaldi's own model.
    """
    return dict(read_alignments(path))


def fit_lengths(
    pdfs: Mapping[str, Int32[np.ndarray, " T"]], frames: Mapping[str, int], *, num_pdfs: int, tolerance: int = 0
) -> dict[str, Int32[np.ndarray, " T"]]:
    """Alignments made elsewhere, brought to the lengths of the features they are to serve.

    A difference of at most ``tolerance`` frames is cut off, or filled with the last pdf.

    Raises:
        ValueError: larger differences, utterances without features, or pdfs that the model does not have; all
            utterances of one kind at once.
    """
    lost = [id for id in pdfs if id not in frames]
    if lost:
        raise ValueError(f"aligned utterances without features: {few(lost)}: leave them out")
    outside = [id for id, row in pdfs.items() if len(row) and (row.min() < 0 or row.max() >= num_pdfs)]
    if outside:
        raise ValueError(f"pdfs outside 0 to {num_pdfs - 1} in {few(outside)}: they belong to another model")
    apart = {id: f"{id}: {len(row)} frames, features {frames[id]}" for id, row in pdfs.items()
             if abs(len(row) - frames[id]) > tolerance or not len(row)}  # fmt: skip
    if apart:
        raise ValueError(
            f"alignments of another length than the features: {few(list(apart.values()))}: raise tolerance={tolerance} "
            "if they only differ at the end"
        )
    return {
        id: np.pad(row[: frames[id]], (0, max(0, frames[id] - len(row))), mode="edge").astype(np.int32)
        for id, row in pdfs.items()
    }
