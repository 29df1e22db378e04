"""The images of the autoencoders of Hinton and Salakhutdinov (2006): MNIST, CURVES and FACES."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quadric.data.images import read_idx, read_orl_faces

SIDE = 28
"""Pixels of a side of MNIST's images and of CURVES'."""
PATCH = 25
"""The same of FACES'."""
SEGMENTS = 24
"""Straight pieces of a drawn curve."""
CHUNK = 64

Array = Float[np.ndarray, "..."]
Set = TypeVar("Set", bound="Images")


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        training, held_out: images as rows, [N, pixels].
        logistic: images are probabilities and outputs logistic; otherwise both are real.
    """

    training: Float[Tensor, "N D"]
    held_out: Float[Tensor, "M D"]
    logistic: bool = True

    def to(self: Set, device: torch.device) -> Set:
        """The same, with the images on ``device``."""
        return replace(self, training=self.training.to(device), held_out=self.held_out.to(device))


def mnist(folder: Path) -> Images:
    """MNIST's 60,000 training images as probabilities: the first 50,000 to train on, the others held out.

    Args:
        folder: of ``train-images-idx3-ubyte.gz``.
    """
    images = read_idx(folder / "train-images-idx3-ubyte.gz").flatten(1).float() / 255
    return Images(images[:50_000], images[50_000:])


def curves() -> Images:
    """20,000 drawn curves to train on, 10,000 others held out."""
    images = torch.from_numpy(draw_curves(control_points(30_000)))
    return Images(images[:20_000], images[20_000:])


def faces(folder: Path) -> Images:
    """Patches of the ORL faces: 40,000 of the first 30 people, 10,000 of the last 10.

    In each pixel, the mean of the training set is zero; over all pixels, its variance is one.

    Args:
        folder: of ``orl_faces.npz``.
    """
    images, person = (array.numpy() for array in read_orl_faces(folder / "orl_faces.npz"))
    seen, unseen = cut_patches(images[person <= 30], 40_000, seed=0), cut_patches(images[person > 30], 10_000, seed=1)
    mean = seen.mean(0, dtype=np.float64).astype(np.float32)
    scale = float(np.sqrt(np.square(seen - mean, dtype=np.float64).mean()))
    training, held_out = (torch.from_numpy((patches - mean) / np.float32(scale)) for patches in (seen, unseen))
    return Images(training, held_out, logistic=False)


def control_points(count: int, *, seed: int = 0) -> Float[np.ndarray, "N 3 2"]:
    """Three points for each of ``count`` curves, uniform in a square 4 pixels inside the image; (row, column), pixels.

    The first of them are the same whatever the count.
    """
    return np.random.default_rng(seed).uniform(4, SIDE - 4, (count, 3, 2)).astype(np.float32)


def draw_curves(points: Float[np.ndarray, "N 3 2"]) -> Float[np.ndarray, "N D"]:
    """Images of 28 by 28 of one smooth curve each, in [0, 1].

    The set of Hinton and Salakhutdinov is described as curves through three random points, so that six numbers make an
    image; how they were drawn is not. Here a curve is the parabola (in its parameter) that starts at the first point,
    passes the second half way and ends at the third; from `control_points` it never leaves the image. Its stroke is 2
    pixels wide, and its edges fall off linearly over one.
    """
    t = np.linspace(0, 1, SEGMENTS + 1, dtype=np.float32)
    basis = np.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)])
    paths = np.einsum("kt,nkd->ntd", basis, points)
    pixels = np.stack(np.meshgrid(*2 * [np.arange(SIDE, dtype=np.float32) + 0.5], indexing="ij"), -1).reshape(-1, 2)
    images = np.empty((len(points), SIDE**2), np.float32)
    for start in range(0, len(points), CHUNK):
        path = paths[start : start + CHUNK]
        nearest = np.full((len(path), len(pixels)), np.inf, np.float32)
        for a, b in zip(path.swapaxes(0, 1)[:-1], path.swapaxes(0, 1)[1:], strict=True):
            np.minimum(nearest, _squared_distance(pixels, a, b), out=nearest)
        images[start : start + CHUNK] = np.clip(1.5 - np.sqrt(nearest), 0, 1)
    return images


def _squared_distance(pixels: Array, a: Array, b: Array) -> Array:
    """[N, P], of the points ``pixels`` [P, 2] from the N segments from a to b, each [N, 2]."""
    along = b - a
    x, y = (pixels[:, i] - a[:, i : i + 1] for i in (0, 1))
    length = np.maximum(np.square(along).sum(1, keepdims=True), 1e-12)
    share = np.clip((x * along[:, :1] + y * along[:, 1:]) / length, 0, 1)
    return np.square(x - share * along[:, :1]) + np.square(y - share * along[:, 1:])


def cut_patches(images: UInt8[np.ndarray, "N H W"], count: int, *, seed: int) -> Float[np.ndarray, "M D"]:
    """Patches of 25 by 25, each of an image drawn at random, in [0, 1].

    After the FACES of Hinton and Salakhutdinov, but turned less (theirs by up to 90 degrees): by up to 15 degrees; one
    pixel of a patch stands for 2.4 to 3.2 of the image, the centres differ by up to 6 of these. Linear interpolation
    in the image, averaged over 3 by 3 pixels before, so that little that is finer than the patch is left.
    """
    rng = np.random.default_rng(seed)
    blurred = _blurred(images.astype(np.float32) / 255)
    chosen = rng.integers(len(images), size=count)
    angle, scale = rng.uniform(-np.pi / 12, np.pi / 12, count), rng.uniform(2.4, 3.2, count)
    centre = (np.array(images.shape[1:]) - 1) / 2 + rng.uniform(-6, 6, (count, 2))
    grid = np.arange(PATCH) - (PATCH - 1) / 2
    y, x = (axis.reshape(-1) for axis in np.meshgrid(grid, grid, indexing="ij"))
    patches = np.empty((count, PATCH**2), np.float32)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        cos, sin = scale[part, None] * np.cos(angle[part, None]), scale[part, None] * np.sin(angle[part, None])
        down, right = centre[part, :1] + cos * y - sin * x, centre[part, 1:] + sin * y + cos * x
        patches[part] = _interpolated(blurred, chosen[part, None], down, right)
    return patches


def _blurred(images: Array) -> Array:
    """The mean of each pixel and its eight neighbours; edges are repeated."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


def _interpolated(images: Array, index: Array, down: Array, right: Array) -> Array:
    """Images at real places, linear between pixels; outside, the edge is repeated."""
    height, width = images.shape[1:]
    down, right = np.clip(down, 0, height - 1.001), np.clip(right, 0, width - 1.001)
    i, j = down.astype(int), right.astype(int)
    below, beside = down - i, right - j
    upper = (1 - beside) * images[index, i, j] + beside * images[index, i, j + 1]
    lower = (1 - beside) * images[index, i + 1, j] + beside * images[index, i + 1, j + 1]
    return (1 - below) * upper + below * lower
