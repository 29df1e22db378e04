"""Graphs whose nodes have features and classes: citation networks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from quadric.data.arrays import read_arrays

UNKNOWN = -1  # what quadric.loss.loss does not count; it lies on this floor and cannot be imported
"""The class of a node that has none."""


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph, and which of its nodes are for what.

    Attributes:
        edges: each once, no loops.
        features, labels: of the nodes; a label of -1 is not known.
        training, validation, test: nodes.
    """

    edges: Int64[Tensor, "E 2"]
    features: Float[Tensor, "N D"]
    labels: Int64[Tensor, " N"]
    training: Int64[Tensor, " a"]
    validation: Int64[Tensor, " b"]
    test: Int64[Tensor, " c"]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def labels_of(self, nodes: Int64[Tensor, " a"]) -> Int64[Tensor, " N"]:
        """The labels, but of these nodes alone: the others' are -1."""
        kept = torch.full_like(self.labels, UNKNOWN)
        kept[nodes] = self.labels[nodes]
        return kept

    def to(self, device: torch.device) -> Graph:
        """The same on ``device``."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def read_planetoid(path: Path) -> Graph:
    """Cora or Citeseer with the split of Yang, Cohen and Salakhutdinov (2016), from an npz.

    Features are scaled to a sum of one for each node, as Kipf and Welling (2017) do; where a node has none they stay
    zero. The file has ``edges``, the features in compressed rows, ``indptr``, ``indices``, ``values`` and ``shape``,
    ``labels``, and ``train_idx``, ``val_idx`` and ``test_idx``.

    Raises:
        ValueError: a file without these arrays.
    """
    edges, starts, columns, values, shape, labels, *nodes = read_arrays(
        path, "edges", "indptr", "indices", "values", "shape", "labels", "train_idx", "val_idx", "test_idx"
    )
    features = np.zeros(shape, np.float32)
    features[np.repeat(np.arange(len(features)), np.diff(starts)), columns.astype(np.int64)] = values
    total = features.sum(1, keepdims=True)
    features /= np.where(total == 0, 1, total)
    whole = [torch.from_numpy(array.astype(np.int64)) for array in (edges, labels, *nodes)]
    return Graph(whole[0], torch.from_numpy(features), *whole[1:])
