"""Lattice generation beside kaldi-decoder's: the same graphs, scores and beams, in one run.

    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --system exp/speechocean/adamw/decoded/system --data PATH/speechocean762/data/dev

Prints frames a second of processor time on one thread, how many times faster two threads are by the clock, arcs a frame
(those of kaldi-decoder once its epsilon arcs are taken out as ours are), and how far the log sums over the paths of the
two lattices lie apart. Graphs are loops of words of random pronunciations with a bigram, likelihoods are random: the
worst case, in which nothing can be pruned early. A trained system adds its graph and the scores of a data directory.
kaldi-decoder has no limit of active states, nor has ours in these runs; a last row has the usual one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kaldi_decoder
import kaldifst
import numpy as np

from common import Table
from quadric.lattice.generate import Generator, LatticeOptions
from quadric.lattice.lattice import Lattice
from quadric.speech.epsilons import Transducer, epsilons_before, numbered
from quadric.speech.graph import decoding_graph, read_graph, to_labelled
from quadric.speech.language_model import NGram
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import Tying, monophone

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference.toy_language import triphone
from reference.wheel import as_transducer, sums, wheel_decoder, wheel_lattice

LIMIT = 10**7
ROUNDS = 3
FRAMES, UTTERANCES = 300, 3
COLUMNS = (
    "graph", "states", "arcs", "beams", "ours, frames/s", "kaldi-decoder, frames/s", "ratio", "two threads",
    "arcs/frame", "theirs", "log Z, ours less theirs",
)  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--system", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--utterances", type=int, default=6, help="of the data")
    chosen = parser.parse_args()
    if (chosen.system is None) != (chosen.data is None):
        parser.error("--system and --data go together")
    table = Table(COLUMNS, chosen.json)
    for words, context, beams in (
        (11, 1, (16.0, 8.0)),
        (30, 1, (16.0, 8.0)),
        (11, 3, (13.0, 6.0)),
        (30, 3, (13.0, 6.0)),
    ):
        fst, tying = random_language(words, context)
        rng = np.random.default_rng(words + context)
        scores = [rng.normal(size=(FRAMES, tying.num_pdfs)).astype(np.float32) for _ in range(UTTERANCES)]
        name = f"{words} words, {'monophones' if context == 1 else 'triphones'}"
        measure(table, name, fst, tying, scores, LatticeOptions(*beams, LIMIT))
    if chosen.system is not None:
        from quadric.train.system import System

        system = System.load(chosen.system)
        scores = scores_of(system, chosen.data, chosen.utterances)
        fst = read_graph(system.graph)
        measure(table, "trained", fst, system.tying, scores, LatticeOptions(8.0, 5.0, LIMIT))
        measure(table, "trained", fst, system.tying, scores, LatticeOptions(), wheel=False)


def random_language(words: int, context: int) -> tuple[kaldifst.StdVectorFst, Tying]:
    """Words of two to five of twenty phones, in a bigram of random sentences."""
    rng = np.random.default_rng(1)
    phones = [f"p{number}" for number in range(20)]
    lexicon = Lexicon(
        tuple((f"W{k:03}", tuple(rng.choice(phones, size=rng.integers(2, 6)).tolist())) for k in range(words))
    )
    tying = monophone(lexicon.phones) if context == 1 else triphone(lexicon.phones)
    text = [tuple(rng.choice(lexicon.words, size=6).tolist()) for _ in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        NGram.estimate(text, lexicon.words, 2).write_arpa(Path(folder) / "lm.arpa")
        return decoding_graph(lexicon, Path(folder) / "lm.arpa", tying), tying


def scores_of(system: Any, data: Path, count: int) -> list[np.ndarray]:
    """The scaled scores of the first utterances of a data directory."""
    from quadric.progress import silent
    from quadric.speech.corpus import read_data_dir
    from quadric.train.prepare import make_features
    from quadric.train.sources import Material

    with tempfile.TemporaryDirectory() as folder:
        features = make_features(Material(read_data_dir(data).head(count), None), system.front, Path(folder), 1, silent)
        likelihoods = system.likelihoods(features)
        return [likelihoods[id] / np.float32(system.lm_weight) for id in likelihoods]


def measure(
    table: Table,
    name: str,
    fst: kaldifst.StdVectorFst,
    tying: Tying,
    scores: Sequence[np.ndarray],
    options: LatticeOptions,
    *,
    wheel: bool = True,
) -> None:
    """One row: both once on one utterance, then three times on all; the best counts."""
    graph = to_labelled(fst, tying)
    generator, frames = Generator(graph, options), sum(map(len, scores))
    generator(scores[0])
    lattices, seconds, together = list[Lattice](), [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        lattices = [generator(row) for row in scores]
        seconds.append(time.process_time() - start)
        clock = time.perf_counter()
        alone = [generator(row) for row in scores]
        middle = time.perf_counter()
        with ThreadPoolExecutor(2) as threads:
            assert len(list(threads.map(generator, scores))) == len(alone)
        together.append((middle - clock) / (time.perf_counter() - middle))
    arcs = sum(lattice.num_arcs for lattice in lattices) / frames
    row: dict[str, Any] = {"graph": name, "states": graph.num_states, "arcs": graph.num_arcs, "beam": options.beam,
           "lattice_beam": options.lattice_beam, "max_active": options.max_active, "ours": frames / min(seconds),
           "two_threads": max(together), "arcs_a_frame": arcs}  # fmt: skip
    theirs = ["", "", ""]
    if wheel:
        row |= compare(fst, scores, options, lattices)
        theirs = [f"{row['wheel']:,.0f}", f"{row['ours'] / row['wheel']:.1f}", f"{row['wheel_arcs_a_frame']:.1f}"]
    differ = f"{row['log_z'][0]:+.3f} to {row['log_z'][1]:+.3f}" if wheel else ""
    active = "" if options.max_active == LIMIT else f", {options.max_active} states"
    table.add(row, [
        name, f"{graph.num_states:,}", f"{graph.num_arcs:,}", f"{options.beam:g}/{options.lattice_beam:g}{active}",
        f"{row['ours']:,.0f}", theirs[0], theirs[1], f"{row['two_threads']:.2f}", f"{arcs:.1f}", theirs[2], differ,
    ])  # fmt: skip


def compare(
    fst: kaldifst.StdVectorFst, scores: Sequence[np.ndarray], options: LatticeOptions, lattices: Sequence[Lattice]
) -> dict[str, Any]:
    """kaldi-decoder's speed, and its lattices beside ours."""
    decoder = wheel_decoder(fst, options.beam, options.lattice_beam)

    def decode(rows: Sequence[np.ndarray]) -> float:
        start = time.process_time()
        for row in rows:
            decoder.decode(kaldi_decoder.DecodableCtc(row))
            decoder.get_raw_lattice(True)
        return time.process_time() - start

    decode(scores[:1])
    seconds, frames = min(decode(scores) for _ in range(ROUNDS)), sum(map(len, scores))
    apart, arcs = [], 0
    for row, lattice in zip(scores, lattices, strict=True):
        theirs: Transducer | None = wheel_lattice(decoder, row)
        assert theirs is not None
        apart.append(sums(as_transducer(lattice, row))[1] - sums(theirs)[1])
        arcs += len(numbered(epsilons_before(theirs)).arcs)
    return {"wheel": frames / seconds, "wheel_arcs_a_frame": arcs / frames, "log_z": (min(apart), max(apart))}


if __name__ == "__main__":
    main()
