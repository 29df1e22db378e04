"""Kaldi's archives of lattices, read and written: text and binary, plain and compact, listed in scp files or not.

A plain lattice (``Lattice``) has an arc for every transition-id and epsilon arcs; a compact one (``CompactLattice``) an
arc for every word with a string of transition-ids. Both become a :class:`KaldiLattice`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from quadric.files import new_file
from quadric.speech.kaldi_forms import MAGIC, read_binary, read_text, to_binary, to_text
from quadric.speech.kaldi_lattice import KaldiLattice, expand, factor, plain
from quadric.speech.kaldi_stream import Ends, Kind, Stream, read_entries

_LATTICES = Kind("lattice", "lattices", "lattice-copy")


def read_archive(
    path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, KaldiLattice]]:
    """The lattices of a Kaldi archive with their ids, read as the work goes.

    Args:
        path: an archive, or, where its name ends in ``.scp``, a table of lattices ``archive:offset``. A file may be
            packed by gzip (``lat.1.gz``). Text and binary, plain and compact lattices are told apart by themselves.
        root: the folder that relative paths of a table start from; by default the first of the table's folder and its
            two ancestors that holds one of them.

    Raises:
        FileNotFoundError: there is no such file, or an archive that the table names is missing.
        ValueError: the file ends within a lattice, or holds something else; with the utterance and the byte.
    """
    yield from read_entries(path, _read_one, _LATTICES, root)


def _read_one(stream: Stream) -> KaldiLattice:
    if stream.buffer[stream.at] == MAGIC[0]:
        return expand(read_binary(stream))
    line = stream.line()
    if line is None:
        raise Ends
    if line.strip():
        raise ValueError("neither a line of its own nor OpenFst's number begins it")
    return expand(read_text(stream))


def write_archive(
    path: str | os.PathLike[str],
    lattices: Iterable[tuple[str, KaldiLattice]],
    *,
    compact: bool = True,
    text: bool = False,
    scp: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a Kaldi archive that ``lattice-copy`` and the others open; the file appears whole or not at all.

    Args:
        lattices: ids and lattices, in the order of the archive; Kaldi expects the ids sorted.
        compact: whether arcs are written with strings of transition-ids (``CompactLattice``, what most of Kaldi's
            tools pass on) or one for each (``Lattice``).
        text: whether in text; costs are written in float32 either way.
        scp: a table to write as well, which names the archive as ``path`` does.

    Raises:
        ValueError: an id that is empty or holds a blank.
    """
    places: list[str] = []
    with ExitStack() as files:
        table = files.enter_context(new_file(Path(scp))) if scp is not None else None
        file = files.enter_context(files.enter_context(new_file(Path(path))).open("wb"))
        for id, lattice in lattices:
            if not id or id.split() != [id]:
                raise ValueError(f"the id {id!r} must not be empty or hold a blank")
            file.write(f"{id} ".encode())
            places.append(f"{id} {os.fspath(path)}:{file.tell()}\n")
            given = factor(lattice) if compact else plain(lattice)
            file.write((to_text if text else to_binary)(given, compact))
        if table is not None:
            table.write_text("".join(places), encoding="utf-8", newline="\n")
