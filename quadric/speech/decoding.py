"""One-best decoding on several processes, and the search for its two weights.

Decoding is time-synchronous beam search over a decoding graph (:func:`quadric.speech.graph.decoding_graph`).
The search holds Python's lock, hence processes; each loads the graph once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import kaldi_decoder
import kaldifst
import numpy as np
from jaxtyping import Float

from quadric.progress import Progress, silent
from quadric.speech.graph import read_graph, with_word_penalty
from quadric.speech.topology import STATES
from quadric.speech.workers import in_order, worker_pool

logger = logging.getLogger(__name__)

Scores = Float[np.ndarray, " T C"]

RETRY = 2.0
"""How many times wider the second search is, where the first ends in no final state."""


@dataclass(frozen=True)
class DecodeOptions:
    """How much of the graph is searched: paths within ``beam`` of the best, at most ``max_active`` a frame."""

    beam: float = 13.0
    max_active: int = 4000

    def __post_init__(self) -> None:
        if not 0.0 < self.beam < math.inf:
            raise ValueError(f"beam={self.beam} must be a positive cost; 13 is usual")
        if self.max_active < 2:
            raise ValueError(f"max_active={self.max_active} must be at least 2; 4000 is usual")


@dataclass(frozen=True)
class Hypothesis:
    """What was recognised.

    ``cost`` is that of the best path: of the graph, and of the frames times the acoustic scale. Where
    ``reached_final`` is false, no sentence of the graph fits the frames within the beam: ``words`` are those
    of the best partial path, and ``cost`` is ``inf`` where there is none.
    """

    utterance: str
    words: tuple[str, ...]
    cost: float
    reached_final: bool
    frames: int


class Decoder:
    """Decodes with one graph; a context manager that holds the processes.

    Args:
        graph: file of a decoding graph, written by :func:`quadric.speech.graph.write_graph`.
        words: the words of the lexicon the graph was built from, ``lexicon.words``.
        num_pdfs: the columns that scores must have, ``tying.num_pdfs``.
        options: the width of the search.
        jobs: processes; 1 works in the calling process. The results do not depend on it.

    Raises:
        FileNotFoundError: there is no such graph.
        ValueError: the graph has pdfs or words beyond those given.

    >>> with Decoder(graph, lexicon.words, tying.num_pdfs, jobs=2) as decoder:  # doctest: +SKIP
    ...     hypotheses = decoder.decode(log_likelihoods, acoustic_scale=0.1)
    """

    def __init__(
        self,
        graph: Path,
        words: Sequence[str],
        num_pdfs: int,
        *,
        options: DecodeOptions | None = None,
        jobs: int = 1,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        _check_labels(read_graph(graph), num_pdfs, len(words))
        self.words, self.num_pdfs, self.jobs = tuple(words), num_pdfs, jobs
        setup = (Path(graph), options or DecodeOptions())
        self._local: _Search | None = _Search(*setup) if jobs == 1 else None
        self._pool = worker_pool(jobs, _start, *setup) if jobs > 1 else None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._local = None

    def decode(
        self,
        log_likelihoods: Mapping[str, Scores] | Iterable[tuple[str, Scores]],
        acoustic_scale: float,
        *,
        word_penalty: float = 0.0,
        progress: Progress = silent,
    ) -> dict[str, Hypothesis]:
        """The best words of every utterance, in the order of the input.

        Args:
            log_likelihoods: of each utterance the natural-log scores ``[T, C]``, a column a pdf: log
                posteriors minus log priors. An iterable is consumed as it is decoded.
            acoustic_scale: what the scores are multiplied with, the reciprocal of the weight of the
                language model.
            word_penalty: the cost of each word.

        Raises:
            ValueError: an utterance comes twice, or its scores have the wrong shape or are not finite.
        """
        if not 0.0 < acoustic_scale < math.inf:
            raise ValueError(f"acoustic_scale={acoustic_scale} must be positive; 0.1 is usual")
        utterances: Iterable[tuple[str, Scores]]
        if isinstance(log_likelihoods, Mapping):
            utterances, total = log_likelihoods.items(), len(log_likelihoods)
        else:
            utterances, total = log_likelihoods, None
        tasks = (
            _Task(utterance, self._checked(utterance, scores), acoustic_scale, word_penalty)
            for utterance, scores in utterances
        )
        hypotheses: dict[str, Hypothesis] = {}
        for found in progress(self._run(tasks), total=total, what="decoding"):
            if found.utterance in hypotheses:
                raise ValueError(f"log_likelihoods holds utterance {found.utterance} twice")
            words = tuple(self.words[label - 1] for label in found.labels)
            hypotheses[found.utterance] = Hypothesis(
                found.utterance, words, found.cost, found.reached_final, found.frames
            )
        unfinished = [name for name, hypothesis in hypotheses.items() if not hypothesis.reached_final]
        if unfinished:
            logger.warning(
                "%d of %d utterances ended in no final state, also with a beam %g times as wide: %s",
                *(len(unfinished), len(hypotheses), RETRY, ", ".join(unfinished[:10])),
            )
        return hypotheses

    def _run(self, tasks: Iterable[_Task]) -> Iterator[_Found]:
        """The results in the order of the tasks, with a bounded number of tasks under way."""
        if self._local is not None:
            yield from map(self._local, tasks)
            return
        if self._pool is None:
            raise ValueError("this Decoder is closed: decode inside its with block")
        pool = self._pool
        yield from in_order((pool.submit(_search, task) for task in tasks), self.jobs, "a decoding")

    def _checked(self, utterance: str, scores: Scores) -> Scores:
        # The decoder reads out of bounds where a column is missing.
        if np.ndim(scores) != 2 or np.shape(scores)[1] != self.num_pdfs:
            raise ValueError(
                f"log_likelihoods of utterance {utterance} have shape {np.shape(scores)}; the graph needs "
                f"[frames, {self.num_pdfs}], a column for each pdf: were network and graph built with one tying?"
            )
        if not np.all(np.isfinite(scores)):
            frame = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
            raise ValueError(
                f"log_likelihoods of utterance {utterance} are not finite in frame {frame}: "
                "look at the network's outputs and at priors of zero"
            )
        return np.ascontiguousarray(scores, np.float32)


def _check_labels(graph: kaldifst.StdVectorFst, num_pdfs: int, num_words: int) -> None:
    """The decoder reads out of bounds where a label has no column."""
    pdfs = words = 0
    for state in kaldifst.StateIterator(graph):
        for arc in kaldifst.ArcIterator(graph, state):
            pdfs, words = max(pdfs, arc.ilabel), max(words, arc.olabel)
    if pdfs > num_pdfs or words > num_words:
        raise ValueError(
            f"the graph has at least {pdfs} pdfs and {words} words, but num_pdfs={num_pdfs} and {num_words} words "
            "were given: take the tying and the lexicon that the graph was built from"
        )


class _Task(NamedTuple):
    utterance: str
    scores: Scores
    acoustic_scale: float
    word_penalty: float


class _Found(NamedTuple):
    utterance: str
    labels: list[int]
    cost: float
    reached_final: bool
    frames: int


class _Search:
    """The graph and its decoders in one process; those of recent word penalties are kept."""

    def __init__(self, graph: Path, options: DecodeOptions) -> None:
        self._graph = read_graph(graph)
        self._widths = [_width(factor, options) for factor in (1.0, RETRY)]
        self._penalised = lru_cache(maxsize=4)(self._with_penalty)

    def _with_penalty(self, penalty: float) -> kaldifst.StdVectorFst:
        return with_word_penalty(self._graph, penalty) if penalty else self._graph

    def __call__(self, task: _Task) -> _Found:
        frames = len(task.scores)
        if frames < STATES:
            return _Found(task.utterance, [], math.inf, False, frames)
        graph = self._penalised(task.word_penalty)
        scores = kaldi_decoder.DecodableCtc(np.float32(task.acoustic_scale) * task.scores)
        for width in self._widths:
            decoder = kaldi_decoder.FasterDecoder(graph, width)
            decoder.decode(scores)
            reached_final = decoder.reached_final()
            if reached_final:
                break
        some, path = decoder.get_best_path()
        if not some:
            return _Found(task.utterance, [], math.inf, False, frames)
        _, _, labels, weight = kaldifst.get_linear_symbol_sequence(path)
        return _Found(task.utterance, labels, weight.value1 + weight.value2, reached_final, frames)


def _width(factor: float, options: DecodeOptions) -> kaldi_decoder.FasterDecoderOptions:
    most = round(factor * options.max_active)
    # The decoder demands min_active < max_active; 20 is its default.
    return kaldi_decoder.FasterDecoderOptions(beam=factor * options.beam, max_active=most, min_active=min(20, most - 1))


_here: _Search | None = None


def _start(graph: Path, options: DecodeOptions) -> None:
    global _here
    _here = _Search(graph, options)


def _search(task: _Task) -> _Found:
    assert _here is not None
    return _here(task)


@dataclass(frozen=True)
class Trial:
    """The errors at one pair of weights."""

    lm_weight: float
    word_penalty: float
    errors: int


@dataclass(frozen=True)
class Sweep:
    """Every pair that was tried, in order, and the best of them."""

    trials: tuple[Trial, ...]
    best: Trial


MAX_EXTENSIONS = 8
"""How many values a line of the search may grow beyond those it was given."""


def search(
    errors_at: Callable[[float, float], int],
    *,
    lm_weights: Sequence[float],
    word_penalties: Sequence[float],
) -> Sweep:
    """Minimises ``errors_at(lm_weight, word_penalty)`` one coordinate at a time.

    It begins at the penalty nearest 0, tries the weights on it, then the penalties at the best weight, and so
    on until the pair stays. Where the best value of a coordinate is the first or the last, the coordinate grows beyond
    it: the weights by the ratio, the penalties by the difference of the last two values. A coordinate with
    one value stays there. Each pair is tried once.
    """
    if not lm_weights or not all(0.0 < weight < math.inf for weight in lm_weights):
        raise ValueError(f"lm_weights={tuple(lm_weights)} must be positive, and at least one")
    if not word_penalties or not all(math.isfinite(penalty) for penalty in word_penalties):
        raise ValueError(f"word_penalties={tuple(word_penalties)} must be finite, and at least one")
    trials: dict[tuple[float, float], Trial] = {}

    def attempt(lm_weight: float, word_penalty: float) -> Trial:
        pair = (lm_weight, word_penalty)
        if pair not in trials:
            trials[pair] = Trial(*pair, errors_at(*pair))
            logger.info("lm weight %g, word penalty %g: %d errors", *pair, trials[pair].errors)
        return trials[pair]

    weights, penalties = sorted(set(lm_weights)), sorted(set(word_penalties))

    def round_trip(penalty: float) -> Trial:
        weight = _line(weights, lambda value: attempt(value, penalty), lambda a, b: b * b / a).lm_weight
        return _line(penalties, lambda value: attempt(weight, value), lambda a, b: 2.0 * b - a)

    best = round_trip(min(penalties, key=abs))
    while (found := round_trip(best.word_penalty)).errors < best.errors:
        best = found
    return Sweep(tuple(trials.values()), best)


def _line(values: list[float], attempt: Callable[[float], Trial], beyond: Callable[[float, float], float]) -> Trial:
    """The best trial along ``values``, which grow while it is an end; between equals, not an end."""
    for _ in range(MAX_EXTENSIONS + 1):
        tried = [attempt(value) for value in values]
        ends = (0, len(values) - 1)
        best = min(range(len(values)), key=lambda i: (tried[i].errors, i in ends))
        if len(values) == 1 or best not in ends:
            return tried[best]
        if best == 0:
            values.insert(0, beyond(values[1], values[0]))
        else:
            values.append(beyond(values[-2], values[-1]))
    logger.warning("the best value, %s, is still at the end of those tried", tried[best])
    return tried[best]
