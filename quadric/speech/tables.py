"""Text files of lines, and Kaldi's tables: one line per entry, an id, a blank, and the value; every id once."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_BLANK = " \t\r"
_FEW = 5


def few(names: Collection[str], limit: int = _FEW) -> str:
    """The number of ``names`` and the first of them, for an error message.

    >>> few(["a", "b"]), few("abcdefg")
    ('2 (a, b)', '7 (a, b, c, d, e, ...)')
    """
    shown = list(names)[:limit]
    return f"{len(names)} ({', '.join(shown)}{', ...' if len(names) > limit else ''})"


def fields(value: str) -> tuple[str, ...]:
    """The parts of ``value`` between blanks and tabs; other Unicode spaces belong to the words."""
    return tuple(part for part in re.split(r"[ \t]+", value.strip(_BLANK)) if part)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends; a byte order mark in front is read away.

    Lines end at a line feed alone: what else Unicode or Python take for an end of line belongs to the line.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming the line that is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield line.decode("utf-8").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 ({error.reason}): convert the file, for example with "
                    "`iconv -f latin1 -t utf-8`"
                ) from None


def read_table(path: Path, parse: Callable[[str], T]) -> dict[str, T]:
    """Reads the table ``path`` in the order of its lines: entry number i stands on line i + 1.

    ``parse`` turns the rest of a line into its value and raises ``ValueError`` with the reason if it is malformed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: text that is not UTF-8, malformed lines or repeated ids; all of one kind at once.
    """
    try:
        lines = list(read_lines(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no table {path}") from None
    table: dict[str, T] = {}
    malformed, repeated = [], []
    for number, line in enumerate(lines, 1):
        parts = re.split(r"[ \t]+", line.strip(_BLANK), maxsplit=1)
        try:
            if not parts[0]:
                raise ValueError("blank")
            value = parse(parts[1] if len(parts) == 2 else "")
        except ValueError as error:
            malformed.append(f"line {number}: {error}")
            continue
        if parts[0] in table:
            repeated.append(f"{parts[0]} on line {number}")
        table[parts[0]] = value
    if malformed:
        raise ValueError(f"malformed lines in {path}: {few(malformed)}: correct them")
    if repeated:
        raise ValueError(f"repeated ids in {path}: {few(repeated)}: keep one line of each")
    if not table:
        raise ValueError(f"the table {path} is empty")
    return table


def something(value: str) -> str:
    """Parses a value that is one text, blanks inside included."""
    if not value:
        raise ValueError("nothing after the id")
    return value


def one_field(value: str) -> str:
    """Parses a value that is one word."""
    if len(fields(value)) != 1:
        raise ValueError(f"one field expected after the id, not {value!r}")
    return value


def find_root(folder: Path, root: Path | None, files: Sequence[str], table: str) -> Path:
    """The folder that the relative paths ``files`` of a table in ``folder`` start from.

    It is ``root`` if given, else the first of ``folder`` and its two ancestors under which any of them exists: one
    missing file does not hide the others.

    Raises:
        FileNotFoundError: none of ``files`` is under any of them.
    """
    candidates = [Path(os.path.abspath(root))] if root is not None else [folder, *list(folder.parents)[:2]]
    for candidate in candidates:
        if any((candidate / file).is_file() for file in files):
            return candidate
    what = "audio" if table == "wav.scp" else "archive"
    raise FileNotFoundError(
        f"{files[0]}, the first relative path of {folder / table}, is not in {' nor in '.join(map(str, candidates))}, "
        f"nor is any of the {len(files) - 1} others: the {what} is missing, or lies in another folder; bring it "
        "there, or pass root=PATH with that folder"
    )


def find_features(folder: Path, root: Path | None) -> dict[str, str]:
    """Reads a folder's ``feats.scp``: utterance id -> ``/absolute/path.ark:offset``, ranges like ``[0:9]`` kept.

    Raises:
        FileNotFoundError: there is no such table, or the first archive that it names is missing.
        ValueError: malformed lines, repeated ids, or entries that are commands.
    """
    table = folder / "feats.scp"
    entries = read_table(table, something)
    commands = [f"line {number}" for number, value in enumerate(entries.values(), 1) if "|" in (value[0], value[-1])]
    if commands:
        raise ValueError(f"commands in {table}: {few(commands)}: run them with copy-feats and name the archives here")
    relative = [value for value in entries.values() if not os.path.isabs(value)]
    if not relative:
        return entries
    start = find_root(folder, root, [re.sub(r"(:\d+)?(\[[^\]]*\])?$", "", value) for value in relative], table.name)
    return {name: value if os.path.isabs(value) else str(start / value) for name, value in entries.items()}
