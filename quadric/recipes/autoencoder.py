"""The autoencoders of Hinton and Salakhutdinov (2006): MNIST, CURVES and FACES."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.method import FirstOrder
from quadric.train.task import Autoencoding, TaskJob


def autoencoder(
    images: Literal["mnist", "curves", "faces"] = "curves",
    data: Path | None = None,
    preset: Literal["small", "full"] = "small",
    seed: int = 0,
) -> TaskJob:
    """Deep autoencoders of MNIST, of drawn curves or of faces: minutes on two cores, the full ones for a GPU.

    Args:
        images: which.
        data: MNIST's folder or that of ``orl_faces.npz``; curves need none.
        preset: hidden layers of half the authors' units (faces: a quarter) and 20 passes, or theirs and 150.
        seed: of everything random.
    """
    small = preset == "small"
    divide = {"mnist": 2, "curves": 2, "faces": 4}[images] if small else 1
    epochs = 20 if small else 150
    return TaskJob(
        name=f"autoencoder-{images}",
        task=Autoencoding(images, data, divide=divide),
        first_order=FirstOrder(epochs=epochs, gradient_frames=1000, lr=2e-3, weight_decay=0.0),
        block_diagonal=BlockDiagonalMethod(epochs=epochs, gradient_frames=1000, lr=3e-3, damping=0.02),
        seed=seed,
    )
