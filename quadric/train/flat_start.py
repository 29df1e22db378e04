"""The second part of a job: which state sounds when, from transcripts alone.

Gaussian mixtures give first alignments. A small network learns them and is then trained by the full sum over all
alignments, with a state prior and a rising scale, so that no boundary is decided before the network can see it. A
Viterbi alignment by that network is the result.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int32

from quadric.data.stream import FrameStream
from quadric.loss.full_sum import FullSum, FullSumTarget
from quadric.loss.loss import CrossEntropy, Loss
from quadric.model.acoustic import AcousticModel, log_priors
from quadric.optim.sampling import FixedSizes
from quadric.progress import Progress
from quadric.speech.alignment import Alignments, ForcedAlignment, align, fit_lengths, load_alignments, save_alignments
from quadric.speech.corpus import Corpus
from quadric.speech.ctm import read_ctm, targets_from_phones, targets_from_words, word_segments
from quadric.speech.gaussian import bootstrap
from quadric.speech.graph import AlignmentGraphs
from quadric.speech.lexicon import SILENCE
from quadric.speech.tables import few
from quadric.speech.topology import STATES, Tying, monophone
from quadric.train import checkpoint
from quadric.train.plan import Plan
from quadric.train.prepare import Prepared
from quadric.train.recipe import Job
from quadric.train.sources import Split
from quadric.train.stages import Stages, digest, reading
from quadric.train.system import Likelihoods
from quadric.train.trainer import Trainer

logger = logging.getLogger(__name__)

Targets = Mapping[str, Int32[np.ndarray, " T"]]

_PRIOR_FRAMES = 50_000


@dataclass(frozen=True)
class Aligned:
    """Monophone-state alignments.

    Attributes:
        tying: what the pdfs are.
        train: of the training set, with its copies at other speeds.
        dev: of the development set.
    """

    tying: Tying
    train: Targets
    dev: Targets

    def save(self, folder: Path) -> None:
        """Writes both sets to ``folder``."""
        save_alignments(folder / "train.ark", self.train)
        save_alignments(folder / "dev.ark", self.dev)

    @classmethod
    def load(cls, tying: Tying, folder: Path) -> Aligned:
        """Reads what `save` wrote."""
        with reading(folder):
            return cls(tying, load_alignments(folder / "train.ark"), load_alignments(folder / "dev.ark"))


def flat_start(job: Job, prepared: Prepared, stages: Stages, progress: Progress) -> Aligned:
    """Alignments of the training and development sets. Utterances that cannot be aligned are left out, and named."""
    tying = monophone(prepared.lexicon.phones)
    given = None if job.alignments is None else _content(job.alignments)
    key = (prepared.key, job.flat_start, given, job.chunk, job.autocast, job.seed)

    def make(folder: Path) -> None:
        first = _first_alignments(job, prepared, tying, stages, progress)
        work = stages.folder("flat-start", *key)
        model, log_prior = _train(job, prepared, tying, first, work, progress)
        pdfs = viterbi(job, prepared, tying, model, job.flat_start.prior_scale * log_prior, progress)
        if job.alignments is not None:
            pdfs["train"].update(first)
        Aligned(tying, pdfs["train"], pdfs["dev"]).save(folder)

    folder = stages.make("alignment", *key, by=make)
    return Aligned.load(tying, folder)


def viterbi(
    job: Job,
    prepared: Prepared,
    tying: Tying,
    model: AcousticModel,
    log_prior: Float[np.ndarray, " C"],
    progress: Progress,
) -> dict[Split, dict[str, Int32[np.ndarray, " T"]]]:
    """The pdfs of every frame of the training and development sets, by the network; what cannot be aligned is named."""
    found: dict[Split, dict[str, Int32[np.ndarray, " T"]]] = {}
    sets: dict[Split, Corpus] = {"train": prepared.perturbed, "dev": prepared.corpora["dev"]}
    for split, corpus in sets.items():
        features = prepared.features[split]
        transcripts = {utterance.id: utterance.words for utterance in corpus if utterance.id in features}
        scores = Likelihoods(model, features, log_prior, autocast=job.autocast)
        aligned = align(
            transcripts,
            ((id, scores[id]) for id in transcripts),
            prepared.lexicon,
            tying,
            options=ForcedAlignment(on_too_short="drop"),
            jobs=job.jobs,
            progress=progress,
        )
        _refuse_all_left_out(split, aligned)
        found[split] = aligned.pdfs
    return found


def _refuse_all_left_out(split: Split, aligned: Alignments) -> None:
    if not aligned.pdfs:
        reasons = {id: f"{frames} frames, at least {least}" for id, frames, least in aligned.too_short} | aligned.failed
        listed = few([f"{id}: {reason}" for id, reason in reasons.items()])
        raise ValueError(f"{split}: no utterance could be aligned with its words: {listed}: do they belong together?")


def _first_alignments(
    job: Job, prepared: Prepared, tying: Tying, stages: Stages, progress: Progress
) -> dict[str, Int32[np.ndarray, " T"]]:
    """The alignments given, or the Gaussian bootstrap's, of the training set at its own speed."""
    corpus, features = prepared.corpora["train"], prepared.features["train"]
    if job.alignments is not None:
        return _imported(job.alignments, prepared, tying)
    transcripts = {utterance.id: utterance.words for utterance in corpus}

    def make(folder: Path) -> None:
        found = bootstrap(
            features,
            transcripts,
            prepared.lexicon,
            tying,
            options=job.flat_start.gaussian,
            alignment=ForcedAlignment(on_too_short="drop"),
            jobs=job.jobs,
            progress=progress,
        )
        _refuse_all_left_out("train", found)
        save_alignments(folder / "train.ark", found.pdfs)

    key = digest({id: features[id] for id in transcripts})
    folder = stages.make("bootstrap", key, transcripts, prepared.lexicon, job.flat_start.gaussian, by=make)
    with reading(folder):
        return load_alignments(folder / "train.ark")


def _imported(path: Path, prepared: Prepared, tying: Tying) -> dict[str, Int32[np.ndarray, " T"]]:
    """Alignments made elsewhere: an archive of pdfs per frame, or a CTM file of phones or of words."""
    features = prepared.features["train"]
    if path.suffix != ".ctm":
        known = {id: row for id, row in load_alignments(path).items() if id in features}
        _refuse_none(known, path)
        lengths = {id: len(features[id]) for id in known}
        fitting = fit_lengths(known, lengths, num_pdfs=tying.num_pdfs, tolerance=2)
        _check_paths(fitting, path, prepared, tying)
        return fitting
    tokens = {id: times for id, times in read_ctm(path).items() if id in features}
    _refuse_none(tokens, path)
    words = {token.label for times in tokens.values() for token in times} <= set(prepared.lexicon.words)
    shift = prepared.front.fbank.frame_shift_ms / 1000
    return {
        id: targets_from_words(times, len(features[id]), prepared.lexicon, tying, frame_shift=shift)
        if words
        else targets_from_phones(times, len(features[id]), tying, frame_shift=shift)
        for id, times in tokens.items()
    }


def _check_paths(pdfs: Targets, path: Path, prepared: Prepared, tying: Tying) -> None:
    """Raises ``ValueError`` naming the utterances whose pdfs do not say their words."""
    corpus = prepared.perturbed.by_id
    wrong: dict[str, str] = {}
    for id, row in pdfs.items():
        try:
            word_segments(corpus[id].words, row, prepared.lexicon, tying)
        except ValueError as error:
            wrong[id] = str(error)
    if wrong:
        first = textwrap.shorten(next(iter(wrong.values())), 200, placeholder=" ...")
        raise ValueError(
            f"alignments={path}: of {len(pdfs)} utterances, those whose pdfs do not say their words are {few(wrong)}; "
            f"of the first, {first}. Number the pdfs as quadric does (state s of phone p is {STATES} p + s; phone 0 is "
            f"{SILENCE}, then come the lexicon's in order of their names), or give a CTM file of phones or of words"
        )


def _content(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"alignments={path}: there is no such file")
    return np.fromfile(path, np.uint8)


def _refuse_none(found: Mapping[str, object], path: Path) -> None:
    if not found:
        raise ValueError(f"alignments={path}: no utterance of the training set is in it")


def _train(
    job: Job, prepared: Prepared, tying: Tying, first: Targets, folder: Path, progress: Progress
) -> tuple[AcousticModel, Float[np.ndarray, " C"]]:
    """The small network and the log-prior of its outputs."""
    options = job.flat_start
    torch.manual_seed(job.seed)
    model = options.network.build(prepared.dimension, tying.num_pdfs)
    features = {id: prepared.features["train"][id] for id in first}
    context = (model.left_context, model.right_context)
    frames = FrameStream(features, first, context=context, chunk=job.chunk, seed=job.seed)
    counts = np.bincount(np.concatenate(list(first.values())), minlength=tying.num_pdfs)
    log_prior = log_priors(torch.from_numpy(counts)).float()
    _fit(job, model, CrossEntropy(), frames, options.warm, folder / "warm", progress, "flat start: first alignments")
    if not options.rounds:
        return model, log_prior.numpy()
    corpus = prepared.perturbed.by_id
    graphs = AlignmentGraphs(prepared.lexicon, tying)
    automata = {
        id: FullSumTarget(graphs.automaton(corpus[id].words), len(features[id]))
        for id in progress(list(first), total=len(first), what="flat start: graphs")
    }
    whole = FrameStream(
        features, automata, context=context, chunk=None, micro_frames=4 * options.gradient_frames, seed=job.seed
    )
    for round in range(options.rounds):
        low, high = options.scale
        scale = low + (high - low) * round / max(1, options.rounds - 1)
        loss = FullSum(log_prior, scale=scale, prior_scale=options.prior_scale, jobs=job.jobs)
        what = f"flat start: full sum {round + 1} of {options.rounds}"
        _fit(job, model, loss, whole, 1.0, folder / f"round-{round + 1}", progress, what)
        log_prior = _mean_posterior(model, frames)
    return model, log_prior.numpy()


def _fit(
    job: Job,
    model: AcousticModel,
    loss: Loss,
    stream: FrameStream,
    epochs: float,
    folder: Path,
    progress: Progress,
    what: str,
) -> None:
    """Trains ``model`` in place by Adam, or takes its parameters from ``folder`` where that was done before."""
    plan = Plan(epochs, FixedSizes(job.flat_start.gradient_frames), autocast=job.autocast, seed=job.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.flat_start.lr)
    Trainer(model, loss, optimizer, stream, None, plan, folder).fit(progress=progress, what=what)
    with reading(folder):
        model.load_state_dict(checkpoint.load(folder / "model.pt")["model"])


@torch.no_grad()
def _mean_posterior(model: AcousticModel, frames: FrameStream) -> Float[torch.Tensor, " C"]:
    """The log of the mean output probability of each pdf."""
    model.eval()
    total = torch.zeros(model.outputs, dtype=torch.float64)
    for inputs, target, _ in frames.sample(_PRIOR_FRAMES, key=0):
        assert isinstance(target, torch.Tensor)
        total += torch.softmax(model(inputs), -1)[target >= 0].sum(0).double()
    return log_priors(total, floor=1e-4).float()
