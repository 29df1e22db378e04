"""A corpus of spoken digit strings, made on the spot: for demonstrations and for tests that need to know the truth.

A formant synthesiser speaks random strings of the eleven English digit words in voices that differ between
training, development and test data, and says where each word and phone begins. Noise of several kinds is added
at a random signal-to-noise ratio. The corpus is a function of its options alone: the same options give the same
bytes, whatever the number of jobs. It exercises all that real speech does, but it is synthetic: an error rate
on it is no evidence of recognition quality.

The synthesiser is the ``demo`` extra (espeak-ng, GPL-3), called through its C interface.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Int16

from quadric.files import new_folder
from quadric.progress import Progress, silent
from quadric.speech.espeak import UNSTABLE, WORD, Engine, voice_variants
from quadric.speech.workers import worker_pool

DIGIT_LEXICON: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("EIGHT", ("EY", "T")),
    ("FIVE", ("F", "AY", "V")),
    ("FOUR", ("F", "AO")),
    ("FOUR", ("F", "AO", "R")),
    ("NINE", ("N", "AY", "N")),
    ("OH", ("OW",)),
    ("ONE", ("W", "AH", "N")),
    ("SEVEN", ("S", "EH", "V", "AH", "N")),
    ("SIX", ("S", "IH", "K", "S")),
    ("THREE", ("TH", "R", "IY")),
    ("TWO", ("T", "UW")),
    ("ZERO", ("Z", "IH", "R", "OW")),
)
"""The eleven digit words as the synthesiser says them; FOUR gains an R before a vowel."""

SPLITS = ("train", "dev", "test")

_WORDS = tuple(dict.fromkeys(word for word, _ in DIGIT_LEXICON))
_PHONES = {
    "z": "Z", "i@": "IH", "r": "R", "oU": "OW", "w": "W", "V": "AH", "n": "N", "t": "T", "u:": "UW", "T": "TH",
    "i:": "IY", "f": "F", "o@": "AO", "aI": "AY", "v": "V", "s": "S", "I": "IH", "k": "K", "E": "EH", "@": "AH",
    "eI": "EY",
}  # fmt: skip
_PAUSE = 0.2  # probability of a comma after a word
_MARGIN = (0.1, 0.4)  # seconds of noise alone before and after the speech
_LEVEL = (-32.0, -22.0)  # speech level, decibels below full scale
_BABBLE = 6  # talkers in babble noise


@dataclass(frozen=True)
class DigitCorpus:
    """What to synthesise.

    Attributes:
        utterances: how many in train, dev and test; one lasts about two seconds.
        voices: the speakers of train, dev and test, variants of the American English voice; no voice twice.
        words: fewest and most words of an utterance.
        rate: slowest and fastest speaking rate, words per minute.
        pitch: lowest and highest pitch setting, 0 to 99 (50 is the voice's own).
        snr: worst and best signal-to-noise ratio, decibels; drawn for each utterance.
        sample_rate: hertz.
        seed: of all that is drawn.
    """

    utterances: tuple[int, int, int] = (600, 100, 200)
    voices: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = (
        ("Alex", "Annie", "Gene", "Jacky", "Mario", "Michael", "Mike", "belinda", "boris", "f1", "f4", "linda", "m1",
         "m2", "m3", "m5", "m7", "max", "norbert", "robert"),
        ("Andy", "Denis", "grandma", "m4", "quincy", "steph", "travis", "zac"),
        ("Lee", "aunty", "ed", "john", "m6", "m8", "paul", "shelby"),
    )  # fmt: skip
    words: tuple[int, int] = (2, 7)
    rate: tuple[int, int] = (130, 230)
    pitch: tuple[int, int] = (35, 65)
    snr: tuple[float, float] = (-5.0, 10.0)
    sample_rate: int = 16000
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.utterances) != 3 or min(self.utterances) < 0:
            raise ValueError(f"utterances={self.utterances} must be three counts: train, dev, test")
        for name, floor in (("words", 1), ("rate", 80), ("pitch", 0), ("snr", -np.inf)):
            low, high = getattr(self, name)
            if not floor <= low <= high:
                raise ValueError(f"{name}={(low, high)} must be an ascending range from {floor} up")
        everyone = [voice for split in self.voices for voice in split]
        twice = sorted({voice for voice in everyone if everyone.count(voice) > 1})
        if twice:
            raise ValueError(f"voices must differ between and within train, dev and test; given twice: {twice}")
        unstable = sorted(set(everyone) & UNSTABLE)
        if unstable:
            raise ValueError(f"voices has {unstable}, which never sound the same twice: choose others")
        for split, count, voices in zip(SPLITS, self.utterances, self.voices, strict=True):
            if count and not voices:
                raise ValueError(f"voices has none for the {count} utterances of {split}")

    @property
    def digest(self) -> str:
        """Names the corpus: equal options, equal digest."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Event(NamedTuple):
    """A word or phone and when it is spoken, in seconds."""

    label: str
    start: float
    end: float


class Spoken(NamedTuple):
    """Clean speech, its words and its phones."""

    samples: Int16[np.ndarray, " N"]
    words: tuple[Event, ...]
    phones: tuple[Event, ...]


class _Line(NamedTuple):
    """What a voice is asked to say."""

    words: tuple[str, ...]
    pauses: tuple[bool, ...]
    rate: int
    pitch: int


def synthesise(corpus: DigitCorpus, cache: Path, *, jobs: int = 2, progress: Progress = silent) -> Path:
    """Makes the corpus below ``cache``, unless it is there already, and returns its folder.

    The folder holds ``lexicon.txt`` and the Kaldi data directories ``train``, ``dev`` and ``test`` (those that have
    utterances), each with ``wav.scp`` (16-bit files in ``wav/``), ``text``, ``utt2spk``, and the true times in
    ``words.ctm`` and ``phones.ctm``. It gets its name once complete, so a folder of that name is always whole.

    Raises:
        ImportError: the ``demo`` extra is not installed.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    folder = Path(cache).resolve() / f"digits-{corpus.digest}"
    if folder.is_dir():
        return folder
    unknown = sorted({voice for split in corpus.voices for voice in split} - voice_variants())
    if unknown:
        raise ValueError(
            f"voices has {unknown}, which the synthesiser does not know; it has {sorted(voice_variants())}"
        )
    with new_folder(folder) as work:
        lines = (f"{word} {' '.join(phones)}\n" for word, phones in DIGIT_LEXICON)
        (work / "lexicon.txt").write_text("".join(lines), encoding="utf-8")
        for index in range(len(SPLITS)):
            _make_split(corpus, index, work, jobs, progress)
    return folder


def _make_split(corpus: DigitCorpus, index: int, work: Path, jobs: int, progress: Progress) -> None:
    split, voices = SPLITS[index], corpus.voices[index]
    if not corpus.utterances[index]:
        return
    (work / split / "wav").mkdir(parents=True)
    lines = [_draw_line(corpus, _rng(corpus, index, i, 0)) for i in range(corpus.utterances[index])]
    spoken = _speak_all(lines, voices, corpus.sample_rate, jobs, progress, f"speaking {split}")
    tables: dict[str, list[str]] = {name: [] for name in ("wav.scp", "text", "utt2spk", "words.ctm", "phones.ctm")}
    for i, line in progress(enumerate(lines), total=len(lines), what=f"mixing {split}"):
        others = [spoken[j].samples for j in range(len(lines)) if j % len(voices) != i % len(voices)]
        samples, delay = _mix(spoken[i], others, corpus, _rng(corpus, index, i, 1))
        speaker = voices[i % len(voices)]
        utterance = f"{speaker}-{i:05d}"
        with open(work / split / "wav" / f"{utterance}.wav", "wb") as file:
            soundfile.write(file, samples, corpus.sample_rate, format="WAV", subtype="PCM_16")
        tables["wav.scp"].append(f"{utterance} wav/{utterance}.wav\n")
        tables["text"].append(f"{utterance} {' '.join(line.words)}\n")
        tables["utt2spk"].append(f"{utterance} {speaker}\n")
        for name, events in (("words.ctm", spoken[i].words), ("phones.ctm", spoken[i].phones)):
            tables[name].append("".join(_ctm_line(utterance, event, delay) for event in events))
    for name, rows in tables.items():
        (work / split / name).write_text("".join(sorted(rows)), encoding="utf-8")


def _rng(corpus: DigitCorpus, *keys: int) -> np.random.Generator:
    """A stream of its own for each utterance, so that none depends on the order of work."""
    return np.random.default_rng((corpus.seed, *keys))


def _draw_line(corpus: DigitCorpus, rng: np.random.Generator) -> _Line:
    count = int(rng.integers(corpus.words[0], corpus.words[1] + 1))
    return _Line(
        words=tuple(_WORDS[k] for k in rng.integers(len(_WORDS), size=count)),
        pauses=tuple(bool(u < _PAUSE) for u in rng.random(count - 1)),
        rate=int(rng.integers(corpus.rate[0], corpus.rate[1] + 1)),
        pitch=int(rng.integers(corpus.pitch[0], corpus.pitch[1] + 1)),
    )


def _ctm_line(utterance: str, event: Event, delay: float) -> str:
    return f"{utterance} 1 {event.start + delay:.4f} {event.end - event.start:.4f} {event.label}\n"


# ------------------------------------------------------------------------------------------------ noise


def _mix(
    spoken: Spoken, others: Sequence[Int16[np.ndarray, " N"]], corpus: DigitCorpus, rng: np.random.Generator
) -> tuple[Int16[np.ndarray, " M"], float]:
    """Speech in noise, and by how many seconds the speech was delayed."""
    before, after = (rng.uniform(*_MARGIN, size=2) * corpus.sample_rate).astype(int)
    clean = np.pad(spoken.samples.astype(np.float64), (before, after))
    power = np.mean(np.square(spoken.samples, dtype=np.float64))
    kinds = ("white", "coloured", "babble") if others else ("white", "coloured")
    noise = _noise(str(rng.choice(kinds)), len(clean), others, rng)
    mixture = clean / np.sqrt(power) + noise * 10.0 ** (-rng.uniform(*corpus.snr) / 20.0)
    level = 10.0 ** (rng.uniform(*_LEVEL) / 20.0)
    scale = min(level, 0.99 / np.abs(mixture).max()) * np.iinfo(np.int16).max
    return np.round(mixture * scale).astype(np.int16), before / corpus.sample_rate


def _noise(
    kind: str, length: int, others: Sequence[Int16[np.ndarray, " N"]], rng: np.random.Generator
) -> Float[np.ndarray, " M"]:
    """Noise of unit power: white, with a spectrum falling by a random slope, or several talkers at once."""
    if kind == "babble":
        noise = np.zeros(length)
        for talker in rng.integers(len(others), size=_BABBLE):
            voice = others[talker].astype(np.float64)
            voice = np.resize(np.roll(voice, rng.integers(len(voice))), length)
            noise += voice / np.sqrt(np.mean(np.square(voice)) + 1.0)
    else:
        noise = rng.normal(size=length)
        if kind == "coloured":
            slope = rng.uniform(0.5, 2.0)  # 1 is pink, 2 is brown
            spectrum = np.fft.rfft(noise)
            spectrum /= np.maximum(np.arange(len(spectrum)), len(spectrum) // 160) ** (slope / 2.0)
            noise = np.fft.irfft(spectrum, length)
    return noise / np.sqrt(np.mean(np.square(noise)))


# ------------------------------------------------------------------------------------------------ speech


def _speak_all(
    lines: Sequence[_Line], voices: Sequence[str], sample_rate: int, jobs: int, progress: Progress, what: str
) -> list[Spoken]:
    """The lines, line ``i`` in voice ``i`` modulo the number of voices, each voice in a process of its own.

    The engine carries state from one utterance to the next; a fresh process for each voice makes its output a
    function of that voice's lines alone.
    """
    spoken: list[Spoken | None] = [None] * len(lines)

    def speak(first: int) -> tuple[int, list[Spoken]]:
        task = (voices[first], lines[first :: len(voices)], sample_rate)
        with worker_pool(1) as process:
            return first, process.submit(_speak, *task).result()

    firsts = range(min(len(voices), len(lines)))
    with ThreadPoolExecutor(jobs) as threads:
        for first, results in progress(threads.map(speak, firsts), total=len(firsts), what=what):
            spoken[first :: len(voices)] = results
    return [utterance for utterance in spoken if utterance is not None]


def _speak(voice: str, lines: Sequence[_Line], sample_rate: int) -> list[Spoken]:
    engine = Engine(f"en-us+{voice}")
    return [_say(line, engine, sample_rate) for line in lines]


def _say(line: _Line, engine: Engine, sample_rate: int) -> Spoken:
    """Says one line and turns the engine's events into words and phones of the lexicon."""
    pauses = [", " if pause else " " for pause in line.pauses]
    text = "".join(word.lower() + gap for word, gap in zip(line.words, [*pauses, ""], strict=True))
    samples, events = engine.say(text, line.rate, line.pitch)
    groups: list[list[Event]] = [[] for _ in line.words]
    # The event of a word may come a phone early: it says which phones are the word's, they say when it is.
    timed, begun = [], 0
    for label, at in events:
        begun += label == WORD
        if label != WORD:
            timed.append((label, begun, at))
    ends = [*(at for _, _, at in timed[1:]), len(samples)]
    for (label, number, start), end in zip(timed, ends, strict=True):
        if label in _PHONES and 1 <= number <= len(groups):
            groups[number - 1].append(Event(_PHONES[label], start / engine.rate, end / engine.rate))
        elif not label.startswith("_"):
            raise RuntimeError(f"the synthesiser said {label!r} in {text!r}, which no digit has")
    for word, group in zip(line.words, groups, strict=True):
        if (word, tuple(phone.label for phone in group)) not in DIGIT_LEXICON:
            raise RuntimeError(f"the synthesiser said {[phone.label for phone in group]} for {word} in {text!r}")
    words = [Event(word, group[0].start, group[-1].end) for word, group in zip(line.words, groups, strict=True)]
    resampled = soxr.resample(samples.astype(np.float32), engine.rate, sample_rate)
    return Spoken(
        np.clip(np.round(resampled), -32768, 32767).astype(np.int16),
        tuple(words),
        tuple(phone for group in groups for phone in group),
    )
