"""The decoding weights of a system, chosen on development data by rescoring lattices of one search."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from quadric.lattice.generate import Generator, LatticeOptions, NoPath
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.words import Rescorable
from quadric.progress import Progress
from quadric.speech import scoring
from quadric.speech.corpus import Corpus
from quadric.speech.decoding import search
from quadric.speech.graph import read_graph, to_labelled
from quadric.speech.scoring import Errors
from quadric.speech.workers import in_order
from quadric.train.system import System

logger = logging.getLogger(__name__)

_LATTICE_BEAM = 8.0
"""Wide enough that the best path under neighbouring weights is among those kept."""
_NEAR = (1.4, 1.0)
"""Lattices are made anew where the best weight is more than this factor from theirs, or the penalty this much."""
_ROUNDS = 3


@dataclass(frozen=True)
class Chosen:
    """The weights with the fewest errors, and the errors of all that were tried, by (lm weight, word penalty)."""

    lm_weight: float
    word_penalty: float
    tried: Mapping[tuple[float, float], Errors]


def choose_weights(
    system: System, corpus: Corpus, features: Mapping[str, np.ndarray], *, autocast: bool, jobs: int, progress: Progress
) -> Chosen:
    """The decoding weights of ``system`` that make the fewest errors on ``corpus``.

    Lattices are made once, at the middle one of the weights to try, and their arcs scored anew for every pair; if the
    best pair is far from that one, they are made again there. They are held in memory, 20 bytes an arc, of
    ``decoding.sweep_utterances`` evenly spaced utterances.
    """
    decoding = system.decoding
    corpus = _spread(corpus, decoding.sweep_utterances)
    graph = to_labelled(read_graph(system.graph), system.tying)
    options = LatticeOptions(decoding.beam, min(_LATTICE_BEAM, decoding.beam), decoding.max_active)
    weights = sorted(decoding.lm_weights)
    made_at = (weights[len(weights) // 2], min(decoding.word_penalties, key=abs))
    for _ in range(_ROUNDS):
        scores = system.likelihoods(features, autocast=autocast, scale=1 / made_at[0])
        generator = Generator(_penalised(graph, made_at[1]), options)
        lattices = _lattices(generator, [u.id for u in corpus], scores, jobs, progress)
        chosen = _best(system, corpus, lattices, made_at)
        ratio = chosen.lm_weight / made_at[0]
        if max(ratio, 1 / ratio) <= _NEAR[0] and abs(chosen.word_penalty - made_at[1]) <= _NEAR[1]:
            break
        made_at = (chosen.lm_weight, chosen.word_penalty)
    return chosen


def _penalised(graph: LabelledAutomaton, penalty: float) -> LabelledAutomaton:
    """``graph`` with a cost for every word."""
    automaton = graph.automaton
    return replace(graph, automaton=replace(automaton, weight=automaton.weight - penalty * (graph.word > 0)))


def _best(system: System, corpus: Corpus, lattices: Mapping[str, Rescorable], made_at: tuple[float, float]) -> Chosen:
    """Of all pairs, by rescoring lattices that were made at one of them."""
    references = {u.id: u.words for u in corpus}
    names = system.lexicon.words
    tried: dict[tuple[float, float], Errors] = {}

    def errors_at(lm_weight: float, word_penalty: float) -> int:
        change = (made_at[0] / lm_weight, word_penalty - made_at[1])
        found = {
            id: tuple(names[label - 1] for label in lattice.best_words(*change)) for id, lattice in lattices.items()
        }
        total = scoring.score(references, found, on_missing="count").total
        tried[lm_weight, word_penalty] = total
        return total.errors

    decoding = system.decoding
    best = search(errors_at, lm_weights=decoding.lm_weights, word_penalties=decoding.word_penalties).best
    return Chosen(best.lm_weight, best.word_penalty, tried)


def _lattices(
    generator: Generator, ids: Sequence[str], scores: Mapping[str, np.ndarray], jobs: int, progress: Progress
) -> dict[str, Rescorable]:
    """Of the utterances that have any path; the others count as not recognised."""

    def one(id: str, found: np.ndarray) -> tuple[str, Rescorable | None]:
        try:
            return id, Rescorable.of(generator(found), found)
        except NoPath as error:
            logger.warning("utterance %s is not recognised: %s", id, error)
            return id, None

    with ThreadPoolExecutor(jobs) as threads:

        def futures() -> Iterator[Future[tuple[str, Rescorable | None]]]:
            for id in ids:
                yield threads.submit(one, id, scores[id])

        made = progress(in_order(futures(), jobs, "a lattice"), total=len(ids), what="lattices for the weights")
        return {id: lattice for id, lattice in made if lattice is not None}


def _spread(corpus: Corpus, count: int) -> Corpus:
    """``count`` evenly spaced utterances, or all."""
    places = np.linspace(0, len(corpus) - 1, min(count, len(corpus))).round().astype(int)
    return Corpus(corpus.name, tuple(corpus.utterances[place] for place in places))
