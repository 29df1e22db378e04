"""Checkpoints are whole or absent, and only data."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from quadric.train import checkpoint


def test_round_trip(tmp_path: Path) -> None:
    state = {"x": torch.randn(3), "n": 5, "list": [1.5, "a", None]}
    checkpoint.save(state, tmp_path / "a" / "s.pt")
    loaded = checkpoint.load(tmp_path / "a" / "s.pt")
    assert torch.equal(loaded.pop("x"), state.pop("x"))
    assert loaded == state


def test_a_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint.save({"n": 1}, tmp_path / "s.pt")
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save({"n": lambda: 0}, tmp_path / "s.pt")
    assert checkpoint.load(tmp_path / "s.pt") == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s.pt"]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        checkpoint.load(tmp_path / "nothing.pt")
    whole = tmp_path / "whole.pt"
    checkpoint.save({"x": torch.zeros(1000)}, whole)
    (tmp_path / "torn.pt").write_bytes(whole.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"torn\.pt"):
        checkpoint.load(tmp_path / "torn.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_text_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("edited by hand")
    with pytest.raises(ValueError, match=r"text\.pt is not a checkpoint"):
        checkpoint.load(tmp_path / "text.pt")
