"""Files and folders are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from quadric.files import new_file, new_folder


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
