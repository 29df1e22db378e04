"""Archives read in order, a part of them in memory."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 18
_LONGEST_ID = 10_000
_ID = re.compile(rb"\S+(?=\s)")


class Ends(Exception):
    """The file ends within an entry."""


def open_file(path: Path) -> BinaryIO:
    """Opens a file to read it, unpacked where gzip packed it."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no archive of lattices {path}") from None
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


class Stream:
    """A file read in order, of which some bytes are in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path, self._file = path, file
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
                f"{self.path}: no utterance id at byte {begin}: this is no archive of lattices, or a damaged one"
            ) from None

    def seek(self, offset: int) -> None:
        """Goes to a byte of the file, unpacked."""
        self._file.seek(offset)
        self.buffer, self.at, self._before = b"", 0, offset
