"""Lattices by kaldi-decoder's search, in the place of :class:`quadric.lattice.generate.Generator`.

An independent implementation of the same idea: the token passing of D. Povey et al., "Generating exact lattices in the
WFST framework", ICASSP 2012. It is several times slower, and holds Python's lock while it searches.
"""

from __future__ import annotations

import logging

import kaldi_decoder
import kaldifst
import numpy as np
from jaxtyping import Float, Float32

from quadric.lattice.generate import RETRY, LatticeOptions, NoPath, checked
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import Lattice
from quadric.speech.kaldi_arcs import Arcs, connect, times
from quadric.speech.openfst import contents

logger = logging.getLogger(__name__)


class KaldiGenerator:
    """Makes lattices of one graph by kaldi-decoder's ``LatticeSimpleDecoder``.

    May be called from several threads, which wait for each other: the search holds Python's lock.

    Only the search is another one. It is given the graph with every arc's number for its word, so that what the arcs of
    a lattice say and weigh is taken from ``graph``. With wide beams its lattices have the paths of those by
    :class:`~quadric.lattice.generate.Generator`; with narrow ones they differ at the edges. Its costs are float32 sums,
    and its beam holds behind the last frame as well, where the other one keeps every end.

    Args:
        graph: the paths there are.
        options: how many of them to keep. ``max_active`` is not used, for the search has no such limit: every state
            within the beam is followed, and a limit below the default is warned of.
    """

    def __init__(self, graph: LabelledAutomaton, options: LatticeOptions | None = None) -> None:
        self.graph, self.options = graph, options or LatticeOptions()
        if self.options.max_active < LatticeOptions.max_active:
            logger.warning("max_active=%d is not used: backend=kaldi has no such limit", self.options.max_active)
        self._fst = _transducer(graph)

    def __call__(self, scores: Float[np.ndarray, "T C"]) -> Lattice:
        """The lattice of an utterance.

        Args:
            scores: of frames and pdfs, natural logarithms, already scaled against the weights of the graph.

        Returns:
            Its states are pairs of a time and a state of the graph; the weights of its arcs are those of the graph,
            without ``scores``.

        Raises:
            NoPath: no final state is reached, also not with :data:`~quadric.lattice.generate.RETRY` times the beam.
            ValueError: scores without frames, with too few columns, or that are not finite.
        """
        scores = checked(scores, self.graph)  # the decoder reads out of bounds where a column is missing
        for factor in (1.0, RETRY):
            found = self._search(scores, factor)
            if found is not None:
                return self._lattice(found)
        raise NoPath(
            f"no path of the graph through {len(scores)} frames to a final state within a beam of "
            f"{RETRY * self.options.beam:g}: the frames are too few for any sentence, or a wider search is needed"
        )

    def _search(self, scores: Float32[np.ndarray, "T C"], factor: float) -> Arcs | None:
        """The arcs of the decoder's lattice with their numbers in the graph as labels; none if no end is reached."""
        config = kaldi_decoder.LatticeSimpleDecoderConfig(
            beam=factor * self.options.beam, lattice_beam=self.options.lattice_beam
        )
        decoder = kaldi_decoder.LatticeSimpleDecoder(self._fst, config)
        # Where no end is reached, it would have a lattice all the same, of paths that stop anywhere.
        if not decoder.decode(kaldi_decoder.DecodableCtc(scores)):
            return None
        _, lattice = decoder.get_raw_lattice(True)
        read = contents(lattice)
        ends = np.flatnonzero(np.isfinite(read.final).all(1))
        nothing = np.zeros(len(ends), np.int32)
        return Arcs(
            *(read.source, read.target, read.input, read.output - 1, np.zeros(len(read.source))),
            *(ends, nothing, np.zeros(len(ends)), lattice.num_states, lattice.start),
        )

    def _lattice(self, found: Arcs) -> Lattice:
        arcs = connect(found)
        _, time = times(arcs)
        state = np.full(arcs.num_states, -1)  # of the graph
        state[arcs.target] = self.graph.automaton.target[arcs.label]
        used = np.union1d(arcs.source, arcs.target)
        used = used[np.lexsort((state[used], time[used]))]
        number = np.zeros(arcs.num_states, np.int32)
        number[used] = np.arange(len(used))
        order = np.lexsort((arcs.label, number[arcs.target], number[arcs.source]))
        source, target, arc = number[arcs.source[order]], number[arcs.target[order]], arcs.label[order]
        frame = time[used][source]
        last = used[time[used] == time[used[-1]]]
        frames = np.searchsorted(frame, np.arange(frame[-1] + 2)).astype(np.int64)
        return self.graph.lattice(arc, source, target, frames, state[last])


def _transducer(graph: LabelledAutomaton) -> kaldifst.StdVectorFst:
    """The graph with the numbers of its arcs, counted from 1, as words; arcs that are impossible are left out."""
    arcs, fst = graph.automaton, kaldifst.StdVectorFst()
    for _ in range(arcs.num_states):
        fst.add_state()
    fst.start = arcs.start
    for state in np.flatnonzero(arcs.final > -np.inf).tolist():
        fst.set_final(state, -arcs.final[state])
    possible = np.flatnonzero(arcs.weight > -np.inf)
    columns = (arcs.source, arcs.pdf + 1, np.arange(1, arcs.num_arcs + 1), -arcs.weight, arcs.target)
    for source, *arc in zip(*(column[possible].tolist() for column in columns), strict=True):
        fst.add_arc(source, kaldifst.StdArc(*arc))
    return fst
