"""A lexicon of few words with all that is hard about lexicons, and tyings for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from quadric.speech.graph import decoding_graph, to_labelled
from quadric.speech.language_model import NGram
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import STATES, Tying, monophone

LEXICON = Lexicon(
    (
        ("AB", ("a", "b")),
        ("A", ("a",)),  # the beginning of AB
        ("B", ("b",)),  # AB sounds like A B
        ("BE", ("b",)),  # a homophone of B
        ("AB", ("b", "a")),  # a variant
        ("ABBA", ("a", "b", "b", "a")),
        ("ABBAH", ("a", "b", "b", "a")),  # a homophone that begins nothing
    )
)


def triphone(phones: tuple[str, ...], seed: int = 0) -> Tying:
    """Every state of every phone but silence splits its contexts at random in up to three."""
    rng = np.random.default_rng(seed)
    named = ("SIL", *phones)
    count = len(named)
    table = np.empty((count, count, count, STATES), np.int32)
    first = 0
    for phone, state in product(range(count), range(STATES)):
        drawn = rng.integers(3 if phone else 1, size=(count, count))
        table[phone, :, :, state] = first + np.unique(drawn, return_inverse=True)[1].reshape(count, count)
        first = int(table[phone, :, :, state].max()) + 1
    return Tying(named, 3, table)


TYINGS = {"mono": monophone(LEXICON.phones), "tri": triphone(LEXICON.phones)}


def toy_graphs(folder: Path, context: str, order: int, text: Sequence[Sequence[str]]):  # type: ignore[no-untyped-def]
    """The decoding graph with an n-gram of ``text``: as a transducer, and without its epsilons."""
    NGram.estimate(text, LEXICON.words, order).write_arpa(folder / "lm.arpa")
    fst = decoding_graph(LEXICON, folder / "lm.arpa", TYINGS[context], silence_probability=0.3, self_loop=0.6)
    return fst, to_labelled(fst, TYINGS[context])
