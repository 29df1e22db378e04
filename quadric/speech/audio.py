"""Reading audio: any file of libsndfile, or the output of a command, as samples of one channel at one rate."""

from __future__ import annotations

import io
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32

from quadric.speech.corpus import Audio

_UNKNOWN = 0x7FFFF000
_OVERSHOOT = 0.5  # seconds that a segment may end after its recording, as in Kaldi's extract-segments


class UnreadableAudio(ValueError):
    """Audio that is missing, damaged, or does not hold the part that is asked for."""


@dataclass(frozen=True)
class Sound:
    """What was read: samples in [-1, 1] at the wanted rate, and what the source was like (``rate`` in Hz)."""

    samples: Float32[np.ndarray, " N"]
    source_rate: int
    channels: int


def check_audio(audio: Audio) -> None:
    """Reads no more than the header of a file. Raises ``UnreadableAudio`` if that already shows it to be bad."""
    if audio.path is not None:
        with _opened(audio.path) as file:
            _part(file, audio)
            if audio.end is None:
                _check_whole(file)


def read_audio(audio: Audio, rate: int) -> Sound:
    """Reads the first channel of ``audio``, resampled to ``rate`` Hz (after its speed is changed).

    Raises:
        UnreadableAudio: the file is missing or damaged, the command fails, the segment lies outside, or samples are
            not finite.
    """
    with _opened(audio.path if audio.path is not None else _output(audio.command or "")) as file:
        first, count = _part(file, audio)
        try:
            file.seek(first)
            samples = file.read(count, dtype="float32", always_2d=True)[:, 0]
        except (soundfile.LibsndfileError, OSError) as error:
            raise UnreadableAudio(f"cannot be decoded: {error}") from error
        source_rate, channels = file.samplerate, file.channels
        if audio.end is None:
            _check_whole(file)
    if count > 0 and len(samples) < count:
        raise UnreadableAudio(f"is cut short: {len(samples)} of {count} samples could be read")
    if not np.isfinite(samples).all():
        raise UnreadableAudio("holds samples that are not finite")
    played = round(source_rate * audio.speed, 6)  # 16000 * 1.1 is not quite 17600, which soxr would take at its word
    if played != rate:
        samples = soxr.resample(samples, played, rate)
    return Sound(np.ascontiguousarray(samples), source_rate, channels)


def _opened(source: Path | io.BytesIO) -> soundfile.SoundFile:
    if isinstance(source, Path) and not source.is_file():
        raise UnreadableAudio(f"missing: there is no file {source}")
    try:
        return soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError, OSError) as error:
        raise UnreadableAudio(f"is not audio: {error}") from error


def _check_whole(file: soundfile.SoundFile) -> None:
    """Refuses a WAV file with less data than its header says, which libsndfile reads to its end and tells in its log.

    A program that writes to a pipe cannot know how much will come, and says about 2 GiB or more.
    """
    told = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if told and int(told[2]) < int(told[1]) < _UNKNOWN:
        raise UnreadableAudio(f"is cut short: {told[2]} of {told[1]} bytes of sound are there")


def _output(command: str) -> io.BytesIO:
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UnreadableAudio(f"the command {command!r} failed with status {done.returncode}: {''.join(last)}")
    return io.BytesIO(done.stdout)


def _part(file: soundfile.SoundFile, audio: Audio) -> tuple[int, int]:
    """The first sample and the number of samples of the part ``audio`` of ``file``."""
    rate, total = file.samplerate, file.frames
    first = round(audio.start * rate)
    last = total if audio.end is None else round(audio.end * rate)
    if first >= total or last > total + _OVERSHOOT * rate:
        raise UnreadableAudio(
            f"has no part from {audio.start:g} s to {'its end' if audio.end is None else f'{audio.end:g} s'}: "
            f"it lasts {total / rate:.2f} s"
        )
    return first, min(last, total) - first
