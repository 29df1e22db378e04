"""The first part of a job: what is said, how it sounds, which words there are and how they follow each other."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from quadric.progress import Progress
from quadric.speech.alignment import min_frames
from quadric.speech.corpus import Corpus, perturb_speed
from quadric.speech.feature_store import DamagedFeatures
from quadric.speech.features import extract
from quadric.speech.language_model import NGram
from quadric.speech.lexicon import RESERVED_WORDS, Lexicon, read_lexicon
from quadric.speech.normalisation import add_deltas, normalise
from quadric.speech.synthesis import DIGIT_LEXICON
from quadric.speech.tables import few
from quadric.speech.topology import STATES
from quadric.train.left_out import LeftOut, bad_audio, listed, unknown_words, unread
from quadric.train.recipe import Job
from quadric.train.sources import SPLITS, Material, Source, Split
from quadric.train.stages import Stages, digest, reading
from quadric.train.system import Front

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What every later stage builds on.

    Attributes:
        corpora: by split; the training set without its copies at other speeds.
        perturbed: the training set with its copies.
        features: by split, normalised; the training set's with its copies.
        front: how the features were made.
        lexicon: the words.
        arpa: the language model.
        perplexity: of the language model on each split's words, where it was estimated here.
        left_out: by split, the utterances that are not among all these, and why.
    """

    corpora: Mapping[Split, Corpus]
    perturbed: Corpus
    features: Mapping[Split, Mapping[str, np.ndarray]]
    front: Front
    lexicon: Lexicon
    arpa: Path
    perplexity: Mapping[Split, float]
    left_out: Mapping[Split, Mapping[str, LeftOut]] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Names all that training depends on: what is said, how it sounds and which words there are."""
        return digest(self._said_and_heard("train"), self._said_and_heard("dev"), self.lexicon)

    @cached_property
    def test_key(self) -> str:
        """Names the test set."""
        return digest(self._said_and_heard("test"))

    def _said_and_heard(self, split: Split) -> object:
        """Without the places of the files, which may move."""
        return [(u.id, u.speaker, u.words) for u in self.corpora[split]], dict(self.features[split])

    @property
    def dimension(self) -> int:
        """Features per frame."""
        return next(iter(self.features["dev"].values())).shape[1]


def prepare(job: Job, stages: Stages, progress: Progress) -> Prepared:
    """Reads the sets, computes features, checks the words, estimates the language model."""
    cache = stages.work / "cache"
    sources = {"train": job.train, "dev": job.dev, "test": job.test}
    materials = {split: _load(sources[split], split, cache, job.jobs, progress) for split in SPLITS}
    lexicon = Lexicon(DIGIT_LEXICON)
    if job.lexicon is not None:
        lexicon = read_lexicon(job.lexicon, strip_stress=job.strip_stress)
    for split, material in materials.items():
        _refuse_impossible_words(split, material.corpus)
    least = STATES * (1 + len(lexicon.phones))
    if job.tree is not None and job.tree.leaves < least:
        raise ValueError(
            f"tree.leaves={job.tree.leaves}: {len(lexicon.phones)} phones and silence with {STATES} states each need "
            f"at least {least}, and more to be tied by their context"
        )
    unknown = {split: _unknown(material.corpus, lexicon, job, split) for split, material in materials.items()}
    materials = {split: _without(material, unknown[split]) for split, material in materials.items()}
    if any(material.features is not None for material in materials.values()) and job.speeds != (1.0,):
        raise ValueError(f"speeds={job.speeds}: ready-made features have one speed; set speeds=[1.0]")
    perturbed = perturb_speed(materials["train"].corpus, job.speeds) if job.speeds != (1.0,) else None
    front = Front(job.fbank, job.normalisation, job.deltas)
    features = {
        split: make_features(
            Material(perturbed, None) if split == "train" and perturbed else material,
            front,
            cache,
            job.jobs,
            progress,
            on_bad_audio=job.on_bad_audio,
        )
        for split, material in materials.items()
    }
    left_out = {
        split: unread(material.corpus) | unknown[split] | features[split].left_out
        for split, material in materials.items()
    }
    corpora = {split: _with_features(material.corpus, features[split]) for split, material in materials.items()}
    for split in ("train", "dev"):
        _refuse_all_too_short(split, corpora[split], features[split], lexicon)
    _warn_of_overlaps(corpora)
    arpa, perplexity = _language_model(job, stages, corpora, lexicon)
    for split, corpus in corpora.items():
        frames = sum(len(features[split][utterance.id]) for utterance in corpus)
        logger.info(
            "%s: %d utterances of %d speakers, %.2f hours, %d words, language-model perplexity %.1f",
            split, len(corpus), len(corpus.speakers), frames * job.fbank.frame_shift_ms / 3_600_000,
            sum(corpus.word_counts().values()), perplexity[split],
        )  # fmt: skip
    return Prepared(corpora, perturbed or corpora["train"], features, front, lexicon, arpa, perplexity, left_out)


def _warn_of_overlaps(corpora: Mapping[Split, Corpus]) -> None:
    for split in ("dev", "test"):
        if shared := corpora[split].by_id.keys() & corpora["train"].by_id.keys():
            logger.warning(
                "%s: %d of its %d utterances are in the training set as well, %s for one: its errors say little",
                split, len(shared), len(corpora[split]), min(shared),
            )  # fmt: skip


def _load(source: Source, split: Split, cache: Path, jobs: int, progress: Progress) -> Material:
    """The set; what a message says about an argument of its reader is said about the source's option as well."""
    try:
        return source.load(cache, jobs=jobs, progress=progress)
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it names the file itself
        named = dict(re.findall(r"""pass (\w+)=["']?(\w+)""", str(error)))
        given = [
            f"{split}.{name}={value.lower() if value in ('True', 'False') else value}"
            for name, value in named.items()
            if hasattr(source, name)
        ]
        raise type(error)(f"{split}: {error}{f' (that is {given[-1]})' if given else ''}") from error


class Features(dict[str, np.ndarray]):
    """Utterance id -> normalised features, in memory.

    Attributes:
        left_out: utterances without features, and why.
    """

    def __init__(self, features: Mapping[str, np.ndarray], left_out: Mapping[str, LeftOut]) -> None:
        super().__init__(features)
        self.left_out = dict(left_out)


def make_features(
    material: Material,
    front: Front,
    cache: Path,
    jobs: int,
    progress: Progress,
    *,
    on_bad_audio: Literal["error", "drop"] = "error",
) -> Features:
    """Normalised features of every utterance; from audio, or from the features that came with it.

    If ``on_bad_audio`` drops audio that cannot be used, it does so with features that cannot be read.
    """
    corpus, given = material
    if given is None:
        made = extract(corpus, front.fbank, cache / "features", jobs=jobs, on_bad_audio=on_bad_audio, progress=progress)
        left_out = {id: bad_audio(reason) for id, reason in made.left_out.items()}
        try:
            return Features(_normalised(corpus.subset(made), made, front, progress), left_out)
        except DamagedFeatures as error:
            with reading(error.folder, "command"):
                raise
    left_out = {}
    if on_bad_audio == "drop":
        given, left_out = _readable(corpus, given)
        corpus = corpus.subset(given)
    return Features(_normalised(corpus, given, front, progress), left_out)


def _readable(corpus: Corpus, features: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, LeftOut]]:
    """In memory, those of ``features`` that can be read and hold numbers; what is wrong with the others."""
    readable, bad = dict[str, np.ndarray](), dict[str, str]()
    for id in corpus.by_id:
        try:
            found = features[id]
        except DamagedFeatures as error:
            bad[id] = str(error)
        except KeyError:
            bad[id] = f"there are no features of {id}"
        else:
            if len(found) and np.isfinite(found).all():
                readable[id] = found
            else:
                bad[id] = f"the features of {id} have no frames, or values that are not finite"
    left_out = {id: LeftOut("features that cannot be used", why) for id, why in bad.items()}
    if not readable:
        raise ValueError(f"no features of {corpus.name} can be used: {listed(left_out)}: extract them again")
    if bad:
        logger.warning("%s: left out for features that cannot be used: %s", corpus.name, listed(left_out))
    return readable, left_out


def _normalised(
    corpus: Corpus, features: Mapping[str, np.ndarray], front: Front, progress: Progress
) -> dict[str, np.ndarray]:
    if front.deltas:
        features = add_deltas(features, front.deltas)
    normalised = normalise(features, corpus, front.normalisation)
    return {id: normalised[id] for id in progress(list(normalised), total=len(normalised), what="reading features")}


def _refuse_impossible_words(split: Split, corpus: Corpus) -> None:
    """Raises ``ValueError`` for words that are something else in graphs, or in the files of results."""
    impossible = {word for word in corpus.word_counts() if word in RESERVED_WORDS or _PARTED.search(word)}
    if impossible:
        held = [f"{u.id}: {word!r}" for u in corpus for word in u.words if word in impossible]
        raise ValueError(
            f"{split}: words that are reserved, or hold white space: {few(held)}: remove or rename them in the text"
        )


_PARTED = re.compile(r"[\s]", re.ASCII)


def _unknown(corpus: Corpus, lexicon: Lexicon, job: Job, split: Split) -> dict[str, LeftOut]:
    """The utterances with words that are not in the lexicon; none of the test set, whose unknown words are errors."""
    unknown = lexicon.unknown_words(corpus.word_counts())
    if not unknown:
        return {}
    if split == "test":
        logger.warning("test: %d words are not in the lexicon and cannot be recognised: %s", len(unknown), unknown)
        return {}
    if job.unknown_words == "error":
        try:
            lexicon.check(corpus.word_counts())
        except ValueError as error:
            raise ValueError(f"{split}: {error} (unknown_words=drop)") from None
    left_out = {u.id: unknown_words(lacking) for u in corpus if (lacking := unknown.keys() & set(u.words))}
    if len(left_out) == len(corpus):
        raise ValueError(
            f"{split}: unknown_words=drop leaves out all {len(corpus)} utterances: the lexicon lacks "
            f"{few(list(unknown))}: is it the lexicon of this corpus?"
        )
    logger.warning(
        "%s: left out %d of %d utterances for %d words that are not in the lexicon: %s",
        split, len(left_out), len(corpus), len(unknown), unknown,
    )  # fmt: skip
    return left_out


def _without(material: Material, left_out: Mapping[str, LeftOut]) -> Material:
    return material._replace(corpus=material.corpus.subset(u.id for u in material.corpus if u.id not in left_out))


def _refuse_all_too_short(split: Split, corpus: Corpus, features: Mapping[str, np.ndarray], lexicon: Lexicon) -> None:
    least = {utterance.id: min_frames(utterance.words, lexicon) for utterance in corpus}
    if all(len(features[id]) < frames for id, frames in least.items()):
        short = few([f"{id}: {len(features[id])} frames, at least {frames}" for id, frames in least.items()])
        raise ValueError(
            f"{split}: no utterance is long enough for its words: {short}: is this the audio of these transcripts?"
        )


def _with_features(corpus: Corpus, features: Mapping[str, np.ndarray]) -> Corpus:
    return corpus.subset(utterance.id for utterance in corpus if utterance.id in features)


def _language_model(
    job: Job, stages: Stages, corpora: Mapping[Split, Corpus], lexicon: Lexicon
) -> tuple[Path, dict[Split, float]]:
    """The ARPA file to decode with, and its perplexity on each split."""
    sentences = {split: [utterance.words for utterance in corpus] for split, corpus in corpora.items()}
    if job.arpa is not None:
        model = NGram.read_arpa(job.arpa)
        arpa = job.arpa
    else:
        estimated = NGram.estimate(sentences["train"], lexicon.words, job.lm_order)
        folder = stages.make(
            "lm", job.lm_order, sentences["train"], lexicon, by=lambda folder: estimated.write_arpa(folder / "lm.arpa")
        )
        arpa = folder / "lm.arpa"
        with reading(folder):
            model = NGram.read_arpa(arpa)
    known = set(model.vocabulary) & set(lexicon.words)
    perplexity = {}
    for split, said in sentences.items():
        covered = [sentence for sentence in said if known.issuperset(sentence)]
        if len(covered) < len(said):
            logger.warning(
                "%s: %d of %d sentences hold words that lexicon or language model lack; perplexity without them",
                split, len(said) - len(covered), len(said),
            )  # fmt: skip
        perplexity[split] = model.perplexity(covered) if covered else math.nan
    return arpa, perplexity
