"""Kaldi's archives of integer vectors, one number a frame: alignments by transition-ids, pdfs or phones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from quadric.speech.kaldi_stream import Ends, Kind, Stream, read_entries

_ALIGNMENTS = Kind("alignment", "alignments", "copy-int-vector")
_NUMBER = np.dtype([("size", "i1"), ("value", "<i4")])


def read_alignments(
    path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, Int32[np.ndarray, " T"]]]:
    """The integer vectors of a Kaldi archive with their ids, read as the work goes: transition-ids, pdfs or phones.

    Args:
        path: an archive, in text or binary, which gzip may have packed (``ali.1.gz``), or, where its name ends in
            ``.scp``, a table of entries ``archive:offset``.
        root: the folder that relative paths of a table start from; by default the first of the table's folder and its
            two ancestors that holds one of them.

    Raises:
        FileNotFoundError: there is no such file, or an archive that the table names is missing.
        ValueError: the file ends within a vector, or holds something else; with the utterance and the byte.
    """
    yield from read_entries(path, _read_one, _ALIGNMENTS, root)


def _read_one(stream: Stream) -> Int32[np.ndarray, " T"]:
    """Kaldi's ``BasicVectorHolder<int32>``: numbers led by their size in bytes, how many they are first; or a line."""
    if stream.buffer[stream.at] == 0:
        if not stream.need(2):
            raise Ends
        if stream.buffer[stream.at + 1 : stream.at + 2] != b"B":
            raise ValueError("neither Kaldi's mark of binary numbers nor a digit begins it")
        stream.at += 2
        (count,) = _numbers(stream, 1).tolist()
        if count < 0:
            raise ValueError(f"it has {count} numbers")
        return _numbers(stream, count)
    line = stream.line()
    if line is None:
        raise Ends
    try:
        return np.array([int(word) for word in line.split()], np.int32)
    except (ValueError, OverflowError):
        raise ValueError("no integer vector: integers between blanks expected, to the end of the line") from None


def _numbers(stream: Stream, count: int) -> Int32[np.ndarray, " N"]:
    if stream.need(1) and count and stream.buffer[stream.at] != 4:
        raise ValueError("no integer vector: numbers of 4 bytes expected")
    if not stream.need(count * _NUMBER.itemsize):
        raise Ends
    rows = np.frombuffer(stream.buffer, _NUMBER, count, stream.at)
    if np.any(rows["size"] != 4):
        raise ValueError("no integer vector: numbers of 4 bytes expected")
    stream.at += rows.nbytes
    return rows["value"].astype(np.int32)
