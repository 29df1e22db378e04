"""The choice of decoding weights, against decoding anew at every pair of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("kaldi_decoder", reason="needs the speech extra")

from quadric.model.acoustic import AcousticModel
from quadric.progress import silent
from quadric.speech import scoring
from quadric.speech.corpus import Corpus, Utterance
from quadric.speech.decoding import DecodeOptions, Decoder
from quadric.speech.features import Fbank
from quadric.speech.graph import decoding_graph, write_graph
from quadric.speech.language_model import NGram
from quadric.speech.normalisation import Normalisation
from quadric.speech.scoring import Errors
from quadric.speech.topology import monophone
from quadric.train.recipe import Decoding, Network
from quadric.train.system import Front, System
from quadric.train.weights import choose_weights
from reference.spoken import noisy, spoken
from reference.toy_language import LEXICON

pytestmark = pytest.mark.speech

TYING = monophone(LEXICON.phones)
BEAM = 60.0


@dataclass(frozen=True)
class Heard:
    """Sentences, their noisy scores, and a system whose network hands these on."""

    corpus: Corpus
    features: Mapping[str, np.ndarray]
    system: System

    def errors(self, lm_weight: float, word_penalty: float) -> Errors:
        """By decoding."""
        options = DecodeOptions(BEAM, 4000)
        with Decoder(self.system.graph, LEXICON.words, TYING.num_pdfs, options=options, jobs=1) as decoder:
            found = self.system.tuned(lm_weight, word_penalty).recognise(decoder, self.scores, progress=silent)
        said = {u.id: u.words for u in self.corpus}
        return scoring.score(said, {id: hypothesis.words for id, hypothesis in found.items()}).total

    @property
    def scores(self) -> Mapping[str, np.ndarray]:
        return self.system.likelihoods(self.features)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("heard")
    text = {f"u{i:02}": tuple(rng.choice(LEXICON.words, size=2 + i % 4).tolist()) for i in range(23)}
    NGram.estimate(text.values(), LEXICON.words, 2).write_arpa(folder / "lm.arpa")
    write_graph(decoding_graph(LEXICON, folder / "lm.arpa", TYING), folder / "graph.fst")
    features = {id: 0.6 * noisy(spoken(words, LEXICON, TYING, rng), TYING.num_pdfs, rng) for id, words in text.items()}
    model = AcousticModel(TYING.num_pdfs, TYING.num_pdfs, (), TYING.num_pdfs, (0, 0))
    with torch.no_grad():
        model.output.weight.copy_(torch.eye(TYING.num_pdfs))
    system = System(
        front=Front(Fbank(), Normalisation()),
        inputs=TYING.num_pdfs,
        network=Network(),
        model=model,
        log_prior=np.zeros(TYING.num_pdfs, np.float32),
        tying=TYING,
        lexicon=LEXICON,
        graph=folder / "graph.fst",
        decoding=Decoding(BEAM, 4000, lm_weights=(0.7, 1.0, 1.4), word_penalties=(-0.5, 0.0, 0.5)),
    )
    return Heard(Corpus("dev", tuple(Utterance(id, "s", words) for id, words in text.items())), features, system)


@pytest.mark.parametrize("lm_weights", [(0.7, 1.0, 1.4), (12.0, 16.0)], ids=["near", "lattices made again"])
def test_errors_are_those_of_decoding(heard: Heard, lm_weights: tuple[float, ...]) -> None:
    system = replace(heard.system, decoding=replace(heard.system.decoding, lm_weights=lm_weights))
    chosen = choose_weights(system, heard.corpus, heard.features, autocast=False, jobs=2, progress=silent)
    best = chosen.tried[chosen.lm_weight, chosen.word_penalty]
    assert best.errors == min(errors.errors for errors in chosen.tried.values())
    near = [
        (weight, penalty)
        for weight, penalty in chosen.tried
        if 0.7 < weight / chosen.lm_weight < 1.45 and abs(penalty - chosen.word_penalty) <= 0.5
    ]
    assert len(near) >= 3
    for pair in near:
        assert chosen.tried[pair] == heard.errors(*pair)
    assert len({errors.errors for errors in chosen.tried.values()}) > 1, "a test that tells no pair from another"


def test_utterances_without_a_path_count_as_deleted(heard: Heard) -> None:
    short = heard.corpus.utterances[3]
    features = {**heard.features, short.id: heard.features[short.id][:1]}
    chosen = [
        choose_weights(heard.system, heard.corpus, given, autocast=False, jobs=1, progress=silent)
        for given in (heard.features, features)
    ]
    both = chosen[0].tried.keys() & chosen[1].tried.keys()
    assert both
    words = sum(len(u.words) for u in heard.corpus)
    for pair in both:
        first, second = (each.tried[pair] for each in chosen)
        assert first.words == second.words == words
        assert len(short.words) >= second.deletions - first.deletions > 0


def test_a_part_of_dev_is_spread_over_it(heard: Heard) -> None:
    decoding = replace(heard.system.decoding, sweep_utterances=12)
    system = replace(heard.system, decoding=decoding)
    spaced = Corpus("dev", heard.corpus.utterances[::2])
    a, b = (
        choose_weights(of, corpus, heard.features, autocast=False, jobs=1, progress=silent)
        for of, corpus in ((system, heard.corpus), (heard.system, spaced))
    )
    assert a == b
    assert {errors.words for errors in a.tried.values()} == {sum(len(u.words) for u in spaced)}
