"""CIFAR-10 by a residual network or VGG16."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.method import FirstOrder
from quadric.train.task import Cifar10, TaskJob


def cifar10(
    data: Path,
    network: Literal["resnet32", "vgg16"] = "resnet32",
    preset: Literal["small", "full"] = "small",
    seed: int = 0,
) -> TaskJob:
    """CIFAR-10 by ResNet32 or VGG16 with batch normalisation: minutes on two cores, the full ones for a GPU.

    Args:
        data: folder of ``cifar10_jpeg.npz``.
        network: which.
        preset: half of ResNet32's channels (a quarter of VGG16's) and two passes, or all and 100 passes.
        seed: of everything random.
    """
    small = preset == "small"
    width = {"resnet32": 8, "vgg16": 16}[network] if small else {"resnet32": 16, "vgg16": 64}[network]
    epochs = 2 if small else 100
    return TaskJob(
        name=f"cifar10-{network}",
        task=Cifar10(data, network, width),
        first_order=FirstOrder(epochs=epochs, gradient_frames=128, lr=3e-3, weight_decay=0.1),
        block_diagonal=BlockDiagonalMethod(
            epochs=epochs, gradient_frames=128, lr=3e-3, weight_decay=0.1, statistics=10, inverses=100
        ),
        evaluations=4 if small else 50,
        seed=seed,
    )
