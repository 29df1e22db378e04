"""What a graph must accept, by writing down every way to say every short word sequence; and what a graph accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby, product

import kaldifst
import numpy as np

from quadric.speech.graph import AlignmentGraphs
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import Tying

Ways = dict[tuple[int, ...], dict[tuple[str, ...], float]]
"""Of a sequence of states (pdfs, once each) every word sequence it says, with the cost of words and silences."""


def ways_to_say(
    sentences: Sequence[tuple[str, ...]],
    lexicon: Lexicon,
    tying: Tying,
    cost: Callable[[tuple[str, ...]], float],
    silence_probability: float,
) -> Ways:
    ways: Ways = {}
    for words in sentences:
        for said in product(*(lexicon.pronunciations(word) for word in words)):
            for silences in product((False, True), repeat=len(words) + 1):
                phones = ["SIL"] if silences[0] else []
                for pronunciation, silent in zip(said, silences[1:], strict=True):
                    phones += [*pronunciation, *(["SIL"] if silent else [])]
                price = sum(-math.log(silence_probability if s else 1 - silence_probability) for s in silences)
                found = ways.setdefault(states_of(phones, tying), {})
                found[words] = min(found.get(words, math.inf), cost(words) + price)
    return ways


def states_of(phones: Sequence[str], tying: Tying) -> tuple[int, ...]:
    numbers = [0, *(tying.phones.index(phone) for phone in phones), 0]
    states: list[int] = []
    for i in range(1, len(numbers) - 1):
        left, centre, right = numbers[i - 1 : i + 2]
        if tying.context == 1:
            left = right = 0
        states += tying.table[centre, left, right].tolist()
    return tuple(states)


def expected(pdfs: Sequence[int], ways: Ways, self_loop: float) -> dict[tuple[str, ...], float]:
    """Of every word sequence that ``pdfs``, one a frame, says, the cost."""
    states = tuple(pdf for pdf, _ in groupby(pdfs))
    loops = len(pdfs) - len(states)
    durations = -loops * math.log(self_loop) - len(states) * math.log(1 - self_loop)
    return {words: cost + durations for words, cost in ways.get(states, {}).items()}


def transduce(fst: kaldifst.StdVectorFst, pdfs: Sequence[int], words: Sequence[str]) -> dict[tuple[str, ...], float]:
    """Of every word sequence that ``fst`` puts out for ``pdfs`` the cost of the best path."""
    arcs = [
        [(a.ilabel, a.olabel, a.weight.value, a.nextstate) for a in kaldifst.ArcIterator(fst, state)]
        for state in kaldifst.StateIterator(fst)
    ]
    reached = _along_epsilons({(fst.start, ()): 0.0}, arcs)
    for pdf in pdfs:
        reached = _along_epsilons(_along(reached, arcs, pdf + 1), arcs)
    ends: dict[tuple[str, ...], float] = {}
    for (state, labels), cost in reached.items():
        total = cost + fst.final(state).value
        said = tuple(words[label - 1] for label in labels)
        if total < ends.get(said, math.inf):
            ends[said] = total
    return ends


def _along(reached: dict, arcs: list, label: int) -> dict:
    following: dict = {}
    for (state, labels), cost in reached.items():
        for ilabel, olabel, weight, target in arcs[state]:
            if ilabel == label:
                key = (target, (*labels, olabel) if olabel else labels)
                following[key] = min(following.get(key, math.inf), cost + weight)
    return following


def _along_epsilons(reached: dict, arcs: list) -> dict:
    total, wave = dict(reached), reached
    while wave:
        wave = {key: cost for key, cost in _along(wave, arcs, 0).items() if cost < total.get(key, math.inf)}
        total.update(wave)
    return total


def spoken(words: tuple[str, ...], lexicon: Lexicon, tying: Tying, rng: np.random.Generator) -> list[int]:
    """The pdfs of a random way to say words: pronunciations, silences, durations."""
    automaton = AlignmentGraphs(lexicon, tying).automaton(words)
    state, pdfs = automaton.start, []
    while not (automaton.final[state] > -np.inf and rng.random() < 0.5):
        arc = rng.integers(automaton.offsets[state], automaton.offsets[state + 1])
        pdfs.append(int(automaton.pdf[arc]))
        state = int(automaton.target[arc])
    return pdfs


def noiseless(pdfs: list[int], num_pdfs: int) -> np.ndarray:
    """Scores that spell the truth."""
    scores = np.full((len(pdfs), num_pdfs), -30.0, np.float32)
    scores[np.arange(len(pdfs)), pdfs] = 0.0
    return scores


def noisy(pdfs: list[int], num_pdfs: int, rng: np.random.Generator) -> np.ndarray:
    return (0.15 * noiseless(pdfs, num_pdfs) + rng.normal(scale=2.5, size=(len(pdfs), num_pdfs))).astype(np.float32)
