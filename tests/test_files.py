"""Files and folders are whole or absent."""

from __future__ import annotations

import errno
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from quadric.files import Unwritable, new_file, new_folder, writing_to
from quadric.train import checkpoint
from quadric.train.metrics import MetricsLog


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with new_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_folder_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    with new_folder(tmp_path / "f") as slow:
        (slow / "who").write_text("slow")
        with new_folder(tmp_path / "f") as fast:
            (fast / "who").write_text("fast")
    assert (tmp_path / "f" / "who").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    with new_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exclusive_folder_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", exclusive=True) as temporary:
        (temporary / "who").write_text("new")
    assert (tmp_path / "empty" / "who").read_text() == "new"
    with pytest.raises(Unwritable, match="something else is already there"):
        new_folder(tmp_path / "empty", exclusive=True).__enter__()
    with (
        pytest.raises(Unwritable, match=rf"cannot write to {tmp_path}/f: something else is already there") as error,
        new_folder(tmp_path / "f", exclusive=True) as slow,
    ):
        (slow / "who").write_text("slow")
        with new_folder(tmp_path / "f") as fast:
            (fast / "who").write_text("fast")
    assert error.value.errno == errno.ENOTEMPTY
    assert (tmp_path / "f" / "who").read_text() == "fast"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "f"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = f"{platform.node()}-{int(ended.stdout)}.tmp"
    living = f".a.0.{platform.node()}-{os.getppid()}.tmp"
    elsewhere = f".a.0.elsewhere-{int(ended.stdout)}.tmp"
    for name in (living, elsewhere, f".a.0.{dead}", f".a.10.{platform.node()}-{os.getpid()}.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".b.3.{dead}").mkdir()
    (tmp_path / f".b.3.{dead}" / "inside").write_text("half")
    with new_file(tmp_path / "c") as outer, new_file(tmp_path / "c") as inner:
        assert outer.exists() and inner.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living, elsewhere, "c"])


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may exceed 1,000 bytes, not even that of the test's own output."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def too_large(path: Path) -> None:
    with new_file(path) as temporary:
        temporary.write_bytes(bytes(2000))


def too_large_inside(path: Path) -> None:
    with new_folder(path) as temporary, new_file(temporary / "deep" / "file") as file:
        file.write_bytes(bytes(2000))


def too_long_a_log(path: Path) -> None:
    log = MetricsLog(path)
    for update in range(100):
        log.append({"update": update, "loss": 0.5})


@pytest.mark.parametrize(
    "write",
    [too_large, too_large_inside, too_long_a_log, lambda path: checkpoint.save({"w": torch.zeros(1000)}, path)],
    ids=["file", "folder", "metrics", "checkpoint"],
)
def test_what_cannot_be_written_names_folder_and_remedy(tmp_path: Path, write: Callable[[Path], None]) -> None:
    match = rf"cannot write to {tmp_path}(/x)?: .*raise the limit or choose"
    with pytest.raises(Unwritable, match=match) as error, small_files():
        write(tmp_path / "x")
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.glob(".*"))


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for make in (new_file, new_folder):
        with pytest.raises(Unwritable, match=r"a part of the path is a file"), make(tmp_path / "file" / "x" / "y"):
            raise AssertionError("never reached")


def test_failures_to_read_are_left_alone(tmp_path: Path) -> None:
    for make in (new_file, new_folder):
        with pytest.raises(FileNotFoundError, match="absent") as error, make(tmp_path / "x"):
            (tmp_path / "absent").read_text()
        assert not isinstance(error.value, Unwritable)
    with pytest.raises(Unwritable, match=rf"cannot write to {tmp_path}"), writing_to(tmp_path):
        (tmp_path / "absent" / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []
