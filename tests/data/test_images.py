from __future__ import annotations

import gzip
import io
import sys
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pytest
import torch

from quadric.data.arrays import read_arrays
from quadric.data.images import read_cifar10, read_idx, read_orl_faces


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2), (0, 3)])
def test_idx_comes_back(shape: tuple[int, ...], packed: bool, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    (tmp_path / "a").write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = read_idx(tmp_path / "a")
    np.testing.assert_array_equal(read.numpy(), array)
    assert read.dtype == torch.uint8
    read += 1  # it is one's own


def test_damaged_idx_is_named(tmp_path: Path) -> None:
    path, whole = tmp_path / "a", idx(np.ones((3, 2), np.uint8))
    for raw, message in [
        (whole[:-1], r"5 bytes for an array of \[3, 2\]"),
        (whole + b"x", "7 bytes"),
        (b"\0\0\x0d\1" + whole[4:], "no idx file of unsigned bytes"),
        (b"", "no idx file"),
        (gzip.compress(whole)[:-9], "cannot be unpacked"),
    ]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            read_idx(path)


def packed_jpegs(folder: Path) -> tuple[Path, np.ndarray]:
    """A file in the form of the CIFAR-10 file, of five images in two splits, and what is on the first."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    files, pictures = [], []
    for seed in range(5):
        coarse = np.random.default_rng(seed).integers(256, size=(4, 4, 3)).astype(np.uint8)
        picture, file = image.fromarray(coarse).resize((32, 32)), io.BytesIO()
        picture.save(file, "JPEG", quality=75)
        files.append(file.getvalue())
        pictures.append(np.asarray(picture))
    header = commonprefix(files)  # noqa: RUF071, of bytes
    arrays = {"header": np.frombuffer(header, np.uint8)}
    for split, part in (("train", files[:3]), ("test", files[3:])):
        rest = [file[len(header) :] for file in part]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(rest), np.uint8)
        arrays[f"{split}_lengths"] = np.array([len(file) for file in rest], np.uint16)
        arrays[f"{split}_labels"] = np.arange(len(part), dtype=np.uint8)
    np.savez(folder / "images.npz", **arrays)
    return folder / "images.npz", np.stack(pictures)


def test_images_are_unpacked_in_order(tmp_path: Path) -> None:
    path, pictures = packed_jpegs(tmp_path)
    for split, part in (("train", pictures[:3]), ("test", pictures[3:])):
        images, labels = read_cifar10(path, split)  # type: ignore[arg-type]
        assert images.dtype == torch.uint8 and images.shape == (len(part), 3, 32, 32)
        error = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - part)
        assert error.mean() < 8 < np.abs(np.roll(part, 1, 0).astype(int) - part).mean()
        assert labels.tolist() == list(range(len(part)))
    with pytest.raises(ValueError, match="split is 'dev'"):
        read_cifar10(path, "dev")  # type: ignore[arg-type]


def test_without_pillow_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"images in JPEG need Pillow: pip install 'quadric\[images\]'"):
        read_cifar10(tmp_path / "images.npz")


def test_a_wrong_file_of_arrays_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 112, 92), np.uint8))
    with pytest.raises(ValueError, match="has no subject, but images"):
        read_orl_faces(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"b\.npz is no npz file"):
        read_arrays(tmp_path / "b.npz", "x")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "c.npz", "x")


@pytest.mark.data
def test_the_images_of_the_shared_corpora(shared_data: Path) -> None:
    pixels = read_idx(shared_data / "mnist" / "train-images-idx3-ubyte.gz")
    digits = read_idx(shared_data / "mnist" / "train-labels-idx1-ubyte.gz")
    assert pixels.shape == (60_000, 28, 28)
    assert digits.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    faces, people = read_orl_faces(shared_data / "orl_faces" / "orl_faces.npz")
    assert faces.shape == (400, 112, 92) and people.bincount().tolist() == [0, *[10] * 40]
    pytest.importorskip("PIL", reason="needs Pillow")
    images, labels = read_cifar10(shared_data / "cifar10" / "cifar10_jpeg.npz", "test")
    assert images.shape == (10_000, 3, 32, 32) and labels.bincount().tolist() == [1000] * 10
    torch.testing.assert_close(
        images.double().mean((0, 2, 3)), torch.tensor([126.0, 123.6, 114.6]).double(), rtol=0.01, atol=0
    )
