"""Networks of the nodes of a graph."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def normalised_adjacency(
    edges: Int64[Tensor, "E 2"], nodes: int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "N N"]:
    """D^-1/2 (A + I) D^-1/2, sparse, with the row sums D of A + I (Kipf and Welling, 2017, the trick before Eq. 8).

    Args:
        edges: of an undirected graph, each in one direction or both, once or more often; loops make no difference.
        nodes: N; nodes without an edge keep themselves.
        dtype: default: torch's.

    >>> normalised_adjacency(torch.tensor([[0, 1]]), 3).to_dense()
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])

    Raises:
        ValueError: ``edges`` is no list of pairs, or has a node that is not there.
    """
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.is_floating_point():
        raise ValueError(f"edges is {edges.dtype} of shape {tuple(edges.shape)}; give whole numbers [E, 2]")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
        raise ValueError(
            f"edges has nodes {int(edges.min())} to {int(edges.max())}; nodes={nodes} has 0 to {nodes - 1}"
        )
    loops = torch.arange(nodes, device=edges.device)
    pairs = edges.long()
    both = torch.cat([pairs, pairs.flip(1), torch.stack([loops, loops], 1)])
    row, column = both.unique(dim=0).T
    scale = torch.bincount(row, minlength=nodes).to(dtype or torch.get_default_dtype()).rsqrt()
    return torch.sparse_coo_tensor(
        torch.stack([row, column]),
        scale[row] * scale[column],
        (nodes, nodes),
        is_coalesced=True,
        check_invariants=False,
    )


class GCN(nn.Module):
    """Graph convolutions: a softmax's logits A relu(A X W0) W1 for every node (Kipf and Welling, 2017, Eq. 9).

    Weights start by Glorot's uniform distribution; there are no biases. Dropout is of what a layer takes in.

    Args:
        adjacency: A, from `normalised_adjacency`; a buffer that a checkpoint leaves out, for it is data.
        inputs: D, features of a node.
        outputs: C, classes.
        hidden: units.
        dropout: probability of dropping an input of a layer while training.

    >>> model = GCN(normalised_adjacency(torch.tensor([[0, 1], [1, 2]]), 4), 5, 3)
    >>> model(torch.zeros(4, 5)).shape
    torch.Size([4, 3])
    """

    adjacency: Tensor

    def __init__(
        self, adjacency: Float[Tensor, "N N"], inputs: int, outputs: int, *, hidden: int = 16, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if min(inputs, outputs, hidden) < 1:
            raise ValueError(f"inputs is {inputs}, outputs {outputs} and hidden {hidden}; each must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; give a probability in [0, 1)")
        if not adjacency.is_sparse or adjacency.shape[0] != adjacency.shape[1]:
            raise ValueError(f"adjacency has shape {tuple(adjacency.shape)}; give a sparse one of normalised_adjacency")
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.first = nn.Linear(inputs, hidden, bias=False)
        self.second = nn.Linear(hidden, outputs, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits of all nodes.

        Features may be sparse: dropout then draws for the entries that are there alone, which is the same to the model
        and, with words as features, many times faster.

        Raises:
            ValueError: not one row of D features for each node.
        """
        wanted = (self.adjacency.shape[0], self.first.in_features)
        if tuple(features.shape) != wanted:
            raise ValueError(f"features has shape {tuple(features.shape)}; the graph's nodes make it {wanted}")
        hidden = torch.relu(self._spread(self.first(self._dropped(features))))
        return self._spread(self.second(self.dropout(hidden)))

    def _spread(self, rows: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """A times ``rows``, in the type of A under autocast too: sparse products there are of mixed types, and fail."""
        with torch.autocast(rows.device.type, enabled=False):
            return torch.sparse.mm(self.adjacency, rows.to(self.adjacency.dtype))

    def _dropped(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Dense, after dropout."""
        if not features.is_sparse:
            return self.dropout(features)
        known = features.coalesce()
        values = self.dropout(known.values())
        return torch.sparse_coo_tensor(
            known.indices(), values, known.shape, is_coalesced=True, check_invariants=False
        ).to_dense()
