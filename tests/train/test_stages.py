"""Stages are made once, whole or not at all, and known by their key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from quadric.train.stages import Stages, alone_in, digest


@dataclasses.dataclass(frozen=True)
class Options:
    rate: float = 1.0
    path: Path = Path("x")


def test_a_stage_is_made_once_per_key(tmp_path: Path) -> None:
    stages, made = Stages(tmp_path), []

    def work(folder: Path) -> None:
        made.append(folder)
        (folder / "result").write_text("done")

    first = stages.make("align", Options(), by=work)
    assert stages.make("align", Options(), by=work) == first
    other = stages.make("align", Options(rate=2.0), by=work)
    assert len(made) == 2
    assert other != first
    assert (first / "result").read_text() == "done"


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.make("align", 1, by=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_keeps_what_is_in_it(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    folder = stages.folder("train", Options())
    (folder / "state").write_text("half")
    assert stages.folder("train", Options()) == folder
    assert (folder / "state").read_text() == "half"


def test_digests_tell_values_apart() -> None:
    values = [1, 1.5, "1.5", None, [1], [[1]], Options(), Options(2.0), np.arange(3), np.arange(4), float]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(np.arange(3)) == digest(np.arange(3))


def test_a_new_format_takes_no_old_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Stages(tmp_path)
    first, folder = done.make("align", 1, by=lambda folder: None), done.folder("train", 1)
    monkeypatch.setattr("quadric.train.stages._FORMAT", 0)
    assert done.make("align", 1, by=lambda folder: None) != first
    assert done.folder("train", 1) != folder


def test_one_job_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "work"),
        pytest.raises(ValueError, match=r"another job is at work there"),
        alone_in(tmp_path / "work"),
    ):
        pass
    with alone_in(tmp_path / "work"):
        pass
