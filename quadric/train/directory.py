"""A trained system at work on a Kaldi data directory, beside decoding it: alignments and lattices.

An utterance that cannot be done is left out, counted, and named with the reason in the file ``left_out``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from quadric.files import new_file
from quadric.lattice.generate import LatticeOptions
from quadric.lattice.words import oracle_errors
from quadric.progress import Progress, silent
from quadric.speech.alignment import ForcedAlignment, align, save_alignments
from quadric.speech.backends import Backend
from quadric.speech.corpus import Corpus
from quadric.speech.ctm import phone_tokens, word_segments, word_tokens, write_ctm
from quadric.speech.graph import decoding_graph, read_graph, to_labelled
from quadric.speech.kaldi_archive import write_archive
from quadric.speech.kaldi_frames import from_lattice
from quadric.speech.kaldi_words import write_words
from quadric.speech.lattices import Lattices, make_lattices
from quadric.speech.lexicon import Lexicon
from quadric.speech.transitions import TransitionModel
from quadric.train.decode import check_output
from quadric.train.left_out import LeftOut, lines, listed, not_aligned, unknown_words, unread
from quadric.train.prepare import Features, make_features
from quadric.train.sources import material
from quadric.train.stages import alone_in, digest
from quadric.train.system import System

logger = logging.getLogger(__name__)

Form = Literal["none", "binary", "text"]


@dataclass(frozen=True)
class _Scored:
    """A corpus as a system hears it, and why utterances are not heard."""

    system: System
    corpus: Corpus
    features: Features
    left_out: dict[str, LeftOut]


def align_directory(
    folder: Path, corpus: Corpus, out: Path, *, jobs: int = 2, progress: Progress = silent
) -> tuple[str, ...]:
    """Aligns the transcripts of ``corpus`` by the system in ``folder``.

    Writes to ``out`` the pdf of every frame as a Kaldi archive (``ali.ark``), and the times of phones and words
    (``phones.ctm``, ``words.ctm``).

    Returns:
        A line that says how many utterances were aligned and how many left out.

    Raises:
        ValueError: what is in ``out`` would be overwritten, another process writes there, no utterance could be
            aligned, or the corpus has no transcripts.
    """
    check_output(out)
    with alone_in(out, "out"):
        scored = _score(System.load(folder), corpus, out, jobs, progress)
        system, left_out = scored.system, scored.left_out
        scores = system.likelihoods(scored.features)
        transcripts = {}
        for utterance in scored.corpus:
            if not utterance.words:
                left_out[utterance.id] = LeftOut("no transcript", "it has no transcript")
            elif unknown := system.lexicon.unknown_words(dict.fromkeys(utterance.words, 1)):
                left_out[utterance.id] = unknown_words(unknown)
            else:
                transcripts[utterance.id] = utterance.words
        found = align(
            transcripts,
            ((id, scores[id]) for id in transcripts),
            system.lexicon,
            system.tying,
            options=ForcedAlignment(on_too_short="drop"),
            jobs=jobs,
            progress=progress,
        )
        left_out |= not_aligned(found)
        _refuse_none(found.pdfs, corpus, left_out)
        save_alignments(out / "ali.ark", found.pdfs)
        shift = system.front.fbank.frame_shift_ms / 1000
        words = {
            id: word_tokens(word_segments(transcripts[id], pdfs, system.lexicon, system.tying), shift)
            for id, pdfs in found.pdfs.items()
        }
        write_ctm(out / "words.ctm", words)
        write_ctm(out / "phones.ctm", {id: phone_tokens(pdfs, system.tying, shift) for id, pdfs in found.pdfs.items()})
        return (f"aligned {len(found.pdfs)} of {_count(corpus)} utterances{_told(out, left_out)}: {out / 'ali.ark'}",)


def lattice_directory(
    folder: Path,
    corpus: Corpus,
    out: Path,
    *,
    options: LatticeOptions,
    arpa: Path | None = None,
    lm_weight: float | None = None,
    archive: Form = "none",
    backend: Backend = "quadric",
    jobs: int = 2,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Makes lattices of ``corpus`` by the system in ``folder``; run again, it goes on where it stopped.

    Of a corpus that has changed meanwhile it makes those again whose features have.

    Writes them to ``out/lattices`` and, as ``archive`` says, as Kaldi's lattices to ``out/lat.ark``, with the
    transition model that numbers their transitions in ``out/final.mdl`` and the words in ``out/words.txt``.

    Args:
        options: how wide they are.
        arpa: the language model of the lattices; None: that of the system.
        lm_weight: its weight, the reciprocal of the acoustic scale; None: the system's.
        backend: whose search makes them, see `quadric.speech.lattices.make_lattices`.

    Returns:
        Lines with the number of lattices, their density and, with transcripts, the fewest word errors on any path.

    Raises:
        ValueError: as `align_directory`; ``lm_weight`` is not positive; lattices of something else are in ``out``.
    """
    if lm_weight is not None and not 0.0 < lm_weight < math.inf:
        raise ValueError(f"lm_weight={lm_weight} must be a positive number")
    check_output(out)
    with alone_in(out, "out"):
        system = System.load(folder)
        graph = read_graph(system.graph) if arpa is None else decoding_graph(system.lexicon, arpa, system.tying)
        scored = _score(system, corpus, out, jobs, progress)
        scale = 1 / (system.lm_weight if lm_weight is None else lm_weight)
        labelled = to_labelled(graph, system.tying)
        made_from = {
            "scale": scale,
            "model": digest(system.log_prior, *(value.numpy() for value in system.model.state_dict().values())),
        }
        digests = {id: digest(features) for id, features in scored.features.items()}
        scaled = system.likelihoods(scored.features, scale=scale)
        made = make_lattices(
            scaled,
            labelled,
            options,
            out / "lattices",
            made_from=made_from,
            backend=backend,
            digests=digests,
            jobs=jobs,
            progress=progress,
        )
        left_out = scored.left_out | {id: LeftOut("no lattice", why) for id, why in made.skipped.items()}
        _refuse_none(made, corpus, left_out)
        density = made.arcs / made.frames
        told = [
            f"lattices of {len(made)} of {_count(corpus)} utterances, {density:.1f} arcs a frame{_told(out, left_out)}"
        ]
        told += _oracle(made, scored.corpus, system.lexicon, progress)
        if archive != "none":
            _write_archive(out, made, system, scored.features, archive)
        return tuple(told)


def _write_archive(
    out: Path, made: Lattices, system: System, features: Mapping[str, np.ndarray], archive: Form
) -> None:
    """Kaldi's compact lattices, with acoustic costs not scaled, as its tools expect, and what they refer to."""
    transitions = TransitionModel.of(system.tying)
    transitions.save(out / "final.mdl")
    write_words(out / "words.txt", system.lexicon)
    scores = system.likelihoods(features)
    lattices = ((id, from_lattice(made[id], transitions, scores=scores[id])) for id in sorted(made))
    write_archive(out / "lat.ark", lattices, text=archive == "text", scp=out / "lat.scp")


def _oracle(made: Lattices, corpus: Corpus, lexicon: Lexicon, progress: Progress) -> list[str]:
    """The fewest word errors that the lattices hold, as a line."""
    labels = {word: label for label, word in enumerate(lexicon.words, start=1)}
    said = [u for u in corpus if u.words and u.id in made]
    if not said:
        return []
    errors = sum(
        oracle_errors(made[u.id], [labels.get(word, 0) for word in u.words])
        for u in progress(said, total=len(said), what="oracle errors")
    )
    words = sum(len(u.words) for u in said)
    return [f"oracle %WER {100 * errors / words:.2f} [ {errors} / {words} ]: the best paths of {len(said)} lattices"]


def _score(system: System, corpus: Corpus, out: Path, jobs: int, progress: Progress) -> _Scored:
    features = make_features(material(corpus), system.front, out / "cache", jobs, progress, on_bad_audio="drop")
    width = next(iter(features.values())).shape[1]
    if width != system.inputs:
        raise ValueError(
            f"{corpus.name}: its features have {width} columns, the system was trained on {system.inputs}: make them "
            "as those that it was trained on"
        )
    heard = corpus.subset(id for id in corpus.by_id if id in features)
    return _Scored(system, heard, features, unread(corpus) | features.left_out)


def _count(corpus: Corpus) -> int:
    """How many utterances there are, with those that were left out when they were read."""
    return len(corpus) + len(corpus.left_out)


def _refuse_none(found: Mapping[str, object], corpus: Corpus, left_out: Mapping[str, LeftOut]) -> None:
    if not found:
        raise ValueError(f"{corpus.name}: none of {_count(corpus)} utterances could be done: {listed(left_out)}")


def _told(out: Path, left_out: Mapping[str, LeftOut]) -> str:
    """Writes who was left out, each on a line; returns what to say about it."""
    with new_file(out / "left_out") as temporary:
        temporary.write_text(lines(left_out), encoding="utf-8")
    return f", {len(left_out)} left out ({out / 'left_out'})" if left_out else ""
