from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quadric.data.graphs import read_planetoid


def written(folder: Path) -> Path:
    """Four nodes of five features, of which the third has none and no label."""
    dense = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 2]], np.float32)
    rows, columns = np.nonzero(dense)
    np.savez(
        folder / "graph.npz",
        edges=np.array([[0, 1], [1, 3]], np.int32),
        indptr=np.concatenate([[0], np.cumsum((dense != 0).sum(1))]).astype(np.int32),
        indices=columns.astype(np.int16),
        values=dense[rows, columns],
        shape=np.array(dense.shape),
        labels=np.array([2, 0, -1, 1], np.int8),
        train_idx=np.array([0], np.int32),
        val_idx=np.array([1], np.int32),
        test_idx=np.array([3], np.int32),
    )
    return folder / "graph.npz"


def test_a_graph_comes_back(tmp_path: Path) -> None:
    graph = read_planetoid(written(tmp_path))
    wanted = [[0, 0.5, 0, 0.5, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0.25, 0.25, 0.5]]
    assert graph.features.tolist() == wanted and graph.features.dtype == torch.float32
    assert graph.edges.tolist() == [[0, 1], [1, 3]] and graph.edges.dtype == torch.int64
    assert graph.classes == 3
    assert (graph.training.tolist(), graph.validation.tolist(), graph.test.tolist()) == ([0], [1], [3])
    assert graph.labels_of(graph.training).tolist() == [2, -1, -1, -1]
    assert graph.labels.tolist() == [2, 0, -1, 1]  # unharmed
    assert graph.to(torch.device("meta")).features.device.type == "meta"


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "graph.npz", edges=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="has no indptr, indices"):
        read_planetoid(tmp_path / "graph.npz")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes", "training"),
    [("cora", 2708, 5278, 1433, 7, 140), ("citeseer", 3327, 4552, 3703, 6, 120)],
)
def test_the_citation_networks(
    name: str, nodes: int, edges: int, features: int, classes: int, training: int, shared_data: Path
) -> None:
    graph = read_planetoid(shared_data / "planetoid" / f"{name}.npz")
    assert graph.features.shape == (nodes, features) and len(graph.edges) == edges and graph.classes == classes
    assert [len(part) for part in (graph.training, graph.validation, graph.test)] == [training, 500, 1000]
    assert graph.labels[graph.training].bincount().tolist() == [20] * classes
    total = graph.features.sum(1)
    assert bool((total.isclose(torch.ones(())) | (total == 0)).all()) and int((total == 0).sum()) < 20
