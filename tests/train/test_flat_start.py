"""The flat start's schedule: which prior and which scales each of its parts is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from quadric.data.batch import pad_context
from quadric.loss.full_sum import FullSum
from quadric.model.acoustic import log_priors
from quadric.progress import silent
from quadric.recipes import digits
from quadric.speech.alignment import align, load_alignments, save_alignments
from quadric.speech.corpus import Corpus, Utterance
from quadric.speech.ctm import Token, phone_tokens, targets_from_words, word_segments, word_tokens, write_ctm
from quadric.speech.features import Fbank
from quadric.speech.lexicon import Lexicon
from quadric.speech.normalisation import Normalisation
from quadric.speech.topology import STATES, monophone
from quadric.train import checkpoint, flat_start
from quadric.train.overrides import override
from quadric.train.prepare import Prepared
from quadric.train.recipe import Job, Network
from quadric.train.stages import Stages
from quadric.train.system import Front
from reference.tiny_job import TINY

pytestmark = pytest.mark.speech

LEXICON = Lexicon((("A", ("X", "Y")), ("B", ("Y",))))
TYING = monophone(LEXICON.phones)
OPTIONS = tuple(
    f"flat_start.{option}"
    for option in ("gaussian.cepstra=none", "warm=1", "rounds=3", "scale=[0.5,0.9]", "prior_scale=0.6")
)


def spoken(name: str, count: int, seed: int) -> tuple[Corpus, dict[str, np.ndarray]]:
    """Words between silences, two to four frames a state, which is written in the features under much noise."""
    rng = np.random.default_rng(seed)
    utterances, features = [], {}
    for i in range(count):
        words = tuple(str(word) for word in rng.choice(["A", "B"], size=rng.integers(1, 4)))
        phones = [0, *(TYING.phones.index(p) for word in words for p in LEXICON.pronunciations(word)[0]), 0]
        states = np.array([STATES * phone + s for phone in phones for s in range(STATES)])
        states = np.repeat(states, rng.integers(2, 5, size=len(states)))
        noise = rng.normal(size=(len(states), TYING.num_pdfs))
        heard = 2 * np.eye(TYING.num_pdfs)[states] + (states[:, None] >= STATES) + noise
        features[f"{name}{i}"] = heard.astype(np.float32)
        utterances.append(Utterance(f"{name}{i}", "s", words))
    return Corpus(name, tuple(utterances)), features


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    train, dev = spoken("train", 30, seed=0), spoken("dev", 3, seed=1)
    return Prepared(
        corpora={"train": train[0], "dev": dev[0]},
        perturbed=train[0],
        features={"train": train[1], "dev": dev[1]},
        front=Front(Fbank(), Normalisation()),
        lexicon=LEXICON,
        arpa=Path(),
        perplexity={},
    )


def log_posteriors(job: Job, parameters: Path, features: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    model = job.flat_start.network.build(TYING.num_pdfs, TYING.num_pdfs).eval()
    model.load_state_dict(checkpoint.load(parameters)["model"])
    windows = {id: pad_context(x, model.left_context, model.right_context) for id, x in features.items()}
    with torch.no_grad():
        return {id: torch.log_softmax(model(torch.from_numpy(x)[None])[0], -1) for id, x in windows.items()}


def test_priors_and_scales(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round has the prior of the network before it; the alignment that of the last, as strong as in training."""
    given: list[FullSum] = []

    class Kept(FullSum):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            given.append(self)

    monkeypatch.setattr(flat_start, "FullSum", Kept)
    job = override(digits(48), [*TINY, *OPTIONS])
    found = flat_start.flat_start(job, prepared, Stages(tmp_path), silent)

    (first,) = (load_alignments(path) for path in tmp_path.glob("bootstrap-*/train.ark"))
    counts = np.bincount(np.concatenate(list(first.values())), minlength=TYING.num_pdfs)
    priors = [log_priors(torch.from_numpy(counts))]
    (work,) = tmp_path.glob("flat-start-*")
    for round in (1, 2, 3):
        seen = log_posteriors(job, work / f"round-{round}" / "model.pt", prepared.features["train"])
        priors.append(log_priors(torch.cat(list(seen.values())).exp().mean(0), floor=1e-4).double())
    assert [loss.scale for loss in given] == pytest.approx([0.5, 0.7, 0.9])
    assert [loss.prior_scale for loss in given] == [0.6] * 3
    for loss, prior in zip(given, priors, strict=False):
        torch.testing.assert_close(loss.log_prior, prior.float(), rtol=1e-4, atol=1e-4)
    assert all(not torch.allclose(a, b, atol=0.01) for a, b in pairwise(priors))

    transcripts = {u.id: u.words for u in prepared.corpora["train"]}

    def off(log_prior: torch.Tensor) -> float:
        """The share of frames that the alignment with this prior puts elsewhere."""
        scores = ((id, (seen[id] - 0.6 * log_prior).numpy()) for id in transcripts)
        expected = align(transcripts, scores, LEXICON, TYING).pdfs
        return float(np.mean(np.concatenate([found.train[id] != expected[id] for id in transcripts])))

    assert off(priors[-1]) < 0.002  # rounding may tip a frame; measured: none
    assert min(off(priors[-2]), off(0 * priors[-1])) > 0.005  # measured: 0.02 and 0.09


# ------------------------------------------------------------------------------------------------ made elsewhere


def times(prepared: Prepared, shift: float, what: str = "words") -> dict[str, tuple[Token, ...]]:
    """Of every training utterance, its words or phones one after another, between six frames of silence."""
    tokens = {}
    for utterance in prepared.corpora["train"]:
        said = list(utterance.words)
        if what == "phones":
            said = [phone for word in said for phone in LEXICON.pronunciations(word)[0]]
        edges = np.linspace(6, len(prepared.features["train"][utterance.id]) - 6, len(said) + 1).round() * shift
        tokens[utterance.id] = tuple(map(Token, said, edges[:-1].tolist(), edges[1:].tolist()))
    return tokens


@pytest.mark.parametrize("what", ["words", "phones"])
def test_times_are_counted_in_the_features_own_frames(prepared: Prepared, tmp_path: Path, what: str) -> None:
    slow = replace(prepared, front=Front(Fbank(frame_shift_ms=12.5), Normalisation()))
    given = times(slow, 0.0125, what)
    write_ctm(tmp_path / "given.ctm", given)
    job = override(digits(48), [*TINY, *OPTIONS, "flat_start.rounds=0", f"alignments={tmp_path / 'given.ctm'}"])
    found = flat_start.flat_start(job, slow, Stages(tmp_path), silent).train
    for utterance in slow.corpora["train"]:
        row, tokens = found[utterance.id], given[utterance.id]
        assert word_segments(utterance.words, row, LEXICON, TYING)[-1].end == len(row) - 6
        if what == "phones":
            heard = [token for token in phone_tokens(row, TYING, 0.0125) if token.label != "SIL"]
        else:
            heard = list(word_tokens(word_segments(utterance.words, row, LEXICON, TYING), 0.0125))
        assert [token.label for token in heard] == [token.label for token in tokens]
        assert [token.start for token in heard] == pytest.approx([token.start for token in tokens])


@pytest.mark.parametrize("fault", ["permuted", "zeros", "another order of phones", "one of them", None])
def test_pdfs_that_do_not_say_the_words_are_refused(prepared: Prepared, tmp_path: Path, fault: str | None) -> None:
    said = times(prepared, 0.01)
    good = {id: targets_from_words(t, len(prepared.features["train"][id]), LEXICON, TYING) for id, t in said.items()}
    orders = {
        "permuted": np.random.default_rng(0).permutation(TYING.num_pdfs),
        "zeros": np.zeros(TYING.num_pdfs, np.int64),
        "another order of phones": np.array([0, 1, 2, 6, 7, 8, 3, 4, 5]),
    }
    rows = dict(good)
    if fault in orders:
        rows = {id: orders[fault][row].astype(np.int32) for id, row in good.items()}
    elif fault:
        rows["train7"] = np.zeros_like(good["train7"])
    archive = tmp_path / "ali.ark"
    save_alignments(archive, rows)
    job = override(digits(48), [*TINY, *OPTIONS, "flat_start.rounds=0", f"alignments={archive}"])
    if fault is None:
        found = flat_start.flat_start(job, prepared, Stages(tmp_path), silent).train
        assert all(np.array_equal(found[id], row) for id, row in good.items())
        return
    with pytest.raises(ValueError, match=r"or give a CTM file of phones or of words$") as refused:
        flat_start.flat_start(job, prepared, Stages(tmp_path), silent)
    message = str(refused.value)
    assert message.startswith(f"alignments={archive}: of 30 utterances, those whose pdfs do not say their words are ")
    assert "state s of phone p is 3 p + s" in message
    if fault == "one of them":
        assert "are 1 (train7); of the first, the alignment says SIL, which is no pronunciation of " in message


def test_a_set_of_which_nothing_can_be_aligned_is_named(prepared: Prepared) -> None:
    job, model = override(digits(48), TINY), Network("dnn", (8,), context=0).build(TYING.num_pdfs, TYING.num_pdfs)
    short = {id: features[:2] for id, features in prepared.features["dev"].items()}
    changed = replace(prepared, features={**prepared.features, "dev": short})
    log_prior = np.zeros(TYING.num_pdfs, np.float32)
    problem = r"^dev: no utterance could be aligned with its words: 3 \(dev0: 2 frames, at least \d+, .*do they belong"
    with pytest.raises(ValueError, match=problem):
        flat_start.viterbi(job, changed, TYING, model, log_prior, silent)
    torch.nn.init.constant_(model.output.bias, float("nan"))
    with pytest.raises(
        ValueError, match=r"^train: no utterance could .*: 30 \(train0: the log likelihoods are not finite"
    ):
        flat_start.viterbi(job, prepared, TYING, model, log_prior, silent)
