"""A trained system in its folder, whatever its network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quadric.speech.features import Fbank
from quadric.speech.graph import AlignmentGraphs, write_graph
from quadric.speech.lexicon import Lexicon
from quadric.speech.normalisation import Normalisation
from quadric.speech.topology import monophone
from quadric.train.recipe import Decoding, Network
from quadric.train.system import Front, System

NETWORKS = [
    Network("dnn", (6, 5), context=2),
    Network("tdnn", (6, 5), offsets=((-1, 0, 2), (0, 1)), norm="none"),
    Network("rnn", (6, 5), feed_forward=(4,), window=(3, 2), activation="sigmoid"),
    Network("lstm", (6,), window=(2, 1), dropout=0.1),
]


@pytest.mark.speech
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.kind)
def test_a_system_is_the_same_after_save_and_load(network: Network, tmp_path: Path) -> None:
    lexicon = Lexicon((("one", ("w", "ah", "n")), ("two", ("t", "uw"))))
    tying = monophone(lexicon.phones)
    write_graph(AlignmentGraphs(lexicon, tying).graph(["one", "two"]), tmp_path / "graph.fst")
    first = System(
        front=Front(Fbank(), Normalisation()),
        inputs=3,
        network=network,
        model=network.build(3, tying.num_pdfs),
        log_prior=np.full(tying.num_pdfs, -np.log(tying.num_pdfs), np.float32),
        tying=tying,
        lexicon=lexicon,
        graph=tmp_path / "graph.fst",
        decoding=Decoding(),
    )
    first.save(tmp_path / "system")
    second = System.load(tmp_path / "system")
    assert second.network == network
    assert type(second.model) is type(first.model)
    features = {f"u{T}": np.random.default_rng(T).normal(size=(T, 3)).astype(np.float32) for T in (1, 3, 40)}
    a, b = first.likelihoods(features), second.likelihoods(features)
    for id, x in features.items():
        assert a[id].shape == (len(x), tying.num_pdfs) and np.isfinite(a[id]).all()
        np.testing.assert_array_equal(a[id], b[id])
