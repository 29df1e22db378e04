"""Stages of a job: each is done once, whole or not at all, and remembered by everything it depends on.

A stage's folder is named after what it does and a digest of its key (its options and the digests of the stages
before it). Changing an option makes a new folder; changing it back finds the old one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from quadric.files import new_file, new_folder, writing_to

logger = logging.getLogger(__name__)

_FORMAT = 1  # part of every key: raise it when a stage makes something else of the same, so that old ones are not taken


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses as dicts, paths and types as strings.

    >>> plain((Path("a"), 1.5, None))
    ['a', 1.5, None]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def digest(*parts: Any) -> str:
    """Ten hexadecimal digits that name ``parts``."""
    text = json.dumps([_FORMAT, *plain(list(parts))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Held(ValueError):
    """Another process is at work in a folder, whose files, the log among them, are its own."""


@contextmanager
def alone_in(work: Path, argument: str = "work") -> Iterator[None]:
    """Holds the working folder: two jobs at once would write into each other's files.

    Raises:
        Unwritable: the folder cannot be made or written.
        Held: another process holds it; the message names it as ``argument``.
    """
    with writing_to(work):
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Held(f"{argument}={work}: another job is at work there; wait for it, or use another folder") from None
        yield


@contextmanager
def reading(folder: Path, by: str = "`quadric train`") -> Iterator[None]:
    """Turns whatever goes wrong in reading what a stage has written into a sentence with the remedy, to run ``by``.

    Raises:
        ValueError: the folder is damaged.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError, RuntimeError) as error:
        what = f"no {error} in it" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} is damaged ({what}): delete it, and the same {by} makes it again") from error


class Stages:
    """The stages of one working folder."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def folder(self, name: str, *key: Any) -> Path:
        """The folder of a stage that keeps its own half-way state, such as training. ``key.json`` tells its key."""
        folder = self.work / f"{name}-{digest(*key)}"
        if not folder.exists():
            with new_folder(folder) as temporary:
                _write_key(temporary, key)
        return folder

    def make(self, name: str, *key: Any, by: Callable[[Path], None]) -> Path:
        """The folder of a stage, made by ``by(folder)`` unless it is there already."""
        folder = self.work / f"{name}-{digest(*key)}"
        if folder.exists():
            logger.info("%s: already in %s", name, folder)
        else:
            with new_folder(folder) as temporary:
                _write_key(temporary, key)
                by(temporary)
        return folder


def _write_key(folder: Path, key: Any) -> None:
    write_json(folder / "key.json", plain(list(key)))


def write_json(file: Path, value: object) -> None:
    """Writes ``value`` whole, or not at all."""
    with new_file(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def point(link: Path, folder: Path) -> None:
    """Makes ``link`` a relative link to ``folder``, which lies beside or below it."""
    target = folder.relative_to(link.parent)
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
