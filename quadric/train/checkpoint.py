"""Checkpoints: torch archives that are whole or absent, and load without running code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from quadric.files import new_file


def save(state: dict[str, Any], path: Path) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists, dicts) to ``path``; an older file stays until then."""
    with new_file(path) as temporary:
        # Not straight to the file: torch turns a full disk into an error of its own.
        archive = io.BytesIO()
        torch.save(state, archive)
        temporary.write_bytes(archive.getbuffer())


def load(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads what `save` wrote. Only data is read: no code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such an archive.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"path={path}: no checkpoint there") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"path={path} is not a checkpoint of this program: {error}") from error
