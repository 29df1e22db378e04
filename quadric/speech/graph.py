"""Graphs of weighted transducers: from the states of phones to words.

A graph is the composition ``H o C o L o G`` of the state transducer ``H``, the context ``C``, the lexicon
``L`` and a grammar ``G``: the language model for decoding, the words of one utterance for alignment. Weights
are costs (negative natural logarithms). M. Mohri, F. Pereira, M. Riley, "Speech recognition with weighted
finite-state transducers", Springer Handbook on Speech Processing, 2008, sections 3 and 4; the silence and the
disambiguation symbols as in D. Povey et al., "The Kaldi speech recognition toolkit", ASRU 2011.

============= ===================================================================
label         meaning
============= ===================================================================
0             epsilon
input         pdf + 1, one a frame
output        index of the word in ``lexicon.words`` + 1, on the first frame of a word (with triphones: of
              the phone before it, if there is one); later where words begin alike
============= ===================================================================

A path through ``K`` emitting states in ``T`` frames costs ``-(T - K) log a - K log(1 - a)`` for its
durations, with ``a = self_loop``; each of the ``N + 1`` places before, between and behind ``N`` words costs
``-log s`` with and ``-log(1 - s)`` without silence, ``s = silence_probability``. Pronunciations of a word have no
weights. To these the decoding graph adds the cost of the words in the language model.
"""

from __future__ import annotations

import errno
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import kaldifst
import numpy as np

from quadric.files import new_file
from quadric.lattice.automaton import Automaton
from quadric.lattice.labelled import LabelledAutomaton
from quadric.speech.epsilons import Transducer, epsilons_before, epsilons_behind, numbered, read_transducer
from quadric.speech.language_model import BEGIN, END, NGram
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import STATES, Tying

logger = logging.getLogger(__name__)


def decoding_graph(
    lexicon: Lexicon,
    arpa: Path,
    tying: Tying,
    *,
    silence_probability: float = 0.5,
    self_loop: float = 0.5,
) -> kaldifst.StdVectorFst:
    """The graph of all sentences of a language model.

    Words of the model that the lexicon lacks are left out, with a warning, as are words of the lexicon that
    the model lacks. Where a model knows an n-gram, the path through its back-off stays in the graph; it is
    the more expensive one in every interpolated model.

    Raises:
        FileNotFoundError: there is no language model at ``arpa``.
        ValueError: a probability is not between 0 and 1, the tying lacks phones of the lexicon, or the
            language model shares no word with the lexicon.
    """
    _check(lexicon, tying, silence_probability, self_loop)
    symbols = _Symbols(lexicon, tying)
    grammar = _grammar(_words_in_common(lexicon, arpa), symbols)
    graph = kaldifst.compose(_lexicon_transducer(symbols, silence_probability, disambiguate=True), grammar)
    kaldifst.determinize_star(graph, use_log=True)
    kaldifst.minimize_encoded(graph, delta=1e-6)  # the default would round costs to 1e-3
    kaldifst.arcsort(graph, sort_type="ilabel")
    return _in_states(graph, symbols.disambiguation, tying, self_loop)


class AlignmentGraphs:
    """The graphs of word sequences: all pronunciations, optional silence before, between and behind words.

    Every pair of pronunciations and silences is exactly one sequence of states, so the sum over the paths of
    a graph counts nothing twice. The lexicon transducer is built once. Raises ``ValueError`` when a
    probability is not between 0 and 1 or the tying lacks phones of the lexicon.
    """

    def __init__(
        self,
        lexicon: Lexicon,
        tying: Tying,
        *,
        silence_probability: float = 0.5,
        self_loop: float = 0.5,
    ) -> None:
        _check(lexicon, tying, silence_probability, self_loop)
        self.lexicon, self.tying, self.self_loop = lexicon, tying, self_loop
        symbols = _Symbols(lexicon, tying)
        self._word_labels = symbols.words
        self._transducer = _lexicon_transducer(symbols, silence_probability, disambiguate=False)

    def graph(self, words: Sequence[str]) -> kaldifst.StdVectorFst:
        """The transducer of ``words``. Raises ``ValueError`` naming the words that the lexicon lacks."""
        self.lexicon.check(Counter(words))
        linear = kaldifst.make_linear_acceptor([self._word_labels[word] for word in words])
        return _in_states(kaldifst.compose(self._transducer, linear), [], self.tying, self.self_loop)

    def automaton(self, words: Sequence[str]) -> Automaton:
        """The graph of ``words`` without epsilons, for sums and best paths over its state sequences."""
        return to_automaton(self.graph(words))


def with_word_penalty(fst: kaldifst.StdVectorFst, penalty: float) -> kaldifst.StdVectorFst:
    """The graph with the cost ``penalty`` added for every word: the higher, the fewer words are recognised."""
    if not math.isfinite(penalty):
        raise ValueError(f"penalty={penalty} must be a finite cost per word")
    labels = {arc.olabel for state in kaldifst.StateIterator(fst) for arc in kaldifst.ArcIterator(fst, state)}
    charge = kaldifst.StdVectorFst()
    charge.start = charge.add_state()
    charge.set_final(charge.start, 0.0)
    for label in sorted(labels - {0}):
        charge.add_arc(charge.start, kaldifst.StdArc(label, label, penalty, charge.start))
    return kaldifst.compose(fst, charge)


def write_graph(fst: kaldifst.StdVectorFst, path: Path) -> None:
    """Writes a graph in OpenFst's binary form; the file appears whole or not at all."""
    with new_file(Path(path)) as temporary:
        if not fst.write(str(temporary)):
            raise OSError(errno.EIO, "the graph could not be written", str(temporary))


def read_graph(path: Path) -> kaldifst.StdVectorFst:
    """Reads what :func:`write_graph` wrote."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such graph file")
    fst = kaldifst.StdVectorFst.read(str(path))
    if fst is None or fst.num_states == 0:
        raise ValueError(f"path={str(path)!r} is not a graph in OpenFst's binary form")
    return fst


def to_automaton(fst: kaldifst.StdVectorFst) -> Automaton:
    """The acceptor of the pdfs of ``fst``, without epsilon arcs and without states off all complete paths.

    Epsilons are removed in the log semiring: the weight of an arc is the log of the *sum* over the epsilon
    paths it stands for, so sums over all paths are those of ``fst``.

    Raises:
        ValueError: ``fst`` accepts nothing, or has a cycle of epsilon arcs.
    """
    return _automaton(numbered(epsilons_behind(read_transducer(fst))))


def to_labelled(fst: kaldifst.StdVectorFst, tying: Tying) -> LabelledAutomaton:
    """The graph ``fst`` with its words, without epsilon arcs: what lattices are generated from.

    As in :func:`to_automaton` sums over all paths stay what they were, also those over the paths of the same words.
    A word on an epsilon arc is said by the arc that emits before it, the last frame before that epsilon; at the
    start of ``fst``, by the first frame.

    Args:
        fst: a graph of states, such as a decoding graph.
        tying: the tying it was built with.

    Raises:
        ValueError: ``fst`` accepts nothing, has a cycle of epsilon arcs, says more words than there are frames for
            them, or is not made of the phones of ``tying``, each of :data:`~quadric.speech.topology.STATES` states
            in turn.
    """
    graph = numbered(epsilons_before(read_transducer(fst)))
    arcs = graph.arcs
    if arcs.pdf.max(initial=-1) >= tying.num_pdfs:
        raise ValueError(f"fst emits pdf {arcs.pdf.max()}, the tying has {tying.num_pdfs} pdfs: pass the one it is of")
    begins = (tying.state_of_pdf[arcs.pdf] == 0) & ~arcs.own_loop
    labelled = LabelledAutomaton(_automaton(graph), arcs.word, tying.phone_of_pdf[arcs.pdf], begins)
    _check_phones(labelled, tying)
    return labelled


def _automaton(graph: Transducer) -> Automaton:
    arcs = graph.arcs
    return Automaton(arcs.source, arcs.target, arcs.pdf, arcs.weight, graph.final, graph.start)


def _check_phones(graph: LabelledAutomaton, tying: Tying) -> None:
    """Raises ``ValueError`` unless a phone begins where :func:`~quadric.speech.topology.phone_segments` sees one."""
    arcs, last = graph.automaton, STATES - 1
    state = tying.state_of_pdf[arcs.pdf]
    # Lowest and highest (phone, state) of the arcs into every state.
    place = STATES * graph.phone + state
    lowest, highest = np.full(arcs.num_states, STATES * len(tying.phones)), np.full(arcs.num_states, -1)
    np.minimum.at(lowest, arcs.target, place)
    np.maximum.at(highest, arcs.target, place)
    ends = np.ones(arcs.num_states, bool)
    ends[arcs.target[state != last]] = False
    goes_on = (lowest[arcs.source] >= place - (state > 0)) & (highest[arcs.source] <= place)
    at_start = (arcs.source == arcs.start) & (highest[arcs.start] < 0)
    if not np.all(np.where(graph.begins, ends[arcs.source], goes_on & ~at_start)):
        raise ValueError(
            f"fst is not made of the tying's phones, each of {STATES} states in turn with self loops: pass the tying "
            "that it was built with"
        )


class _Symbols:
    """The labels inside a graph. Phone ``p`` of the tying is ``p + 1``; behind the phones come #0, #1 ..."""

    def __init__(self, lexicon: Lexicon, tying: Tying) -> None:
        self.words = {word: label for label, word in enumerate(lexicon.words, start=1)}
        self.phones = {phone: label for label, phone in enumerate(tying.phones, start=1)}
        self.silence = 1
        self.back_off = len(self.phones) + 1
        self.back_off_word = len(self.words) + 1
        self.pronunciations = [
            (self.words[word], [self.phones[phone] for phone in phones], number)
            for (word, phones), number in zip(lexicon.entries, _disambiguation(lexicon), strict=True)
        ]
        highest = max(number for *_, number in self.pronunciations)
        self.behind_silence = self.back_off + highest + 1
        self.disambiguation = list(range(self.back_off, self.behind_silence + 1))


def _disambiguation(lexicon: Lexicon) -> list[int]:
    """For every entry the number of the symbol behind its phones: 0, none, unless the phones are those of
    another entry or the beginning of one. Entries with the same phones get 1, 2, ..."""
    times = Counter(phones for _, phones in lexicon.entries)
    beginnings = {phones[:k] for phones in times for k in range(1, len(phones))}
    used: Counter[tuple[str, ...]] = Counter()
    numbers = []
    for _, phones in lexicon.entries:
        if times[phones] > 1 or phones in beginnings:
            used[phones] += 1
        numbers.append(used[phones])
    return numbers


def _lexicon_transducer(symbols: _Symbols, silence_probability: float, *, disambiguate: bool) -> kaldifst.StdVectorFst:
    """L: words in, optional silences and phones out; sorted by word."""
    fst = kaldifst.StdVectorFst()
    start, loop, silence = fst.add_state(), fst.add_state(), fst.add_state()
    fst.start = start
    fst.set_final(loop, 0.0)
    with_silence, without = -math.log(silence_probability), -math.log(1 - silence_probability)

    def leave(state: int, phone: int, word: int) -> None:
        fst.add_arc(state, kaldifst.StdArc(phone, word, without, loop))
        fst.add_arc(state, kaldifst.StdArc(phone, word, with_silence, silence))

    leave(start, 0, 0)
    if disambiguate:
        behind = fst.add_state()
        fst.add_arc(silence, kaldifst.StdArc(symbols.silence, 0, 0.0, behind))
        fst.add_arc(behind, kaldifst.StdArc(symbols.behind_silence, 0, 0.0, loop))
        fst.add_arc(loop, kaldifst.StdArc(symbols.back_off, symbols.back_off_word, 0.0, loop))
    else:
        fst.add_arc(silence, kaldifst.StdArc(symbols.silence, 0, 0.0, loop))
    for word, phones, number in symbols.pronunciations:
        labels = [*phones, symbols.back_off + number] if disambiguate and number else phones
        state, output = loop, word
        for label in labels[:-1]:
            following = fst.add_state()
            fst.add_arc(state, kaldifst.StdArc(label, output, 0.0, following))
            state, output = following, 0
        leave(state, labels[-1], output)
    kaldifst.arcsort(fst, sort_type="olabel")
    return fst


def _words_in_common(lexicon: Lexicon, arpa: Path) -> NGram:
    """The language model without the words that the lexicon lacks."""
    model = NGram.read_arpa(arpa)
    outside = [word for word in model.vocabulary if word not in lexicon]
    if len(outside) == len(model.vocabulary):
        raise ValueError(f"arpa={str(arpa)!r} has no word in common with the lexicon: are both upper case?")
    if outside:
        logger.warning(
            "%s: %d words are left out of the graph, the lexicon lacks them: %s",
            *(arpa, len(outside), ", ".join(outside[:10])),
        )
    if missing := set(lexicon.words).difference(model.vocabulary):
        logger.warning("%s lacks %d of the lexicon's words: they cannot be recognised", arpa, len(missing))
    return model.within(lexicon)


def _grammar(model: NGram, symbols: _Symbols) -> kaldifst.StdVectorFst:
    """G: the language model as an acceptor of words, with #0 on the arcs that back off; sorted by word.

    A state is a history that some n-gram continues; where an n-gram ends in none, its arc backs off at once.
    """
    fst = kaldifst.StdVectorFst()
    histories = sorted({(), (BEGIN,), *(ngram[:-1] for ngram in model.entries)})
    states = {history: fst.add_state() for history in histories}
    fst.start = states[(BEGIN,)]

    def add_arc(source: int, label: int, output: int, log_prob: float, history: tuple[str, ...]) -> None:
        while history not in states:
            log_prob, history = log_prob + model.back_off(history), history[1:]
        fst.add_arc(source, kaldifst.StdArc(label, output, -log_prob, states[history]))

    for history, state in states.items():
        if history:
            add_arc(state, symbols.back_off_word, 0, model.back_off(history), history[1:])
    for ngram, entry in model.entries.items():
        state, word = states[ngram[:-1]], ngram[-1]
        if word == END:
            fst.set_final(state, -entry.log_prob)
        elif word != BEGIN:
            add_arc(state, symbols.words[word], symbols.words[word], entry.log_prob, ngram)
    kaldifst.connect(fst)
    kaldifst.arcsort(fst, sort_type="ilabel")
    return fst


def _in_states(
    phones: kaldifst.StdVectorFst, disambiguation: list[int], tying: Tying, self_loop: float
) -> kaldifst.StdVectorFst:
    """H o C o phones: a transducer of phones turned into one of pdfs, without symbols of disambiguation."""
    width = tying.context
    in_context, windows = kaldifst.compose_context(disambiguation, width, width // 2, phones)
    kaldifst.arcsort(in_context, sort_type="ilabel")
    fst = kaldifst.compose(_state_transducer(windows, tying, self_loop), in_context)
    kaldifst.connect(fst)
    return fst


def _state_transducer(windows: list[list[int]], tying: Tying, self_loop: float) -> kaldifst.StdVectorFst:
    """H: the phones in context, numbered as in ``windows``, in, and their states with self loops out.

    Windows of one label not above 0 are symbols of disambiguation; a 0 inside a window lies beyond the end
    of the utterance. Sorted by window.
    """
    fst = kaldifst.StdVectorFst()
    fst.start = home = fst.add_state()
    fst.set_final(home, 0.0)
    stay, go = -math.log(self_loop), -math.log(1 - self_loop)
    for label, window in enumerate(windows):
        if not window:
            continue
        if len(window) == 1 and window[0] <= 0:
            fst.add_arc(home, kaldifst.StdArc(0, label, 0.0, home))
            continue
        state, cost = home, 0.0
        for pdf in tying.pdfs([max(phone - 1, 0) for phone in window]):
            following = fst.add_state()
            fst.add_arc(state, kaldifst.StdArc(pdf + 1, label, cost, following))
            fst.add_arc(following, kaldifst.StdArc(pdf + 1, 0, stay, following))
            state, cost, label = following, go, 0
        fst.add_arc(state, kaldifst.StdArc(0, 0, go, home))
    kaldifst.arcsort(fst, sort_type="olabel")
    return fst


def _check(lexicon: Lexicon, tying: Tying, silence_probability: float, self_loop: float) -> None:
    for name, value in (("silence_probability", silence_probability), ("self_loop", self_loop)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}={value} must be between 0 and 1, both excluded")
    missing = sorted(set(lexicon.phones) - set(tying.phones))
    if missing:
        raise ValueError(f"tying lacks the phones {', '.join(missing)} of the lexicon: build it for the same lexicon")
