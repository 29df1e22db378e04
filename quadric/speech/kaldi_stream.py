"""Archives read in order, a part of them in memory: entries behind their ids, or where a table says they are."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from quadric.speech.tables import few, find_root, read_table, something

T = TypeVar("T")

_CHUNK = 1 << 18
_LONGEST_ID = 10_000
_ID = re.compile(rb"\S+(?=\s)")


class Ends(Exception):
    """The file ends within an entry."""


class Kind(NamedTuple):
    """What an archive holds, and Kaldi's tool that copies it; for error messages."""

    one: str
    many: str
    tool: str


def read_entries(
    path: str | os.PathLike[str], read: Callable[[Stream], T], kind: Kind, root: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, T]]:
    """The entries of an archive with their ids, read as the work goes.

    Args:
        path: an archive, or, where its name ends in ``.scp``, a table of entries ``archive:offset``. A file may be
            packed by gzip.
        read: takes the entry from the place behind the id and the blank, and raises :class:`Ends` or ``ValueError``.
        root: the folder that relative paths of a table start from; by default the first of the table's folder and its
            two ancestors that holds one of them.

    Raises:
        FileNotFoundError: there is no such file, or an archive that the table names is missing.
        ValueError: the file ends within an entry, or holds something else; with the utterance and the byte.
    """
    path = Path(path)
    if path.suffix == ".scp":
        for id, file, offset in _places(path, None if root is None else Path(root), kind):
            with open_file(file, kind) as opened:
                stream = Stream(opened, file, kind)
                stream.seek(offset)
                yield id, _read_one(stream, id, read)
        return
    with open_file(path, kind) as opened:
        stream = Stream(opened, path, kind)
        while (found := stream.id()) is not None:
            yield found, _read_one(stream, found, read)


def _places(path: Path, root: Path | None, kind: Kind) -> Iterator[tuple[str, Path, int]]:
    """Id, file and byte of every entry of a table."""
    entries = read_table(path, something)
    commands = [f"line {number}" for number, value in enumerate(entries.values(), 1) if "|" in (value[0], value[-1])]
    if commands:
        raise ValueError(f"commands in {path}: {few(commands)}: run them with {kind.tool} and name the archives here")
    places = {id: re.fullmatch(r"(.+?)(?::(\d+))?", value) for id, value in entries.items()}
    files = {id: (match[1], int(match[2] or 0)) for id, match in places.items() if match}
    relative = [file for file, _ in files.values() if not os.path.isabs(file)]
    start = find_root(path.parent, root, relative, path.name) if relative else path.parent
    for id, (name, offset) in files.items():
        yield id, start / name, offset


def _read_one(stream: Stream, id: str, read: Callable[[Stream], T]) -> T:
    """The entry at the place of ``stream``, behind the id."""
    begin, kind = stream.offset, stream.kind
    if stream.need(1) and stream.buffer[stream.at : stream.at + 1] == b" ":
        stream.at += 1
    try:
        if not stream.need(1):
            raise Ends
        return read(stream)
    except Ends:
        raise ValueError(
            f"{stream.path}: the {kind.one} of {id}, from byte {begin}: the file ends within it, at byte {stream.end}: "
            "copy the archive again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{stream.path}: the {kind.one} of {id}, from byte {begin}, is damaged: {error}") from None


def open_file(path: Path, kind: Kind) -> BinaryIO:
    """Opens a file to read it, unpacked where gzip packed it."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no archive of {kind.many} {path}") from None
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


class Stream:
    """A file read in order, of which some bytes are in memory."""

    def __init__(self, file: BinaryIO, path: Path, kind: Kind) -> None:
        self.path, self.kind, self._file = path, kind, file
        self.buffer, self.at, self._before = b"", 0, 0

    @property
    def offset(self) -> int:
        """The byte of the file, unpacked, that is read next."""
        return self._before + self.at

    @property
    def end(self) -> int:
        """The byte behind those in memory."""
        return self._before + len(self.buffer)

    def more(self) -> bool:
        """Reads on; whether there was more."""
        rest = self.buffer[self.at :]
        try:
            read = self._file.read(max(_CHUNK, len(rest)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path}: packed by gzip and damaged behind byte {self.end}: {error}") from None
        self._before += self.at
        self.buffer, self.at = rest + read, 0
        return bool(read)

    def need(self, count: int) -> bool:
        """Brings ``count`` bytes into memory; whether there are as many."""
        while len(self.buffer) - self.at < count:
            if not self.more():
                return False
        return True

    def line(self) -> bytes | None:
        """The next line without its end; None where the file ends before the line does."""
        while (end := self.buffer.find(b"\n", self.at)) < 0:
            if not self.more():
                return None
        taken = self.buffer[self.at : end]
        self.at = end + 1
        return taken

    def id(self) -> str | None:
        """The id in front of an entry; None at the end of the file."""
        while self.need(1) and self.buffer[self.at : self.at + 1].isspace():
            self.at += 1
        if not self.need(1):
            return None
        begin = self.offset
        while not (match := _ID.match(self.buffer, self.at)) and len(self.buffer) - self.at < _LONGEST_ID:
            if not self.more():
                break
        try:
            if match is None:
                raise ValueError
            self.at = match.end()
            return match[0].decode("utf-8")
        except ValueError:
            raise ValueError(
                f"{self.path}: no utterance id at byte {begin}: this is no archive of {self.kind.many}, or a "
                "damaged one"
            ) from None

    def seek(self, offset: int) -> None:
        """Goes to a byte of the file, unpacked."""
        self._file.seek(offset)
        self.buffer, self.at, self._before = b"", 0, offset
