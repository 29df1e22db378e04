"""Arrays in files of numpy's npz format."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of these names; nothing in the file is run.

    Raises:
        ValueError: the file is no npz, or lacks one.
    """
    if not zipfile.is_zipfile(path):
        path.stat()
        raise ValueError(f"{path} is no npz file, or cut short: fetch it anew")
    with np.load(path, allow_pickle=False) as file:
        lacking = [name for name in names if name not in file]
        if lacking:
            raise ValueError(f"{path} has no {', '.join(lacking)}, but {', '.join(file.files)}: give another file")
        return [file[name] for name in names]
