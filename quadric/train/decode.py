"""A trained system at work on a corpus: words, their times and, with transcripts, their errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from quadric.progress import Progress, silent
from quadric.speech import scoring
from quadric.speech.alignment import ForcedAlignment, align
from quadric.speech.corpus import Corpus
from quadric.speech.ctm import word_segments, word_tokens, write_ctm
from quadric.speech.scoring import Score
from quadric.train.prepare import make_features
from quadric.train.sources import material
from quadric.train.stages import alone_in
from quadric.train.system import System

logger = logging.getLogger(__name__)


def decode_directory(
    folder: Path,
    corpus: Corpus,
    out: Path,
    *,
    lm_weight: float | None = None,
    word_penalty: float | None = None,
    on_bad_audio: Literal["error", "drop"] = "error",
    jobs: int = 2,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Recognises ``corpus`` with the system in ``folder``; writes words, times and, with transcripts, errors.

    Returns:
        Kaldi's lines of word and sentence errors, or one line that says where the words are.

    Raises:
        ValueError: what is in ``out`` would be overwritten, or another process writes there.
    """
    check_output(out)
    with alone_in(out, "out"):
        return _decode_directory(folder, corpus, out, lm_weight, word_penalty, on_bad_audio, jobs, progress)


def check_output(out: Path) -> None:
    """Raises ``ValueError`` if ``out`` is a folder of files that must not be written over."""
    for files, what in _NOT_TO_OVERWRITE.items():
        found = [file for file in files if Path(os.path.normpath(out.resolve() / file)).is_file()]
        if found:
            raise ValueError(
                f"out={out}: {what} is there ({found[0]}), which would be overwritten; name a folder of its own"
            )


_NOT_TO_OVERWRITE = {
    ("wav.scp", "feats.scp"): "a data directory",
    ("options.json",): "a trained system",
    ("key.json", "job.json", "../sweep.json"): "a part of a job",
}


def _decode_directory(
    folder: Path,
    corpus: Corpus,
    out: Path,
    lm_weight: float | None,
    word_penalty: float | None,
    on_bad_audio: Literal["error", "drop"],
    jobs: int,
    progress: Progress,
) -> tuple[str, ...]:
    system = System.load(folder)
    system = system.tuned(
        system.lm_weight if lm_weight is None else lm_weight,
        system.word_penalty if word_penalty is None else word_penalty,
    )
    features = make_features(material(corpus), system.front, out / "cache", jobs, progress, on_bad_audio=on_bad_audio)
    scores = system.likelihoods(features)
    with system.decoder(jobs=jobs) as decoder:
        found = system.recognise(decoder, scores, progress=progress)
    words = {id: hypothesis.words for id, hypothesis in found.items()}
    times = align(
        {id: said for id, said in words.items() if said},
        ((id, scores[id]) for id, said in words.items() if said),
        system.lexicon,
        system.tying,
        options=ForcedAlignment(on_too_short="drop"),
        jobs=jobs,
        progress=progress,
    )
    shift = system.front.fbank.frame_shift_ms / 1000
    tokens = {
        id: word_tokens(word_segments(words[id], pdfs, system.lexicon, system.tying), shift)
        for id, pdfs in times.pdfs.items()
    }
    write_ctm(out / "hyp.ctm", tokens)
    scoring.write_text(out / "text", words)
    said = Corpus(corpus.name, tuple(u for u in corpus if u.words))
    if not said:
        return (f"recognised {len(words)} utterances: {out / 'text'}",)
    if len(said) < len(corpus):
        logger.warning("%d of %d utterances have no transcript: not scored", len(corpus) - len(said), len(corpus))
    return write_decoded(out, said, {id: words[id] for id in said.by_id if id in words}).lines


def write_decoded(out: Path, corpus: Corpus, words: Mapping[str, Sequence[str]]) -> Score:
    """Aligned errors per utterance and speaker, and sclite's files; what was not recognised counts as deleted."""
    speakers = {u.id: u.speaker for u in corpus}
    score = scoring.score({u.id: u.words for u in corpus}, words, speakers=speakers, on_missing="count")
    out.mkdir(parents=True, exist_ok=True)
    scoring.write_text(out / "ref", {u.id: u.words for u in corpus})
    scoring.write_text(out / "utt2spk", {id: (speaker,) for id, speaker in speakers.items()})
    scoring.write_trn(out / "hyp.trn", words, speakers)
    scoring.write_trn(out / "ref.trn", {u.id: u.words for u in corpus}, speakers)
    scoring.write_per_utt(out / "per_utt", score)
    scoring.write_per_spk(out / "per_spk", score)
    (out / "wer").write_text("\n".join(score.lines) + "\n")
    return score
