"""Log mel filter banks of a corpus, in a cache on disk.

Reading them (``feature_store``) and normalising them (``normalisation``) can be imported from here as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import kaldi_native_fbank
import numpy as np
from jaxtyping import Float32

from quadric.files import writing_to
from quadric.progress import Progress, silent
from quadric.speech.audio import UnreadableAudio, check_audio, read_audio
from quadric.speech.corpus import Audio, Corpus
from quadric.speech.feature_store import FeatureStore, Shard, read_shard, write_shard
from quadric.speech.normalisation import Normalisation, add_deltas, deltas, normalise
from quadric.speech.tables import few
from quadric.speech.workers import in_order, worker_pool

__all__ = [
    "BadAudio",
    "Fbank",
    "FeatureStore",
    "Normalisation",
    "add_deltas",
    "deltas",
    "extract",
    "normalise",
]

logger = logging.getLogger(__name__)

_FORMAT = 1  # part of the cache's key: raise it when the numbers or their files change
_CHUNK = 16  # utterances a worker process computes at a time
_SHOWN = 20  # bad utterances that an error message lists


@dataclass(frozen=True)
class Fbank:
    """Logarithms of the energies in mel-spaced triangular bands (Kaldi's ``compute-fbank-feats``, dither 0).

    Args:
        rate: sampling rate of the audio in Hz; other audio is resampled to it.
        bins: number of bands, D.
        low, high: lowest and highest frequency in Hz; ``high`` <= 0 counts down from half the rate.
        frame_shift_ms, frame_length_ms: distance and length of the frames in milliseconds. Frames are centred, their
            number is the duration divided by the shift, rounded.
    """

    rate: int = 16000
    bins: int = 40
    low: float = 20.0
    high: float = -400.0
    frame_shift_ms: float = 10.0
    frame_length_ms: float = 25.0

    def __post_init__(self) -> None:
        nyquist = self.rate / 2
        top = self.high if self.high > 0 else nyquist + self.high
        if not 0 <= self.low < top <= nyquist:
            raise ValueError(
                f"Fbank: the band from low={self.low:g} to high={self.high:g} (that is {top:g} Hz) must lie between 0 "
                f"and {nyquist:g} Hz, half of rate={self.rate}"
            )
        if self.bins < 3:
            raise ValueError(f"Fbank: bins={self.bins} must be at least 3")
        if not 0 < self.frame_shift_ms <= self.frame_length_ms:
            raise ValueError(
                f"Fbank: frame_shift_ms={self.frame_shift_ms:g} must be positive and at most "
                f"frame_length_ms={self.frame_length_ms:g}"
            )

    def __call__(self, samples: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, "T D"]:
        """The features of ``samples`` in [-1, 1]. Digital silence gives a finite lowest value; T may be 0."""
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = self.rate
        options.frame_opts.frame_shift_ms = self.frame_shift_ms
        options.frame_opts.frame_length_ms = self.frame_length_ms
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = False
        options.mel_opts.num_bins = self.bins
        options.mel_opts.low_freq = self.low
        options.mel_opts.high_freq = self.high
        engine = kaldi_native_fbank.OnlineFbank(options)
        engine.accept_waveform(self.rate, samples * np.float32(32768.0))
        engine.input_finished()
        features = np.empty((engine.num_frames_ready, self.bins), np.float32)
        for t in range(len(features)):
            features[t] = engine.get_frame(t)
        return features


class BadAudio(ValueError):
    """Audio of some utterances cannot be used; ``reasons`` holds all of them, id -> what is wrong."""

    def __init__(self, corpus: str, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        lines = [f"  {id} {reason}" for id, reason in list(self.reasons.items())[:_SHOWN]]
        if len(self.reasons) > _SHOWN:
            lines.append(f"  and {len(self.reasons) - _SHOWN} more (all are in the attribute reasons)")
        super().__init__(
            f"the audio of {len(self.reasons)} utterances of {corpus} cannot be used; correct it, or pass "
            'on_bad_audio="drop" to leave them out:\n' + "\n".join(lines)
        )


@dataclass(frozen=True)
class _Extracted:
    """What came of one utterance: features, or the reason why there are none."""

    id: str
    features: Float32[np.ndarray, "T D"] | None
    reason: str = ""
    source_rate: int = 0
    channels: int = 1
    mute: bool = False


def extract(
    corpus: Corpus,
    fbank: Fbank,
    cache: str | os.PathLike[str],
    *,
    jobs: int = 2,
    on_bad_audio: Literal["error", "drop"] = "error",
    shard: int = 500,
    progress: Progress = silent,
) -> FeatureStore:
    """Computes the features of ``corpus``, or takes them from ``cache``.

    The folder inside ``cache`` is named by a hash of ``fbank`` and of every utterance's id, source, size, time of
    change, start, end and speed, so changed audio is never mistaken. It holds Kaldi archives of ``shard`` utterances;
    an extraction that is interrupted goes on with the first unfinished one. Features do not depend on ``jobs``. Why an
    utterance is left out is kept with them, and told by the result's ``left_out``.

    Args:
        jobs: number of processes; 1 computes in this one. More are started afresh and import the caller's main module,
            which therefore needs ``if __name__ == "__main__":``.
        on_bad_audio: whether audio that is missing, damaged or shorter than a frame is an error or left out.

    Raises:
        BadAudio: a ``ValueError`` that lists every utterance whose audio cannot be used.
        OSError: the cache cannot be written (permission, full disk, ...); the message names folder and remedy.
        RuntimeError: a process died; the message names the remedy.
    """
    if jobs < 1 or shard < 1:
        raise ValueError(f"jobs={jobs} and shard={shard} must be at least 1")
    if on_bad_audio not in ("error", "drop"):
        raise ValueError(f'on_bad_audio={on_bad_audio!r} must be "error" or "drop"')
    audios = _audios(corpus)
    folder = Path(os.path.abspath(cache)) / _key(audios, fbank, shard)
    ids = list(audios)
    shards = {f"feats.{i // shard:05d}": ids[i : i + shard] for i in range(0, len(ids), shard)}
    todo = {name: members for name, members in shards.items() if not _complete(folder, name, members, on_bad_audio)}
    bad = _extract_shards(corpus.name, audios, fbank, folder, todo, jobs, on_bad_audio, progress) if todo else {}
    table: dict[str, str] = {}
    for name in shards:
        places, left_out = read_shard(folder, name) or Shard({}, {})
        table |= places
        bad |= left_out
    reasons = [f"{id}: audio {bad[id]}" for id in ids if id in bad]
    if not table:
        raise ValueError(f"no audio of {corpus.name} can be used, none of {len(ids)} is left: {few(reasons)}")
    if reasons:
        logger.warning("%s: left out for audio that cannot be used: %s", corpus.name, few(reasons))
    return FeatureStore(table, {id: bad[id] for id in ids if id in bad})


def _audios(corpus: Corpus) -> dict[str, Audio]:
    without = [utterance.id for utterance in corpus if utterance.audio is None]
    if without:
        raise ValueError(
            f"utterances of {corpus.name} without audio: {few(without)}: FeatureStore.from_corpus reads their features"
        )
    if not corpus.utterances:
        raise ValueError(f"the corpus {corpus.name} has no utterance to extract features of")
    return {utterance.id: utterance.audio for utterance in corpus if utterance.audio is not None}


def _key(audios: Mapping[str, Audio], fbank: Fbank, shard: int) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, asdict(fbank), shard]).encode())
    for id, audio in audios.items():
        source: list[object] = [audio.command]
        if audio.path is not None:
            try:
                status = os.stat(audio.path)
                source = [os.path.abspath(audio.path), status.st_size, status.st_mtime_ns]
            except OSError:
                source = [os.path.abspath(audio.path), None, None]
        digest.update(json.dumps([id, *source, audio.start, audio.end, audio.speed]).encode())
    return digest.hexdigest()[:16]


def _complete(folder: Path, name: str, members: Sequence[str], on_bad_audio: str) -> bool:
    """Whether a shard has its features, or the reason where there are none and this is no error."""
    try:
        shard = read_shard(folder, name)
    except ValueError as error:
        logger.warning("computing features again: %s", error)
        return False
    if shard is None:
        return False
    return set(members) == shard.places.keys() | (shard.left_out.keys() if on_bad_audio == "drop" else set())


def _extract_shards(
    corpus: str,
    audios: Mapping[str, Audio],
    fbank: Fbank,
    folder: Path,
    todo: Mapping[str, Sequence[str]],
    jobs: int,
    on_bad_audio: str,
    progress: Progress,
) -> dict[str, str]:
    """Writes the shards ``todo``; returns the utterances without features, and why."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ids = [id for members in todo.values() for id in members]
    bad = _bad_headers(audios, ids)
    if bad and on_bad_audio == "error":
        raise BadAudio(corpus, bad)
    good = [(id, audios[id]) for id in ids if id not in bad]
    chunks = [good[i : i + _CHUNK] for i in range(0, len(good), _CHUNK)]
    sources: list[_Extracted] = []
    with closing(_computed(fbank, chunks, jobs)) as computed:
        results = iter(progress(computed, total=len(good), what="features"))
        for name, members in todo.items():
            features: dict[str, np.ndarray] = {}
            for result in (next(results) for id in members if id not in bad):
                if result.features is None:
                    bad[result.id] = result.reason
                else:
                    features[result.id] = result.features
                sources.append(replace(result, features=None))
            if features and (on_bad_audio == "drop" or len(features) == len(members)):
                write_shard(folder, name, features, {id: bad[id] for id in members if id in bad})
        next(results, None)  # lets the progress see its end
    _warn(corpus, sources, fbank.rate)
    for id, reason in bad.items():
        logger.warning("%s: utterance %s: audio %s", corpus, id, reason)
    if bad and on_bad_audio == "error":
        raise BadAudio(corpus, bad)
    return bad


def _bad_headers(audios: Mapping[str, Audio], ids: Iterable[str]) -> dict[str, str]:
    """What the headers already show to be bad, found in seconds and not after hours."""
    bad = {}
    for id in ids:
        try:
            check_audio(audios[id])
        except UnreadableAudio as error:
            bad[id] = str(error)
    return bad


def _warn(corpus: str, sources: Sequence[_Extracted], rate: int) -> None:
    others = [s for s in sources if s.source_rate not in (0, rate)]
    for hertz in sorted({s.source_rate for s in others}):
        ids = [s.id for s in others if s.source_rate == hertz]
        logger.warning(
            "%s: of %d utterances, resampled from %d to %d Hz: %s", corpus, len(sources), hertz, rate, few(ids)
        )
    several = [s.id for s in sources if s.channels > 1]
    if several:
        logger.warning("%s: only the first channel is used of %s", corpus, few(several))
    mute = [s.id for s in sources if s.mute]
    if mute:
        logger.warning("%s: all samples are zero in %s", corpus, few(mute))


def _compute(fbank: Fbank, items: Sequence[tuple[str, Audio]]) -> list[_Extracted]:
    """The work of a process: no torch here, which would take seconds to load."""
    results = []
    for id, audio in items:
        try:
            sound = read_audio(audio, fbank.rate)
        except UnreadableAudio as error:
            results.append(_Extracted(id, None, str(error)))
            continue
        features = fbank(sound.samples)
        about = (sound.source_rate, sound.channels, not sound.samples.any())
        if len(features) == 0:
            seconds = len(sound.samples) / fbank.rate
            results.append(_Extracted(id, None, f"is shorter than a frame: {seconds:.4f} s", *about))
        elif not np.isfinite(features).all():
            results.append(_Extracted(id, None, "gives features that are not finite", *about))
        else:
            results.append(_Extracted(id, features, "", *about))
    return results


def _computed(
    fbank: Fbank, chunks: Sequence[Sequence[tuple[str, Audio]]], jobs: int
) -> Generator[_Extracted, None, None]:
    """The results of all ``chunks`` in their order, computed a few chunks ahead."""
    jobs = min(jobs, len(chunks))
    if jobs <= 1:
        for chunk in chunks:
            yield from _compute(fbank, chunk)
        return
    pool = worker_pool(jobs)
    try:
        for results in in_order((pool.submit(_compute, fbank, chunk) for chunk in chunks), jobs, "a feature"):
            yield from results
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
