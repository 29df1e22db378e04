"""Files and folders that are either whole or absent, and write failures that say what to do.

Everything is written under a hidden temporary name beside its place, brought to disk, and renamed. A process that
dies leaves at most a temporary file, which no reader looks at and the next writer removes.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "a file would exceed the size this process may write: raise the limit or choose another folder",
    errno.EACCES: "no permission to write: choose another folder or change its permissions",
    errno.EPERM: "no permission to write: choose another folder or change its permissions",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
    errno.EEXIST: "something else is already there: choose another folder",
    errno.ENOTEMPTY: "something else is already there: choose another folder",
    errno.ENOENT: "the folder cannot be made there: choose another folder",
}


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into one of the same number that names ``folder`` and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}: choose another folder")
        raise OSError(error.errno, f"cannot write to {folder}: {remedy}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which appears under ``path`` once the block has ended well and it is on disk."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under ``path`` once the block has ended well. ``path`` must be absent or empty.

    Its files are as durable as the block makes them; the folder's name appears last.
    """
    temporary = _temporary(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files in ``folder`` that processes of this computer left behind when they died."""
    for path in folder.glob(f".*.{platform.node()}-*.tmp"):
        owner = path.name.split("-")[-1].removesuffix(".tmp")
        if owner.isdigit() and not _alive(int(owner)):
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Brings the names in ``folder`` to disk where the system can do so; not every file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
