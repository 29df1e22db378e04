"""Lattices by kaldi-decoder's LatticeSimpleDecoder: an independent search with the same beams."""

from __future__ import annotations

import tempfile
from pathlib import Path

import kaldi_decoder
import kaldifst
import numpy as np

from quadric.lattice.lattice import Lattice
from quadric.speech.epsilons import Arcs, Transducer

_ARC = np.dtype([("ilabel", "<i4"), ("olabel", "<i4"), ("graph", "<f4"), ("acoustic", "<f4"), ("target", "<i4")])


def wheel_decoder(fst: kaldifst.StdVectorFst, beam: float, lattice_beam: float) -> kaldi_decoder.LatticeSimpleDecoder:
    return kaldi_decoder.LatticeSimpleDecoder(
        fst, kaldi_decoder.LatticeSimpleDecoderConfig(beam=beam, lattice_beam=lattice_beam)
    )


def wheel_lattice(decoder: kaldi_decoder.LatticeSimpleDecoder, scores: np.ndarray) -> Transducer | None:
    """The lattice of graph and acoustic log weights, with its epsilon arcs, or none where no final state is reached."""
    if not decoder.decode(kaldi_decoder.DecodableCtc(np.ascontiguousarray(scores, np.float32))):
        return None
    _, lattice = decoder.get_raw_lattice(True)
    with tempfile.TemporaryDirectory() as folder:
        lattice.write(str(Path(folder) / "lattice"))
        content = (Path(folder) / "lattice").read_bytes()
    at = content.index(b"lattice4") + len(b"lattice4") + 4 + 4 + 8  # version, flags, properties
    start = int.from_bytes(content[at : at + 8], "little")
    at += 3 * 8
    final, counts, rows = [], [], []
    for _ in range(lattice.num_states):
        final.append(np.frombuffer(content, "<f4", 2, at).sum())
        counts.append(int.from_bytes(content[at + 8 : at + 16], "little"))
        rows.append(np.frombuffer(content, _ARC, counts[-1], at + 16))
        at += 16 + counts[-1] * _ARC.itemsize
    assert at == len(content)
    arcs = np.concatenate(rows)
    source, target = np.repeat(np.arange(len(counts), dtype=np.int32), counts), arcs["target"].copy()
    weight = -arcs["graph"].astype(np.float64) - arcs["acoustic"]
    return Transducer(
        Arcs(source, target, arcs["ilabel"] - np.int32(1), arcs["olabel"].copy(), weight, source == target),
        -np.array(final, np.float64),
        start,
    )


def as_transducer(lattice: Lattice, scores: np.ndarray) -> Transducer:
    """One of ours with its scores, in the same form."""
    final = np.full(lattice.num_states, -np.inf)
    final[lattice.num_states - len(lattice.final) :] = lattice.final
    weight = lattice.weight + scores[lattice.frame, lattice.pdf].astype(np.float64)
    arcs = Arcs(lattice.source, lattice.target, lattice.pdf, lattice.word, weight, np.zeros(lattice.num_arcs, bool))
    return Transducer(arcs, final, 0)


def sums(lattice: Transducer) -> tuple[float, float]:
    """The best and the log sum of all paths of a lattice without cycles."""
    order, arcs = list[int](), lattice.arcs
    incoming = np.bincount(arcs.target, minlength=lattice.num_states)
    leaving = np.split(
        np.argsort(arcs.source, kind="stable"), np.cumsum(np.bincount(arcs.source, minlength=lattice.num_states))[:-1]
    )
    ready = list(np.flatnonzero(incoming == 0))
    while ready:
        order.append(ready.pop())
        for a in leaving[order[-1]]:
            incoming[arcs.target[a]] -= 1
            if not incoming[arcs.target[a]]:
                ready.append(arcs.target[a])
    best, total = np.full(lattice.num_states, -np.inf), np.full(lattice.num_states, -np.inf)
    best[lattice.start] = total[lattice.start] = 0.0
    for state in order:
        for a in leaving[state]:
            t, x = arcs.target[a], arcs.weight[a]
            best[t] = max(best[t], best[state] + x)
            total[t] = np.logaddexp(total[t], total[state] + x)
    return float((best + lattice.final).max()), float(np.logaddexp.reduce(total + lattice.final))
