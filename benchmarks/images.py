"""The images of the autoencoder benchmarks, with the networks that are trained on them.

No benchmark by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quadric.data import image_sets
from quadric.model import vision


@dataclass(frozen=True)
class Images(image_sets.Images):
    """A data set and its network.

    Attributes:
        training, held_out, logistic: the set's.
        sizes: of the encoder: pixels, hidden layers, code; the decoder mirrors them.
        narrower: what ``--narrow`` divides the hidden layers by.
    """

    sizes: tuple[int, ...] = ()
    narrower: int = 2


def _with(images: image_sets.Images, sizes: tuple[int, ...], narrower: int = 2) -> Images:
    return Images(images.training, images.held_out, images.logistic, sizes, narrower)


SETS: dict[str, Callable[[Path], Images]] = {
    "mnist": lambda folder: _with(image_sets.mnist(folder / "mnist"), vision.MNIST),
    "curves": lambda folder: _with(image_sets.curves(), vision.CURVES),
    "faces": lambda folder: _with(image_sets.faces(folder / "orl_faces"), vision.FACES, 4),
}
"""From the folder that holds ``mnist/`` and ``orl_faces/``; curves need none."""
