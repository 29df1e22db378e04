"""Transducers without their epsilon arcs, as arrays.

Epsilons are removed in the log semiring: an arc stands for the *sum* over the epsilon paths it replaces, so that sums
over all paths stay what they were (M. Mohri, "Generic epsilon-removal and input epsilon-normalization algorithms for
weighted transducers", International Journal of Foundations of Computer Science 13(1), 2002). An epsilon path may be
joined to the arc behind it or to the arc before it:

====== ================================================================ =====================================
joined an arc of the result                                             states of the result
====== ================================================================ =====================================
behind an epsilon path from its source, then an arc that emits          the start, and where such an arc ends
before an arc that emits, then an epsilon path on to its target         the start, and where such a path ends
====== ================================================================ =====================================

The first puts the sum of the epsilon paths to the end into the final weights, and takes no words. The second leaves
the states apart in which words meet, where the first multiplies the ends of words with the beginnings of words; and
what is said at the very end has an arc to stand on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import kaldifst
import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from quadric.speech.openfst import contents

EPSILON = -1


@dataclass(frozen=True, eq=False)
class Arcs:
    """The arcs of a transducer, in any order; ``pdf`` is :data:`EPSILON` where an arc emits nothing.

    ``word`` is what an arc says, 0 nothing, and ``own_loop`` whether it led back to its state in the transducer.
    """

    source: Int32[np.ndarray, " A"]
    target: Int32[np.ndarray, " A"]
    pdf: Int32[np.ndarray, " A"]
    word: Int32[np.ndarray, " A"]
    weight: Float64[np.ndarray, " A"]
    own_loop: Bool[np.ndarray, " A"]

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: np.ndarray) -> Arcs:
        """The arcs at ``rows``, a mask or indices."""
        return Arcs(**{name: values[rows] for name, values in vars(self).items()})

    def sorted_by_source(self) -> Arcs:
        return self.take(np.argsort(self.source, kind="stable"))

    @classmethod
    def joined(cls, *parts: Arcs) -> Arcs:
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True, eq=False)
class Transducer:
    """Arcs with the log weights of ending in each state, ``-inf`` where that is impossible, and the start."""

    arcs: Arcs
    final: Float64[np.ndarray, " S"]
    start: int

    @property
    def num_states(self) -> int:
        return len(self.final)


def read_transducer(fst: kaldifst.StdVectorFst) -> Transducer:
    """The part of ``fst`` on complete paths, input labels less 1 as pdfs and costs as log weights.

    Raises ``ValueError`` if there is none.
    """
    fst = fst.copy()
    kaldifst.connect(fst)
    if fst.num_states == 0:
        raise ValueError("fst accepts nothing: no path leads from its start to a final state")
    read = contents(fst)
    arcs = Arcs(
        source=read.source,
        target=read.target,
        pdf=read.input - np.int32(1),
        word=read.output,
        weight=-read.cost[:, 0].astype(np.float64),
        own_loop=read.source == read.target,
    )
    return Transducer(arcs, -read.final[:, 0].astype(np.float64), fst.start)


def epsilons_behind(fst: Transducer) -> Transducer:
    """Each epsilon path joined to the arc behind it; words are left out. States keep their numbers.

    Raises ``ValueError`` for a cycle of epsilon arcs.
    """
    nothing, no_loop = np.zeros_like(fst.arcs.word), np.zeros_like(fst.arcs.own_loop)
    emitting, silent = _divided(replace(fst.arcs, word=nothing, own_loop=no_loop))
    paths = _epsilon_paths(silent, fst.num_states)
    final = np.full(fst.num_states, -np.inf)
    np.logaddexp.at(final, paths.source, paths.weight + fst.final[paths.target])
    arcs = _concatenated(paths, emitting, fst.num_states)
    reached = _marked(fst.num_states, emitting.target)
    reached[fst.start] = True
    return Transducer(_merged(arcs.take(reached[arcs.source])), final, fst.start)


def epsilons_before(fst: Transducer) -> Transducer:
    """Each epsilon path joined to the arc before it, those at the start to the arc behind them. Words are kept.

    An arc says at most one word. Where one would say two, the second goes to the next frame. States keep their
    numbers; new ones come behind them.

    Raises ``ValueError`` for a cycle of epsilon arcs, and where more words meet than frames can say: no state behind
    takes the second one.
    """
    emitting, silent = _divided(fst.arcs)
    useful = _marked(fst.num_states, emitting.source) | (fst.final > -np.inf)
    paths = _epsilon_paths(silent, fst.num_states)
    fst, emitting, second = _with_a_start_of_its_own(fst, emitting, paths)
    arcs, second = _followed(emitting, second, paths, useful, fst.num_states)
    if np.any(second > 0):
        fst, arcs = _postponed(fst, arcs, second)
    reached = _marked(fst.num_states, arcs.target)
    reached[fst.start] = True
    return Transducer(_merged(arcs.take(reached[arcs.source])), fst.final, fst.start)


def numbered(fst: Transducer) -> Transducer:
    """The states that arcs lead to, and the start, numbered without gaps; arcs sorted by source and target."""
    kept = _marked(fst.num_states, fst.arcs.target)
    kept[fst.start] = True
    number = (np.cumsum(kept) - 1).astype(np.int32)
    arcs = replace(fst.arcs, source=number[fst.arcs.source], target=number[fst.arcs.target])
    return Transducer(arcs, fst.final[kept], int(number[fst.start]))


def _divided(arcs: Arcs) -> tuple[Arcs, Arcs]:
    """The arcs that emit, sorted by source, and the others."""
    silent = arcs.pdf == EPSILON
    return arcs.take(~silent).sorted_by_source(), arcs.take(silent)


def _epsilon_paths(silent: Arcs, num_states: int) -> Arcs:
    """All epsilon paths from every state, the empty ones too, as arcs sorted by source.

    Paths between the same states that say the same become one. They grow arc by arc, so that a path which comes back
    to where it began is seen before it goes on for ever.
    """
    states = np.arange(num_states, dtype=np.int32)
    none = np.zeros(num_states, np.int32)
    found = [Arcs(states, states, none + EPSILON, none, none.astype(np.float64), none.astype(bool))]
    silent = longer = _merged(silent)
    while len(longer):
        if np.any(longer.source == longer.target):
            raise ValueError("fst has a cycle of epsilon arcs: sums over its paths are not defined")
        found.append(longer)
        longer = _merged(_concatenated(longer, silent, num_states))
    return Arcs.joined(*found).sorted_by_source()


def _concatenated(left: Arcs, right: Arcs, num_states: int) -> Arcs:
    """Every epsilon path of ``left`` followed by every arc of ``right``, sorted by source, that leaves its end."""
    i, j = _pairs(left.target, right.source, num_states)
    first, then = left.word[i], right.word[j]
    if np.any((first > 0) & (then > 0)):
        raise ValueError("fst has two words on one path of epsilon arcs: put a frame between them")
    return Arcs(
        source=left.source[i],
        target=right.target[j],
        pdf=right.pdf[j],
        word=first + then,
        weight=left.weight[i] + right.weight[j],
        own_loop=right.own_loop[j],
    )


def _with_a_start_of_its_own(
    fst: Transducer, emitting: Arcs, paths: Arcs
) -> tuple[Transducer, Arcs, Int32[np.ndarray, " A"]]:
    """A new start from which the arcs behind the epsilon paths of the old one leave, if it has such paths.

    Also the second word of every arc, 0 for none.
    """
    second = np.zeros(len(emitting), np.int32)
    begin = paths.take(paths.source == fst.start)
    if len(begin) == 1:
        return fst, emitting, second
    i, j = _pairs(begin.target, emitting.source, fst.num_states)
    said, own = begin.word[i], emitting.word[j]
    first = Arcs(
        source=np.full(len(i), fst.num_states, np.int32),
        target=emitting.target[j],
        pdf=emitting.pdf[j],
        word=np.where(said > 0, said, own),
        weight=begin.weight[i] + emitting.weight[j],
        own_loop=emitting.own_loop[j],
    )
    ends = np.logaddexp.reduce(begin.weight + fst.final[begin.target])
    second = np.concatenate([second, np.where(said > 0, own, 0)])
    return Transducer(fst.arcs, np.append(fst.final, ends), fst.num_states), Arcs.joined(emitting, first), second


def _followed(
    emitting: Arcs, second: Int32[np.ndarray, " A"], paths: Arcs, useful: Bool[np.ndarray, " S"], num_states: int
) -> tuple[Arcs, Int32[np.ndarray, " B"]]:
    """The arcs that emit, each followed by each epsilon path to a useful state; and their second words."""
    paths = paths.take(useful[paths.target])
    i, j = _pairs(emitting.target, paths.source, num_states)
    words = np.stack([emitting.word[i], second[i], paths.word[j]])
    if np.any((words > 0).sum(0) > 2):
        raise ValueError("fst says three words at the start of a path within one frame: put frames between them")
    words = np.take_along_axis(words, np.argsort(words == 0, axis=0, kind="stable"), 0)
    arcs = replace(emitting.take(i), target=paths.target[j], word=words[0], weight=emitting.weight[i] + paths.weight[j])
    return arcs, words[1]


def _postponed(fst: Transducer, arcs: Arcs, second: Int32[np.ndarray, " A"]) -> tuple[Transducer, Arcs]:
    """Arcs of two words lead to copies of their targets, whose arcs say the second."""
    order = np.argsort(arcs.source, kind="stable")
    arcs, both, second = arcs.take(order), second[order] > 0, second[order]
    places, copy = np.unique(np.stack([arcs.target[both], second[both]]), axis=1, return_inverse=True)
    i, j = _pairs(places[0], arcs.source, fst.num_states)
    if np.any(fst.final[places[0]] > -np.inf) or np.any(arcs.word[j] > 0):
        raise ValueError("fst says two words in one frame, and the next has no room for one: put frames between them")
    later = replace(arcs.take(j), source=(fst.num_states + i).astype(np.int32), word=places[1][i])
    target = arcs.target.copy()
    target[both] = fst.num_states + copy.reshape(-1)
    final = np.concatenate([fst.final, np.full(places.shape[1], -np.inf)])
    return Transducer(fst.arcs, final, fst.start), Arcs.joined(replace(arcs, target=target), later)


def _merged(arcs: Arcs) -> Arcs:
    """Equal arcs as one with the sum of their probabilities; sorted by source, target, pdf, word."""
    if not len(arcs):
        return arcs
    where = arcs.source.astype(np.int64) << 32 | arcs.target
    what = (arcs.pdf.astype(np.int64) << 32 | arcs.word) * 2 + arcs.own_loop
    order = np.lexsort((what, where))
    where, what = where[order], what[order]
    starts = np.flatnonzero(np.concatenate([[True], (where[1:] != where[:-1]) | (what[1:] != what[:-1])]))
    return replace(arcs.take(order[starts]), weight=np.logaddexp.reduceat(arcs.weight[order], starts))


def _pairs(
    keys: Int32[np.ndarray, " N"], ascending: Int32[np.ndarray, " M"], num_states: int
) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """Indices (i, j), i ascending, of all equal ``keys[i]`` and ``ascending[j]``."""
    offsets = np.searchsorted(ascending, np.arange(num_states + 1, dtype=ascending.dtype))
    first = offsets[keys]
    count = offsets[keys + 1] - first
    i = np.repeat(np.arange(len(keys)), count)
    return i, np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(i))


def _marked(size: int, states: Int32[np.ndarray, " N"]) -> Bool[np.ndarray, " S"]:
    mask = np.zeros(size, bool)
    mask[states] = True
    return mask
