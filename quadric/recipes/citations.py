"""Papers that cite each other, by a graph convolutional network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.method import FirstOrder
from quadric.train.task import Citations, TaskJob


def citations(data: Path, graph: Literal["cora", "citeseer"] = "cora", seed: int = 0) -> TaskJob:
    """The subjects of the papers of Cora or Citeseer by a graph convolutional network: seconds.

    Args:
        data: folder of ``cora.npz`` and ``citeseer.npz``.
        graph: which.
        seed: of everything random.
    """
    return TaskJob(
        name=f"citations-{graph}",
        task=Citations(data, graph),
        first_order=FirstOrder(epochs=200, gradient_frames=1, lr=0.01, weight_decay=0.05, warmup=0.0),
        block_diagonal=BlockDiagonalMethod(
            epochs=200, gradient_frames=1, lr=0.02, weight_decay=0.5, damping=1.0, warmup=0.0
        ),
        seed=seed,
    )
