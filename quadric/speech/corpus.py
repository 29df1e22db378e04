"""A corpus of utterances, read from and written to Kaldi data directories.

A data directory holds ``text`` (id, words), ``wav.scp`` (id, audio file) and/or ``feats.scp`` (id, archive), and
optionally ``segments`` (id, recording, start, end) and ``utt2spk`` (id, speaker).
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from quadric.files import new_folder
from quadric.speech.tables import few, fields, find_features, find_root, one_field, read_table, something

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Audio:
    """Where an utterance sounds: a file, or a shell command that writes one to its output; times in seconds.

    ``start`` and ``end`` cut out a part (``None``: to the end). ``speed`` 1.1 then plays it 1.1 times as fast, which
    shortens it and raises its pitch.
    """

    path: Path | None = None
    command: str | None = None
    start: float = 0.0
    end: float | None = None
    speed: float = 1.0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.command is None):
            raise ValueError(
                f"Audio: pass exactly one of path and command, not path={self.path!r}, command={self.command!r}"
            )
        if not 0.0 <= self.start < math.inf:
            raise ValueError(f"Audio: start={self.start!r} must be at least 0 seconds")
        if self.end is not None and not self.start < self.end < math.inf:
            raise ValueError(f"Audio: end={self.end!r} must be later than start={self.start!r}; None is the end")
        if not 0.0 < self.speed < math.inf:
            raise ValueError(f"Audio: speed={self.speed!r} must be positive")


@dataclass(frozen=True)
class Utterance:
    """One utterance: who says which words, and its audio and/or its features (``/path.ark:offset``)."""

    id: str
    speaker: str
    words: tuple[str, ...]
    audio: Audio | None = None
    features: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Utterances, sorted by id (given in any order); every id once.

    ``left_out`` are those that were not taken up when the corpus was read, id -> why; it is no part of a comparison.

    >>> corpus = Corpus("digits", (Utterance("b", "ann", ("TWO",)), Utterance("a", "bob", ("ONE", "TWO"))))
    >>> [utterance.id for utterance in corpus], corpus.by_id["b"].words, corpus.speakers
    (['a', 'b'], ('TWO',), ('ann', 'bob'))
    >>> corpus.word_counts()
    Counter({'TWO': 2, 'ONE': 1})
    """

    name: str
    utterances: tuple[Utterance, ...]
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.utterances, key=lambda utterance: utterance.id))
        repeated = [name for name, count in Counter(utterance.id for utterance in ordered).items() if count > 1]
        if repeated:
            raise ValueError(f"Corpus {self.name}: repeated utterance ids: {few(repeated)}: rename or remove them")
        object.__setattr__(self, "utterances", ordered)

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    @cached_property
    def by_id(self) -> Mapping[str, Utterance]:
        return MappingProxyType({utterance.id: utterance for utterance in self.utterances})

    def __getstate__(self) -> dict[str, object]:
        # The mapping by id is made again when asked for.
        return {"name": self.name, "utterances": self.utterances, "left_out": self.left_out}

    @cached_property
    def speakers(self) -> tuple[str, ...]:
        """The speakers, sorted."""
        return tuple(sorted({utterance.speaker for utterance in self.utterances}))

    def word_counts(self) -> Counter[str]:
        """How often every word is said."""
        return Counter(word for utterance in self.utterances for word in utterance.words)

    def subset(self, ids: Iterable[str]) -> Corpus:
        """The utterances ``ids``. Raises ``ValueError`` with all ids that the corpus does not have."""
        wanted = dict.fromkeys(ids)
        unknown = [name for name in wanted if name not in self.by_id]
        if unknown:
            raise ValueError(f"ids not in the corpus {self.name}: {few(unknown)}: choose among its own")
        return replace(self, utterances=tuple(self.by_id[name] for name in wanted))

    def head(self, n: int) -> Corpus:
        """The first ``n`` utterances by id."""
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        return replace(self, utterances=self.utterances[:n])


def read_data_dir(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    name: str | None = None,
    allow_commands: bool = False,
    allow_missing_text: bool = False,
    on_mismatch: Literal["error", "drop"] = "error",
    on_empty: Literal["error", "drop"] = "error",
) -> Corpus:
    """Reads the Kaldi data directory ``path``.

    Args:
        root: the folder that relative paths start from. By default the first of the data directory and its two
            ancestors that holds the first relative path of the table.
        name: of the corpus; the folder's name by default.
        allow_commands: whether ``wav.scp`` may hold shell commands (ending in ``|``), to be run when audio is read.
        allow_missing_text: whether utterances without a transcript are kept, with no words.
        on_mismatch: what to do about utterances that are not in every table.
        on_empty: what to do about utterances whose transcript is empty.

    Raises:
        FileNotFoundError: a missing folder or table, or no root fits.
        ValueError: malformed lines, repeated ids, commands, or what ``on_mismatch`` and ``on_empty`` do not allow;
            all problems of one kind at once, with their number and the first few.
    """
    folder, start = Path(os.path.abspath(path)), None if root is None else Path(root)
    for argument, value in (("on_mismatch", on_mismatch), ("on_empty", on_empty)):
        if value not in ("error", "drop"):
            raise ValueError(f'{argument}={value!r} must be "error" or "drop"')
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data directory {folder}")
    audio, features, lost = _sources(folder, start, allow_commands, on_mismatch)
    words = _transcripts(folder, allow_missing_text)
    speakers = _speakers(folder, [*audio, *features])
    audio_table = "segments" if (folder / "segments").is_file() else "wav.scp"
    tables: dict[str, Mapping[str, object]] = {audio_table: audio, "feats.scp": features, "utt2spk": speakers}
    kept, left_out = _in_all(
        {table: rows for table, rows in tables.items() if rows}, words, allow_missing_text, folder, on_mismatch
    )
    empty = [] if allow_missing_text else [id for id in kept if not words[id]]
    if empty and on_empty == "error":
        raise ValueError(
            f'empty transcripts in {folder / "text"}: {few(empty)}: correct them, or pass on_empty="drop" to leave '
            "these utterances out"
        )
    if empty:
        logger.warning("%s: left out for an empty transcript: %s", folder, few(empty))
    left_out |= dict.fromkeys(empty, "empty transcript") | dict.fromkeys(lost, "its recording is not in wav.scp")
    left = sorted(set(kept) - set(empty))
    if not left:
        raise ValueError(f"no utterance of {folder} is left: check that its tables use the same ids")
    utterances = (Utterance(id, speakers[id], words.get(id, ()), audio.get(id), features.get(id)) for id in left)
    return Corpus(folder.name if name is None else name, tuple(utterances), left_out)


def _sources(
    folder: Path, root: Path | None, allow_commands: bool, on_mismatch: str
) -> tuple[dict[str, Audio], dict[str, str], list[str]]:
    """The audio and the features of the utterances, each empty where the directory has none; segments of nothing."""
    wav, features = (folder / "wav.scp").is_file(), (folder / "feats.scp").is_file()
    if not wav and not features:
        raise FileNotFoundError(f"{folder} holds neither wav.scp nor feats.scp: one of them must say where the data is")
    audio, lost = (_recordings(folder, root, allow_commands) if wav else {}), list[str]()
    if wav and (folder / "segments").is_file():
        audio, lost = _segments(folder, audio, on_mismatch)
    return audio, find_features(folder, root) if features else {}, lost


def _recordings(folder: Path, root: Path | None, allow_commands: bool) -> dict[str, Audio]:
    path = folder / "wav.scp"
    entries = read_table(path, something)
    commands = [f"line {number}" for number, value in enumerate(entries.values(), 1) if value.endswith("|")]
    if commands and not allow_commands:
        raise ValueError(
            f"shell commands in {path}: {few(commands)}: they would be run when audio is read; if you trust them all, "
            "pass allow_commands=True"
        )
    relative = [value for value in entries.values() if not value.endswith("|") and not os.path.isabs(value)]
    start = find_root(folder, root, relative, path.name) if relative else folder
    return {
        id: Audio(command=value[:-1].strip()) if value.endswith("|") else Audio(path=start / value)
        for id, value in entries.items()
    }


def _segments(folder: Path, recordings: Mapping[str, Audio], on_mismatch: str) -> tuple[dict[str, Audio], list[str]]:
    """The segments, and those whose recording is not there."""
    entries = read_table(folder / "segments", _segment)
    lost = [id for id, (recording, _, _) in entries.items() if recording not in recordings]
    if lost and on_mismatch == "error":
        raise ValueError(
            f"segments of {folder} whose recording is not in wav.scp: {few(lost)}: correct the tables, or pass "
            'on_mismatch="drop" to leave them out'
        )
    if lost:
        logger.warning("%s: segments left out, their recording is not in wav.scp: %s", folder, few(lost))
    found = {
        id: replace(recordings[recording], start=start, end=end)
        for id, (recording, start, end) in entries.items()
        if recording in recordings
    }
    return found, lost


def _segment(value: str) -> tuple[str, float, float | None]:
    parts = fields(value)
    if len(parts) != 3:
        raise ValueError(f"recording, start and end expected after the id, not {value!r}")
    try:
        start, end = float(parts[1]), float(parts[2])
    except ValueError:
        raise ValueError(f"start and end must be numbers, not {value!r}") from None
    if end == -1.0 and 0.0 <= start < math.inf:  # Kaldi's sign for the end of the recording
        return parts[0], start, None
    if not 0.0 <= start < end < math.inf:
        raise ValueError(f"end must be later than start, and start at least 0, not {value!r}")
    return parts[0], start, end


def _transcripts(folder: Path, allow_missing: bool) -> dict[str, tuple[str, ...]]:
    if (folder / "text").is_file():
        return read_table(folder / "text", fields)
    if allow_missing:
        return {}
    raise FileNotFoundError(
        f"{folder} holds no text: write the transcripts there, or pass allow_missing_text=True to read it without words"
    )


def _speakers(folder: Path, ids: Iterable[str]) -> dict[str, str]:
    if (folder / "utt2spk").is_file():
        return read_table(folder / "utt2spk", one_field)
    logger.warning("%s holds no utt2spk: every utterance counts as a speaker of its own", folder)
    return {id: id for id in ids}


def _in_all(
    tables: Mapping[str, Mapping[str, object]],
    text: Mapping[str, object],
    allow_missing_text: bool,
    folder: Path,
    on_mismatch: str,
) -> tuple[list[str], dict[str, str]]:
    """The ids that stand in every table, sorted; others are an error or are left out, with the tables they lack."""
    required = dict(tables) if allow_missing_text else {**tables, "text": text}
    every = set(text).union(*tables.values())
    kept = every.intersection(*required.values())
    if kept != every:
        lacking = {table: sorted(every - set(rows)) for table, rows in required.items()}
        problems = "; ".join(f"not in {table}: {few(ids)}" for table, ids in lacking.items() if ids)
        if on_mismatch == "error":
            raise ValueError(
                f"the tables of {folder} disagree: utterances {problems}: correct the tables, or pass "
                'on_mismatch="drop" to keep only the utterances that are in all of them'
            )
        logger.warning("%s: left out %d utterances: %s", folder, len(every) - len(kept), problems)
    without = {id: [table for table, rows in required.items() if id not in rows] for id in sorted(every - kept)}
    return sorted(kept), {id: f"not in {' nor '.join(tables)}" for id, tables in without.items()}


def write_data_dir(corpus: Corpus, path: str | os.PathLike[str]) -> None:
    """Writes ``corpus`` as the Kaldi data directory ``path``, which must not exist or be empty; all of it or nothing.

    Utterances without words get no line in ``text``; audio that is a part of a file needs ``segments``, and then every
    utterance gets one. ``read_data_dir`` gives the same utterances back.

    Raises:
        ValueError: audio at another speed than 1 (no Kaldi table can say so), audio or features of some utterances
            only, or ids, speakers and words with blanks inside.
        OSError: the folder cannot be written, or is not empty; the message names the remedy.
    """
    _check_writable(corpus)
    folder = Path(os.path.abspath(path))
    tables: dict[str, dict[str, str]] = {
        "text": {u.id: " ".join(u.words) for u in corpus if u.words},
        "utt2spk": {u.id: u.speaker for u in corpus},
        "spk2utt": {s: " ".join(u.id for u in corpus if u.speaker == s) for s in corpus.speakers},
        "feats.scp": {u.id: u.features for u in corpus if u.features is not None},
        **_audio_tables(corpus),
    }
    with new_folder(folder, exclusive=True) as temporary:
        for table, rows in tables.items():
            if rows:
                with open(temporary / table, "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(f"{id} {rows[id]}\n" for id in sorted(rows))


def _check_writable(corpus: Corpus) -> None:
    if not corpus.utterances:
        raise ValueError(f"the corpus {corpus.name} has no utterance to write")
    names = (name for u in corpus for name in (u.id, u.speaker, *u.words))
    blank = sorted({repr(name) for name in names if fields(name) != (name,) or "\n" in name or "\r" in name})
    if blank:
        raise ValueError(f"ids, speakers or words that are empty or have blanks inside: {few(blank)}: rename them")
    changed = [u.id for u in corpus if u.audio is not None and u.audio.speed != 1.0]
    if changed:
        raise ValueError(
            f"utterances at another speed: {few(changed)}: write the corpus before perturb_speed, or extract features "
            "and write those"
        )
    for what in ("audio", "features"):
        without = [u.id for u in corpus if getattr(u, what) is None]
        if 0 < len(without) < len(corpus):
            raise ValueError(f"utterances without {what}, which others have: {few(without)}: write them apart")


def _audio_tables(corpus: Corpus) -> dict[str, dict[str, str]]:
    audios = {u.id: u.audio for u in corpus if u.audio is not None}
    sources = {id: f"{a.command} |" if a.path is None else os.path.abspath(a.path) for id, a in audios.items()}
    if all(a.start == 0.0 and a.end is None for a in audios.values()):
        return {"wav.scp": sources}
    recordings: dict[str, str] = {}  # source -> the first utterance of it, whose id names the recording
    for id, source in sources.items():
        recordings.setdefault(source, id)
    return {
        "wav.scp": {id: source for source, id in recordings.items()},
        "segments": {
            id: f"{recordings[sources[id]]} {a.start!r} {-1 if a.end is None else repr(a.end)}"
            for id, a in audios.items()
        },
    }


def perturb_speed(corpus: Corpus, factors: Sequence[float] = (0.9, 1.0, 1.1)) -> Corpus:
    """The utterances of ``corpus`` at every speed of ``factors`` (Ko et al. 2015, "Audio augmentation for speech
    recognition"); speech at another speed counts as another speaker's.

    A factor of 1 keeps the utterance as it is; 0.9 gives it the id ``sp0.9-<id>`` and the speaker
    ``sp0.9-<speaker>``. Audio is resampled when it is read.

    Raises:
        ValueError: factors that repeat or are not positive, or utterances without audio.
    """
    if not factors or len(set(factors)) < len(factors) or not all(0.0 < factor < math.inf for factor in factors):
        raise ValueError(f"factors={tuple(factors)} must be positive, and each given once")
    silent = [utterance.id for utterance in corpus if utterance.audio is None]
    if silent:
        raise ValueError(f"utterances without audio, whose speed cannot change: {few(silent)}")
    return replace(corpus, utterances=tuple(_at_speed(u, factor) for factor in factors for u in corpus))


def _at_speed(utterance: Utterance, factor: float) -> Utterance:
    if factor == 1.0:
        return utterance
    assert utterance.audio is not None
    prefix = f"sp{factor:g}-"
    audio = replace(utterance.audio, speed=utterance.audio.speed * factor)
    return replace(utterance, id=prefix + utterance.id, speaker=prefix + utterance.speaker, audio=audio, features=None)
