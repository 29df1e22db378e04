"""Files and folders that are either whole or absent, and write failures that say what to do.

Everything is written under a hidden temporary name beside its place, brought to disk, and renamed: a crash, a full
disk or Ctrl-C leaves nothing half-written under a name that is ever read. A process that is killed leaves at most a
temporary, which the next writer in the same folder removes.
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "a file would exceed the size this process may write: raise the limit or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "no permission to write: choose another folder or change its permissions",
    errno.EPERM: "no permission to write: choose another folder or change its permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
    errno.EISDIR: "a folder is there, where a file should be: choose another name",
    errno.EEXIST: "something else is already there: choose another folder",
    errno.ENOTEMPTY: "something else is already there: choose another folder",
    errno.ENOENT: "the folder cannot be made there: choose another folder",
}
_ONLY_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # no reading fails with these

_numbers = itertools.count()
_in_use: set[str] = set()  # names of the temporaries of this process


class Unwritable(OSError):
    """A place that cannot be written; the message names the folder and the remedy."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file to write; it takes the place of ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        Unwritable: the file cannot be written, by this function or by the block.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with new_file(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a.txt").read_text()
    'whole'
    """
    with _temporary(path, path.parent, Path.touch) as temporary:
        yield temporary
        with writing_to(path.parent):
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)


@contextmanager
def new_folder(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; it becomes ``path`` when the block ends well, and vanishes otherwise.

    Where another process made ``path`` meanwhile, that one stays; if ``exclusive``, a ``path`` that is there and not
    an empty folder is an error instead, before the block or after it.

    Raises:
        Unwritable: the folder cannot be written, by this function or by the block.
    """
    if exclusive and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise _unwritable(path, FileExistsError(errno.EEXIST, "exists"))
    with _temporary(path, path, Path.mkdir) as temporary:
        yield temporary
        with writing_to(path):
            for inside in (*temporary.rglob("*"), temporary):
                if not inside.is_symlink():
                    _sync(inside)
            try:
                temporary.rename(path)
            except OSError as error:
                if exclusive or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            _sync(path.parent)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into one of the same number that names ``folder`` and the remedy."""
    try:
        yield
    except Unwritable:
        raise
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> Unwritable:
    hidden = [part for part in (folder, *folder.parents) if part.name.startswith(".") and part.suffix == ".tmp"]
    shown = hidden[-1].parent if hidden else folder
    remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}: choose another folder")
    return Unwritable(error.errno, f"cannot write to {shown}: {remedy}")


@contextmanager
def _temporary(path: Path, named: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Makes the temporary of ``path`` and removes it at the end, if it is still there.

    An ``OSError`` of the block that is about the temporary names ``named``; others, of what the block reads, are left
    alone.
    """
    temporary = path.with_name(f".{path.name}.{next(_numbers)}.{platform.node()}-{os.getpid()}.tmp")
    _in_use.add(temporary.name)
    try:
        with writing_to(named):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path.parent)
            make(temporary)
        yield temporary
    except OSError as error:
        if isinstance(error, Unwritable) or not _is_about(error, temporary):
            raise
        raise _unwritable(named, error) from error
    finally:
        _remove(temporary)
        _in_use.discard(temporary.name)


def _is_about(error: OSError, temporary: Path) -> bool:
    """Whether writing below ``temporary`` failed. An error of a write names no file, only its number."""
    names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
    if not names:
        return error.errno in _ONLY_WRITING
    return any(name == temporary or temporary in name.parents for name in names)


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporaries in ``folder`` that processes of this computer left behind when they died."""
    for path in folder.glob(f".*.{glob.escape(platform.node())}-*.tmp"):
        owner = path.stem.split("-")[-1]
        if owner.isdigit() and not (path.name in _in_use if int(owner) == os.getpid() else _alive(int(owner))):
            _remove(path)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to disk."""
    folder = path.is_dir()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # not every file system can do it for folders
            raise
    finally:
        os.close(handle)
