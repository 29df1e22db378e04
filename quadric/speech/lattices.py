"""Lattices of many utterances, made on several threads and kept in a folder.

::

    STORE/key.json             what the lattices were made with
    STORE/lattices-000000.zip  lattices of some utterances, and which utterances were skipped and why

A shard appears when it is whole. A run that was ended, killed too, is gone on with by the same call.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZipFile, ZipInfo

import numpy as np
from jaxtyping import Float

from quadric.files import new_file
from quadric.lattice.codec import decode, encode
from quadric.lattice.generate import LatticeOptions, NoPath
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import Lattice
from quadric.progress import Progress, silent
from quadric.speech.backends import AnyGenerator, Backend, generator_of
from quadric.speech.tables import few
from quadric.speech.workers import in_order

logger = logging.getLogger(__name__)

_FORMAT = 1
_KEY = "key.json"
_CONTENTS = "contents.json"


class Lattices(Mapping[str, Lattice]):
    """Utterance id -> lattice, read each time it is asked for.

    Attributes:
        skipped: utterances without a lattice, and why.
        frames, arcs: of all lattices.

    Args:
        store: a folder that :func:`make_lattices` filled.
        ids: of the utterances wanted, in the order they are given out; all, as they were made, if not given.

    Raises:
        FileNotFoundError: ``store`` is no such folder.
        ValueError: a part of it is damaged or gone; now, or when it is read.
        OSError: a part of it cannot be read for another reason.
    """

    def __init__(self, store: Path, ids: Iterable[str] | None = None) -> None:
        self.store = Path(store)
        if not (self.store / _KEY).is_file():
            raise FileNotFoundError(f"store={str(store)!r}: there are no lattices")
        found: dict[str, _Entry | str] = {}
        for path in _shards(self.store):  # what was made again is in a later one
            found |= _contents(path, path).found
        kept = found if ids is None else {id: found[id] for id in ids if id in found}
        self._entries = {id: entry for id, entry in kept.items() if isinstance(entry, _Entry)}
        self.skipped = {id: reason for id, reason in kept.items() if isinstance(reason, str)}

    @property
    def frames(self) -> int:
        return sum(entry.frames for entry in self._entries.values())

    @property
    def arcs(self) -> int:
        return sum(entry.arcs for entry in self._entries.values())

    def __getitem__(self, id: str) -> Lattice:
        entry = self._entries[id]
        with _whole(entry.shard), ZipFile(entry.shard) as file:
            return decode(file.read(entry.member))

    def __contains__(self, id: object) -> bool:
        return id in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def make_lattices(
    scores: Mapping[str, Float[np.ndarray, "T C"]],
    graph: LabelledAutomaton,
    options: LatticeOptions,
    store: Path,
    *,
    made_from: Mapping[str, Any] | None = None,
    backend: Backend = "quadric",
    digests: Mapping[str, str] | None = None,
    jobs: int = 1,
    shard_size: int = 25,
    progress: Progress = silent,
) -> Lattices:
    """The lattices of all utterances, made unless they are in the store; one process at a time.

    What cannot have a lattice is skipped, with a warning: scores that are not finite, no frames or too few, no path
    within the beam. The lattices do not depend on ``jobs``.

    Args:
        scores: utterance id -> natural-log scores of frames and pdfs, scaled against the weights of the graph. Read one
            by one, from this thread, and only for utterances that are not in the store.
        graph: the paths there are.
        options: how many of them to keep.
        store: the folder to keep them in.
        made_from: what all scores depend on, such as the model's checksum and the acoustic scale, for JSON. A store
            made from something else is refused.
        backend: whose search finds the paths: :class:`~quadric.lattice.generate.Generator`, or, as ``"kaldi"``,
            :class:`~quadric.speech.kaldi_generator.KaldiGenerator`, which more threads do not make faster.
        digests: utterance id -> what else its scores depend on, such as a checksum of its features. An utterance that
            is in the store with another digest, or with none, is made again.
        jobs: threads.
        shard_size: utterances in a file, and at most lost when the process is killed; an interrupt loses none.

    Raises:
        ValueError: the store holds lattices made with something else or is another folder; scores without a column for
            every pdf of the graph; another backend.
        ImportError: ``backend`` is not installed.
        Unwritable: the store cannot be written.
        OSError: a part of the store cannot be read. It stays as it is: only what is read and found damaged is removed.
    """
    if jobs < 1 or shard_size < 1:
        raise ValueError(
            f"jobs={jobs} must be at least 1" if jobs < 1 else f"shard_size={shard_size} must be at least 1"
        )
    store, kind = Path(store), generator_of(backend)
    key = {"format": _FORMAT, **asdict(options), "backend": backend, "graph": _checksum(graph)}
    _claim(store, {**key, "made_from": dict(made_from or {})})
    done, number = _finished(store)
    digests = digests or {}
    left = [id for id in scores if id not in done or done[id] != digests.get(id)]
    make = _Maker(kind(graph, options))
    results = progress(_each(make, scores, left, jobs), total=len(left), what="lattices")
    shard: list[_Made] = []
    try:
        for made in results:
            shard.append(made)
            if len(shard) == shard_size:
                _write_shard(store, number, shard, digests)
                shard, number = [], number + 1
    finally:  # what is made is kept when the run is interrupted, too
        if shard:
            _write_shard(store, number, shard, digests)
    lattices = Lattices(store, scores)
    if lattices.skipped:
        reasons = few([f"{id}: {reason}" for id, reason in lattices.skipped.items()])
        logger.warning("of %d utterances without a lattice: %s", len(scores), reasons)
    return lattices


class _Made(NamedTuple):
    """A lattice in bytes, or the reason why there is none."""

    id: str
    content: bytes | None
    reason: str = ""
    frames: int = 0
    arcs: int = 0


@dataclass(frozen=True)
class _Maker:
    generator: AnyGenerator

    def __call__(self, id: str, scores: Float[np.ndarray, "T C"]) -> _Made:
        try:
            lattice = self.generator(scores)
        except NoPath as error:
            return _Made(id, None, str(error))
        return _Made(id, encode(lattice), "", lattice.num_frames, lattice.num_arcs)

    def unusable(self, id: str, scores: Float[np.ndarray, "T C"]) -> str:
        """Why an utterance is skipped without a search; empty if it is not."""
        least = self.generator.graph.num_pdfs
        if np.ndim(scores) != 2 or scores.shape[1] < least:
            raise ValueError(
                f"scores of {id} have shape {np.shape(scores)}: the graph needs a column for each of its {least} pdfs"
            )
        if not len(scores):
            return "no frames"
        return "" if np.isfinite(scores).all() else "scores that are not finite"


def _each(make: _Maker, scores: Mapping[str, np.ndarray], ids: list[str], jobs: int) -> Iterator[_Made]:
    """What becomes of each utterance, in order; no more scores are read than keep the threads busy."""
    with ThreadPoolExecutor(jobs) as threads:

        def futures() -> Iterator[Any]:
            for id in ids:
                found = scores[id]
                reason = make.unusable(id, found)
                yield threads.submit(_Made, id, None, reason) if reason else threads.submit(make, id, found)

        yield from in_order(futures(), jobs, "a lattice")


def _checksum(graph: LabelledAutomaton) -> str:
    digest = hashlib.sha256(str(graph.automaton.start).encode())
    arcs = graph.automaton
    for array in (arcs.source, arcs.target, arcs.pdf, arcs.weight, arcs.final, graph.word, graph.phone, graph.begins):
        digest.update(array.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- the store


class _Entry(NamedTuple):
    """Where a lattice is, and its size."""

    id: str
    shard: Path
    member: str
    frames: int
    arcs: int


class _Contents(NamedTuple):
    """Where the lattices of utterances are, or why they have none; and the digests that these were made with."""

    found: dict[str, _Entry | str]
    digests: dict[str, str]


class _Damaged(ValueError):
    """A shard that was read and does not hold what was written."""


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turns the errors of a shard that is damaged or gone into one that names it and the remedy."""
    remedy = "make the lattices again, only those in it will be"
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is gone: {remedy}") from error
    except Exception as error:  # damage shows itself in as many ways as it can be done
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in _OF_THE_CONTENT):
            raise
        raise _Damaged(f"{path} is damaged ({error}): {remedy}") from error


_OF_THE_CONTENT = (None, errno.EINVAL)
"""Numbers of the ``OSError`` that a damaged shard gives: a decoder's, which has none, and that of a place before 0."""


def _shards(store: Path) -> list[Path]:
    return sorted(store.glob("lattices-*.zip"))


def _write_shard(store: Path, number: int, shard: list[_Made], digests: Mapping[str, str]) -> None:
    entries = [[made.id, made.frames, made.arcs] for made in shard if made.content is not None]
    skipped = {made.id: made.reason for made in shard if made.content is None}
    made_of = {made.id: digests[made.id] for made in shard if made.id in digests}
    with (
        new_file(store / f"lattices-{number:06}.zip") as temporary,
        temporary.open("wb") as stream,
        ZipFile(stream, "w") as file,
    ):
        for place, content in enumerate(made.content for made in shard if made.content is not None):
            file.writestr(ZipInfo(str(place)), content)  # without the time, so that equal lattices are equal bytes
        file.writestr(ZipInfo(_CONTENTS), json.dumps({"entries": entries, "skipped": skipped, "digests": made_of}))


def _contents(path: Path, file: Path | BinaryIO) -> _Contents:
    """What is in the shard ``path``, read from ``file``."""
    with _whole(path), ZipFile(file) as opened:
        found = json.loads(opened.read(_CONTENTS))
        entries = {id: _Entry(id, path, str(place), *sizes) for place, (id, *sizes) in enumerate(found["entries"])}
        return _Contents(entries | found["skipped"], dict(found.get("digests", {})))


def _checked(path: Path) -> _Contents:
    """The same, once all of the shard is read and agrees with its checksums.

    It is read before it is looked into: a failure of the disk or the network must not be taken for damage.
    """
    content = BytesIO(path.read_bytes())
    with _whole(path), ZipFile(content) as file:
        if (part := file.testzip()) is not None:
            raise ValueError(f"checksum of part {part}")
    return _contents(path, content)


def _claim(store: Path, key: dict[str, Any]) -> None:
    """Writes the key of a new store, or raises ``ValueError`` if the store there has another one."""
    key = json.loads(json.dumps(key, sort_keys=True))
    path = store / _KEY
    if not path.is_file():
        if store.exists() and (not store.is_dir() or any(not p.name.startswith(".") for p in store.iterdir())):
            raise ValueError(f"store={str(store)!r} holds something else than lattices: name a folder of its own")
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(key, indent=1))
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove the folder and make the lattices again") from error
    apart = [f"{name}={there.get(name)}, now {key.get(name)}" for name in sorted({*there, *key})
             if there.get(name) != key.get(name)]  # fmt: skip
    if apart:
        raise ValueError(
            f"store={str(store)!r} holds lattices made with {'; '.join(apart)}: name another folder, or remove this one"
        )


def _finished(store: Path) -> tuple[dict[str, str | None], int]:
    """The utterances in the store with their digests, and the number of the next shard. What is damaged is removed."""
    done: dict[str, str | None] = {}
    number = 0
    for path in _shards(store):
        try:
            contents = _checked(path)
        except _Damaged as error:
            logger.warning("%s", error)
            path.unlink(missing_ok=True)
            continue
        done |= {id: contents.digests.get(id) for id in contents.found}
        number = max(number, int(path.stem.rpartition("-")[2]) + 1)
    return done, number
