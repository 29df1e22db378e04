"""Readers of images in files: idx (MNIST), and the packed CIFAR-10 and ORL faces."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from quadric.data.arrays import read_arrays

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTE = 8


def read_idx(path: Path) -> UInt8[Tensor, "*shape"]:
    """The array in a file of the idx format (LeCun, with MNIST), packed by gzip or not, such as images [N, 28, 28].

    Raises:
        ValueError: it is not of unsigned bytes, or cut short.
    """
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw.startswith(_GZIP) else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): it is cut short or damaged, fetch it anew") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} is no idx file of unsigned bytes: it must start with the bytes 0, 0, 8")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[place : place + 4], "big") for place in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path} has {len(raw) - start} bytes for an array of {shape}: it is cut short, fetch it anew")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def read_cifar10(
    path: Path, split: Literal["train", "test"] = "train"
) -> tuple[UInt8[Tensor, "N 3 32 32"], Int64[Tensor, " N"]]:
    """Images and classes of CIFAR-10 from a file of JPEGs, in the order of the file: shuffle them.

    The file is an npz of ``header``, the bytes all the images start with, and for each split its ``_bytes``, what
    follows of one after the other, ``_lengths`` and ``_labels``. 50,000 images take about ten seconds.

    Raises:
        ValueError: another split, or a file without these arrays.
        ModuleNotFoundError: Pillow is not there.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; choose 'train' or 'test'")
    try:
        from PIL import Image
    except ModuleNotFoundError as missing:
        remedy = "images in JPEG need Pillow: pip install 'quadric[images]'"
        raise ModuleNotFoundError(remedy, name=missing.name) from missing
    names = [f"{split}_{part}" for part in ("bytes", "lengths", "labels")]
    header, body, lengths, labels = read_arrays(path, "header", *names)
    ends = np.cumsum(lengths, dtype=np.int64)
    images = np.empty((len(lengths), 32, 32, 3), np.uint8)
    for image, end, length in zip(images, ends, lengths.astype(np.int64), strict=True):
        whole = header.tobytes() + body[end - length : end].tobytes()
        with Image.open(io.BytesIO(whole)) as opened:
            image[:] = np.asarray(opened)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def read_orl_faces(path: Path) -> tuple[UInt8[Tensor, "N 112 92"], Int64[Tensor, " N"]]:
    """The ORL faces (Samaria and Harter, 1994) from an npz of ``images`` and ``subject``: images, and who is on them.

    Raises:
        ValueError: a file without these arrays.
    """
    images, subject = read_arrays(path, "images", "subject")
    return torch.from_numpy(images), torch.from_numpy(subject.astype(np.int64))
