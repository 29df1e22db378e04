"""The log of a training run: one JSON object a line, safe against crashes, equal after a resume.

A record is flat: names to numbers, strings, truth values or nothing. JSON has no infinities and no NaN: they are
written as the strings ``"Infinity"``, ``"-Infinity"`` and ``"NaN"`` and read back as floats, so that each line is
valid JSON for every reader.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quadric.files import new_file, writing_to

Value = int | float | str | bool | None
Record = dict[str, Value]

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How floats that JSON lacks are written."""


class MetricsLog:
    """An append-only log of records in order of their ``update``.

    One process writes it. A line cut short by a crash at the end of the file is as good as never written: reading
    ignores it and the next ``append`` removes it.

    >>> import tempfile
    >>> log = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl")
    >>> log.append({"update": 1, "loss": 0.5})
    >>> log.append({"update": 2, "loss": math.inf})
    >>> log.records()
    [{'update': 1, 'loss': 0.5}, {'update': 2, 'loss': inf}]
    >>> log.truncate_after(1)
    >>> log.records()
    [{'update': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last: int | None = None

    def append(self, record: Mapping[str, object]) -> None:
        """Writes one record, and returns when it is on the disk.

        Raises:
            ValueError: if ``update`` is missing or lies before the last one written, or a value is not a number, a
                string, a truth value or ``None``.
        """
        plain = {_name(key): _plain(key, value) for key, value in record.items()}
        update = _update(plain, "record")
        if self._last is None:
            self._last = self._repair()
        if update < self._last:
            raise ValueError(
                f"update={update}: the log {self.path} already ends at update {self._last}; "
                f"to go back, call truncate_after({update}) first"
            )
        with writing_to(self.path.parent), self.path.open("ab") as file:
            file.write(_encode(plain))
            file.flush()
            os.fsync(file.fileno())
        self._last = update

    def records(self) -> list[Record]:
        """All records, in order; none where there is no file.

        Raises:
            ValueError: naming the line, where it is not a record.
        """
        return [record for _, record in self._lines()]

    def truncate_after(self, update: int) -> None:
        """Removes the records of later updates, and a line cut short. The others stay as they are to the byte."""
        self._last = None
        if self.path.exists():
            kept = b"".join(line for line, record in self._lines() if _update(record, str(self.path)) <= update)
            if len(kept) < self.path.stat().st_size:
                with new_file(self.path) as temporary:
                    temporary.write_bytes(kept)

    def _lines(self) -> list[tuple[bytes, Record]]:
        """Each whole line with its record."""
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_bytes().split(b"\n")
        return [(line + b"\n", _decode(line, f"{self.path}:{n}")) for n, line in enumerate(whole, start=1)]

    def _repair(self) -> int:
        """Removes a line cut short; returns the last update."""
        with writing_to(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(sum(len(line) for line, _ in lines))
        return max((_update(record, str(self.path)) for _, record in lines), default=-1)


def _encode(record: Record) -> bytes:
    written = {key: _non_finite_name(value) for key, value in record.items()}
    return json.dumps(written, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _decode(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object ({error}); the log is damaged, restore or remove it") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {record!r} is not a JSON object; the log is damaged, restore or remove it")
    _update(record, where)
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def _non_finite_name(value: Value) -> Value:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _plain(key: str, value: object) -> Value:
    """``value`` without numpy."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and value in NON_FINITE:
        raise ValueError(f"{key}={value!r}: this string stands for a float; pass float({value!r})")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{key}={value!r}: must be a number, a string, a truth value or None; for a tensor pass .item()")


def _name(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ValueError(f"record: the name {key!r} must be a string that is not empty")
    return key


def _update(record: Mapping[str, object], where: str) -> int:
    update = record.get("update")
    if not isinstance(update, int) or isinstance(update, bool) or update < 0:
        raise ValueError(f"{where}: update={update!r} must be a whole number of updates, 0 or more")
    return update
