"""What a graph says for a sequence of pdfs, path by path, before and after its epsilons are removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import kaldifst
import numpy as np

from quadric.lattice.labelled import LabelledAutomaton
from quadric.speech.epsilons import Transducer

Said = dict[tuple[int, ...], float]
"""Of every sequence of labels the log of the sum over the paths that say it."""


def said_by_fst(fst: kaldifst.StdVectorFst, pdfs: Sequence[int]) -> Said:
    """Follows the arcs one by one, epsilons as they come; ``fst`` has no cycle of them."""
    arcs = [[(a.ilabel, a.olabel, -a.weight.value, a.nextstate) for a in kaldifst.ArcIterator(fst, s)]
            for s in range(fst.num_states)]  # fmt: skip
    ends: Said = {}

    def walk(state: int, at: int, labels: tuple[int, ...], weight: float) -> None:
        if at == len(pdfs) and math.isfinite(fst.final(state).value):
            ends[labels] = float(np.logaddexp(ends.get(labels, -np.inf), weight - fst.final(state).value))
        for ilabel, olabel, log_weight, target in arcs[state]:
            longer = (*labels, olabel) if olabel else labels
            if ilabel == 0:
                walk(target, at, longer, weight + log_weight)
            elif at < len(pdfs) and ilabel == pdfs[at] + 1:
                walk(target, at + 1, longer, weight + log_weight)

    walk(fst.start, 0, (), 0.0)
    return ends


def said_by_arrays(graph: Transducer | LabelledAutomaton, pdfs: Sequence[int]) -> Said:
    """The same of a graph without epsilons."""
    if isinstance(graph, LabelledAutomaton):
        arcs, words, start, final = graph.automaton, graph.word, graph.automaton.start, graph.automaton.final
    else:
        arcs, words, start, final = graph.arcs, graph.arcs.word, graph.start, graph.final
    leaving: dict[int, list[int]] = {}
    for a, source in enumerate(arcs.source.tolist()):
        leaving.setdefault(source, []).append(a)
    reached = {(start, ()): 0.0}
    for pdf in pdfs:
        following: dict[tuple[int, tuple[int, ...]], float] = {}
        for (state, labels), weight in reached.items():
            for a in leaving.get(state, []):
                if arcs.pdf[a] == pdf:
                    key = (int(arcs.target[a]), (*labels, int(words[a])) if words[a] else labels)
                    following[key] = np.logaddexp(following.get(key, -np.inf), weight + arcs.weight[a])
        reached = following
    ends: Said = {}
    for (state, labels), weight in reached.items():
        if final[state] > -np.inf:
            ends[labels] = float(np.logaddexp(ends.get(labels, -np.inf), weight + final[state]))
    return ends
