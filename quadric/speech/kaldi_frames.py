"""Lattices from Kaldi's files and into them.

    transitions = TransitionModel.load("final.mdl")
    words = WordLabels.read("words.txt", lexicon, {"<UNK>": None})
    for id, lattice in read_lattices("lat.1.gz", transitions, words=words):
        ...

Kaldi's graph costs become log weights; its acoustic costs stay behind, since they belong to the model that made the
lattice. The graph costs hold whatever scales were in the graph that Kaldi decoded with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import numba
import numpy as np
from jaxtyping import Float

from quadric.lattice.lattice import Lattice
from quadric.speech.kaldi_archive import read_archive
from quadric.speech.kaldi_arcs import Arcs, connect, one_word_a_frame, times, without_epsilons
from quadric.speech.kaldi_lattice import KaldiLattice
from quadric.speech.kaldi_words import WordLabels
from quadric.speech.transitions import TransitionModel

# ------------------------------------------------------------------------------------------------ from Kaldi's form


def read_lattices(
    path: str | os.PathLike[str],
    transitions: TransitionModel,
    *,
    words: WordLabels | None = None,
    reorder: bool = True,
    root: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[str, Lattice]]:
    """The lattices of a Kaldi archive or scp file with their ids; see :func:`read_archive` and :func:`to_lattice`.

    Raises ``ValueError`` as they do, with file and utterance.
    """
    for id, given in read_archive(path, root=root):
        try:
            lattice = to_lattice(given, transitions, words=words, reorder=reorder)
        except ValueError as error:
            raise ValueError(f"{path}: the lattice of {id}: {error}") from None
        yield id, lattice


def to_lattice(
    given: KaldiLattice, transitions: TransitionModel, *, words: WordLabels | None = None, reorder: bool = True
) -> Lattice:
    """The paths of ``given`` as a :class:`Lattice`, with the same log weight in total for every sequence of words.

    Epsilon arcs are removed in the log semiring, and arcs that say the same between two states become one. A word
    stands on the first frame of its arc; one on an arc without frames waits for the next frame, or, behind the last
    one, takes the last. In compact lattices words begin where Kaldi's determinisation put them, often earlier than
    they are said: ``lattice-align-words`` puts them right. Phones are Kaldi's numbers minus 1, so that those of
    :meth:`TransitionModel.of` index ``Tying.phones``.

    A phone begins with the first frame and behind every transition to the end of a phone. A state of Kaldi's lattice
    that is both the beginning of a phone and within it, as there are with ``reorder=False``, becomes two.

    Args:
        words: labels of the lexicon for those of the lattice; without, labels stay as they are.
        reorder: whether self loops stand behind the transition that leaves their state, as in graphs that Kaldi made
            with ``--reorder=true``, its default; otherwise they stand in front of it.

    Raises:
        ValueError: no complete path, a cycle, paths of different lengths, more words than frames, unknown
            transition-ids or words, and transitions that cannot follow each other.
    """
    arcs = connect(
        Arcs(given.source, given.target, given.transition, given.word, -given.graph, given.final,
             np.zeros(len(given.final), np.int32), -given.final_graph, given.num_states, given.start)
    )  # fmt: skip
    highest = int(arcs.transition.max(initial=0))
    if highest > transitions.num_ids:
        raise ValueError(
            f"the transition-id {highest} is unknown: the transition model has {transitions.num_ids}; it belongs to "
            "another model"
        )
    if words is not None:
        arcs = arcs._replace(label=words(arcs.label))
    order, time = times(arcs)
    arcs, time = one_word_a_frame(connect(without_epsilons(arcs, order)), time)
    return _build(_with_begins(connect(arcs), time, transitions, reorder), time, transitions, reorder)


def _with_begins(arcs: Arcs, time: np.ndarray, transitions: TransitionModel, reorder: bool) -> Arcs:
    """The arcs with states in two: 2 s where state s is within a phone, 2 s + 1 where one has ended."""
    by_time = np.argsort(time[arcs.source], kind="stable")
    arcs = arcs.of([column[by_time] for column in arcs[:5]], arcs[5:8])
    loop, ends = transitions.self_loop[arcs.transition], transitions.ends[arcs.transition]
    there = np.zeros((arcs.num_states, 2), bool)
    there[arcs.start, 1] = True
    edges = np.searchsorted(time[arcs.source], np.arange(time.max() + 2))
    after = [np.where(loop & reorder, bit, ends).astype(np.int64) for bit in (0, 1)]
    for first, last in pairwise(edges.tolist()):
        for bit in (0, 1):
            passed = there[arcs.source[first:last], bit]
            there[arcs.target[first:last][passed], after[bit][first:last][passed]] = True
    taken = [np.flatnonzero(there[arcs.source, bit]) for bit in (0, 1)]
    which = np.concatenate(taken)
    split = arcs._replace(
        source=np.concatenate([2 * arcs.source[rows] + bit for bit, rows in enumerate(taken)]),
        target=np.concatenate([2 * arcs.target[rows] + after[bit][rows] for bit, rows in enumerate(taken)]),
        transition=arcs.transition[which],
        label=arcs.label[which],
        weight=arcs.weight[which],
        final=np.concatenate([2 * arcs.final[there[arcs.final, bit]] + bit for bit in (0, 1)]),
        final_weight=np.concatenate([arcs.final_weight[there[arcs.final, bit]] for bit in (0, 1)]),
        num_states=2 * arcs.num_states,
        start=2 * arcs.start + 1,
    )
    _check_order(split, time, transitions, reorder)
    return split


def _check_order(arcs: Arcs, time: np.ndarray, transitions: TransitionModel, reorder: bool) -> None:
    """Raises ``ValueError`` where an arc cannot follow another one by the topology of their phone."""
    state, loop = transitions.state[arcs.transition], transitions.self_loop[arcs.transition]
    phone, ended = transitions.phone[arcs.transition], arcs.source % 2 == 1

    def follows(values: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Whether all the arcs ``which`` in front of each arc, if any, have its value."""
        low, high = np.full(arcs.num_states, np.iinfo(np.int64).max), np.full(arcs.num_states, np.iinfo(np.int64).min)
        np.minimum.at(low, arcs.target[which], values[which])
        np.maximum.at(high, arcs.target[which], values[which])
        return (high[arcs.source] < low[arcs.source]) | ((low[arcs.source] == values) & (high[arcs.source] == values))

    every = np.ones(len(loop), bool)
    wrong = loop & (~follows(state, every) | (arcs.source == arcs.start)) if reorder else ~follows(state, loop)
    if wrong.any():
        arc = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"the transition-id {arcs.transition[arc]} in frame {time[arcs.source[arc] // 2]} does not follow from the "
            f"one before it when self loops stand {'behind' if reorder else 'in front of'} the transition that leaves "
            f"their state: pass reorder={not reorder}, or the transition model of the same system"
        )
    entered = transitions.hmm_state[arcs.transition] == 0
    inner = ~loop if reorder else every
    wrong = inner & np.where(ended, ~entered, ~follows(phone, every))
    if wrong.any():
        arc = int(np.flatnonzero(wrong)[0])
        what = (
            "begins a phone, but not in its first state" if ended[arc] else "is of another phone, which has not ended"
        )
        raise ValueError(
            f"the transition-id {arcs.transition[arc]} in frame {time[arcs.source[arc] // 2]} {what}: the transition "
            "model belongs to another system"
        )


def _build(arcs: Arcs, time: np.ndarray, transitions: TransitionModel, reorder: bool) -> Lattice:
    """Numbers the states frame by frame and makes one arc of those that say the same."""
    # Self loops that stand behind the end of a phone still belong to it.
    begins = (arcs.source % 2 == 1) & ~(transitions.self_loop[arcs.transition] & reorder)
    used = np.union1d(arcs.source, arcs.target)
    used = used[np.argsort(time[used // 2], kind="stable")]
    number = np.zeros(arcs.num_states, np.int64)
    number[used] = np.arange(len(used))
    rows = np.stack(
        [
            number[arcs.source],
            number[arcs.target],
            transitions.pdf[arcs.transition],
            transitions.phone[arcs.transition] - 1,
            begins,
            arcs.label,
        ],
        axis=1,
    )
    order = np.lexsort(rows.T[::-1])
    rows = rows[order]
    first = np.flatnonzero(np.concatenate([[True], np.any(rows[1:] != rows[:-1], axis=1)]))
    weight = np.logaddexp.reduceat(arcs.weight[order], first)
    source, target, pdf, phone, begin, word = (np.ascontiguousarray(column) for column in rows[first].T)
    frame = time[used // 2][source]
    ends = np.flatnonzero(time[used // 2] == time[used // 2].max())
    final = np.full(len(used), -np.inf)
    final[number[arcs.final]] = arcs.final_weight
    return Lattice(
        source=source.astype(np.int32),
        target=target.astype(np.int32),
        pdf=pdf.astype(np.int32),
        weight=weight.astype(np.float32),
        word=word.astype(np.int32),
        phone=phone.astype(np.int32),
        begins=begin.astype(np.bool_),
        frames=np.searchsorted(frame, np.arange(frame[-1] + 2)).astype(np.int64),
        final=final[ends],
    )


def check_frames(lattice: Lattice, frames: int, *, id: str = "") -> None:
    """Raises ``ValueError`` where the lattice of utterance ``id`` has other than ``frames`` frames, as its features."""
    if lattice.num_frames != frames:
        raise ValueError(
            f"the lattice{f' of {id}' if id else ''} has {lattice.num_frames} frames, the features have {frames}: make "
            "both from the same frames (chain models keep one frame of three)"
        )


def acoustic_difference(
    given: KaldiLattice, transitions: TransitionModel, scores: Float[np.ndarray, " T C"], *, scale: float = 1.0
) -> float:
    """By how much at most the acoustic costs of a whole path differ from ``-scale * scores``, summed over its frames.

    Kaldi moves costs along a path, so nothing less than whole paths can be compared. ``scores`` are those of the
    pdfs, log likelihoods; ``scale`` is 1 for the lattices that Kaldi's scripts keep. A difference far above rounding
    says that the model, its priors or the features are not those of the lattice.

    Raises ``ValueError`` where lattice, transition model and scores do not fit together.
    """
    acoustic = np.array(given.acoustic)
    arcs = connect(
        Arcs(given.source, given.target, given.transition, np.arange(len(acoustic)), acoustic, given.final,
             np.arange(len(given.final)), given.final_acoustic, given.num_states, given.start)
    )  # fmt: skip
    order, time = times(arcs)
    transitions.check_pdfs(scores.shape[1])
    if time.max() != len(scores):
        raise ValueError(f"scores have {len(scores)} frames, the lattice has {time.max()}")
    emits = arcs.transition > 0
    difference = arcs.weight.copy()
    difference[emits] += scale * scores[time[arcs.source[emits]], transitions.pdf[arcs.transition[emits]]]
    place = np.empty(arcs.num_states, np.int64)
    place[order] = np.arange(len(order))
    by_time = np.argsort(place[arcs.source], kind="stable")
    ranges = []
    for sign in (1.0, -1.0):
        worst = np.full(arcs.num_states, -np.inf)
        worst[arcs.start] = 0.0
        _highest(arcs.source[by_time], arcs.target[by_time], sign * difference[by_time], worst)
        ranges.append(float(np.max(worst[arcs.final] + sign * arcs.final_weight)))
    return max(ranges)


@numba.njit(nogil=True, cache=True)
def _highest(source, target, weight, best):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The highest weight of the paths to each state, over arcs in topological order."""
    for arc in range(len(source)):
        best[target[arc]] = max(best[target[arc]], best[source[arc]] + weight[arc])


# ------------------------------------------------------------------------------------------------ into Kaldi's form


def from_lattice(
    lattice: Lattice,
    transitions: TransitionModel,
    *,
    scores: Float[np.ndarray, " T C"] | None = None,
    scale: float = 1.0,
) -> KaldiLattice:
    """The paths of ``lattice`` with transition-ids, as Kaldi writes them with ``--reorder=true``.

    Args:
        transitions: a model without skips, such as :meth:`TransitionModel.of`: a pdf of a phone belongs to one
            transition-state, which one transition leaves beside its self loop.
        scores: log likelihoods of the pdfs, for the acoustic costs ``-scale * scores``; without, they are 0.
        scale: 1 as Kaldi's scripts keep lattices: its tools scale the costs when they read them.

    Raises:
        ValueError: ``scores`` of another length or with too few pdfs, pdfs and phones that the model does not have,
            and models with skips.
    """
    if scores is not None and (scores.ndim != 2 or len(scores) != len(lattice) or scores.shape[1] < lattice.num_pdfs):
        raise ValueError(
            f"scores of shape {scores.shape} do not fit a lattice of {len(lattice)} frames and {lattice.num_pdfs} pdfs"
        )
    state = _transition_states(lattice, transitions)
    onward, loop = _onward_and_loop(transitions)
    width = len(onward)

    # A state is split where an arc that leaves it may go on with the transition-state of one that enters it.
    within = np.unique(lattice.source[~lattice.begins].astype(np.int64) * width + state[~lattice.begins])
    enters = lattice.target.astype(np.int64) * width + state
    enters = np.where(np.isin(enters, within), enters, lattice.target.astype(np.int64) * width)
    split = np.unique(np.concatenate([np.zeros(1, np.int64), enters]))
    of = split // width
    first, last = np.searchsorted(of, lattice.source), np.searchsorted(of, lattice.source, side="right")
    arc = np.repeat(np.arange(lattice.num_arcs), last - first)
    source = np.arange(len(arc)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[arc]
    goes_on = ~lattice.begins[arc] & (split[source] % width == state[arc])
    transition = np.where(goes_on, loop[state[arc]], onward[state[arc]])
    wrong = np.flatnonzero((transition == 0) | (transitions.pdf[transition] != lattice.pdf[arc]))
    if len(wrong):
        phone, pdf = int(lattice.phone[arc[wrong[0]]]), int(lattice.pdf[arc[wrong[0]]])
        raise ValueError(
            f"transitions: phone {phone + 1} with pdf {pdf} does not allow what frame "
            f"{lattice.frame[arc[wrong[0]]]} does: the model belongs to another system, or it has skips, which cannot "
            "be written"
        )
    ends = np.flatnonzero(of >= lattice.num_states - len(lattice.final))
    acoustic = np.zeros(len(arc)) if scores is None else -scale * scores[lattice.frame[arc], lattice.pdf[arc]]
    return KaldiLattice(
        source=source.astype(np.int32),
        target=np.searchsorted(split, enters[arc]).astype(np.int32),
        transition=transition.astype(np.int32),
        word=lattice.word[arc],
        graph=-lattice.weight[arc].astype(np.float64),
        acoustic=acoustic.astype(np.float64),
        final=ends.astype(np.int32),
        final_graph=-lattice.final[of[ends] - (lattice.num_states - len(lattice.final))],
        final_acoustic=np.zeros(len(ends)),
        num_states=len(split),
    )


def _transition_states(lattice: Lattice, transitions: TransitionModel) -> np.ndarray:
    """The transition-state of every arc, from its phone and pdf."""
    owners: dict[tuple[int, int], set[int]] = {}
    for number, (phone, _, *pdfs) in enumerate(transitions.states.tolist(), 1):
        for pdf in pdfs:
            owners.setdefault((phone - 1, pdf), set()).add(number)
    pairs, which = np.unique(np.stack([lattice.phone, lattice.pdf], 1), axis=0, return_inverse=True)
    found = [owners.get((phone, pdf), set()) for phone, pdf in pairs.tolist()]
    for (phone, pdf), states in zip(pairs.tolist(), found, strict=True):
        if len(states) != 1:
            raise ValueError(
                f"transitions: phone {phone + 1} with pdf {pdf} has {len(states)} transition-states, one expected: "
                "pass the transition model of the same system"
            )
    return np.array([next(iter(states)) for states in found])[which.ravel()]


def _onward_and_loop(transitions: TransitionModel) -> tuple[np.ndarray, np.ndarray]:
    """The transition-id onward and the self loop of every transition-state; 0: it has none, or onward several."""
    tables = []
    for which in (~transitions.self_loop, transitions.self_loop):
        ids = np.flatnonzero(which & (transitions.state > 0))
        table = np.zeros(len(transitions.states) + 1, np.int64)
        table[transitions.state[ids]] = ids
        table[np.bincount(transitions.state[ids], minlength=len(table)) > 1] = 0
        tables.append(table)
    return tables[0], tables[1]
