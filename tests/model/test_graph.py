from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from quadric.model.graph import GCN, normalised_adjacency
from quadric.optim.layers import Kind, find_layers
from reference import networks

EDGES = [(0, 1), (1, 2), (0, 3), (3, 4)]
NODES = 6


def small(dropout: float = 0.5) -> tuple[GCN, Tensor]:
    A = normalised_adjacency(torch.tensor(EDGES), NODES, dtype=torch.float64)
    return GCN(A, 5, 3, hidden=4, dropout=dropout).double(), torch.randn(NODES, 5, dtype=torch.float64)


@given(nodes=st.integers(1, 7), edges=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_the_adjacency_is_that_of_the_definition(nodes: int, edges: list[tuple[int, int]]) -> None:
    edges = [(i, j) for i, j in edges if max(i, j) < nodes]
    given_ = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2)
    A = normalised_adjacency(given_, nodes, dtype=torch.float64)
    torch.testing.assert_close(A.to_dense(), networks.adjacency(edges, nodes))
    assert A.is_coalesced() and torch.equal(A.indices(), A.clone().coalesce().indices())


def test_equals_the_products_of_whole_matrices() -> None:
    model, x = small()
    A = networks.adjacency(EDGES, NODES)
    torch.testing.assert_close(model.eval()(x), networks.graph_convolutions(model, A, x))


def test_gradients() -> None:
    model, x = small(dropout=0.0)
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in model.named_parameters()), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *weights: functional_call(model, dict(zip(names, weights, strict=True)), (x,)),
        (x.requires_grad_(), *values),
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_low_precision_is_near_and_its_gradients_too(sparse: bool) -> None:
    model, x = small(dropout=0.0)
    model, x = model.float(), x.float()
    grads = []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            output = model(x.to_sparse() if sparse else x)
        assert output.dtype == torch.float32
        output.square().sum().backward()
        grads.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for exact, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
    assert len(grads[0]) == 3 and not torch.equal(grads[0][0], grads[1][0])


def test_dropout_is_of_both_layers_inputs() -> None:
    model, _ = small(dropout=0.9)
    x = torch.ones(NODES, 5, dtype=torch.float64)
    seen: list[Tensor] = []
    for layer in (model.first, model.second):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    model.train()(x)
    first, second = seen
    assert first.unique().tolist() == pytest.approx([0.0, 10.0])
    assert (first == 0).double().mean() > 0.6 and (second == 0).double().mean() > 0.6
    seen.clear()
    model.eval()(x)
    assert bool((seen[0] == 1).all())


def test_sparse_features_are_the_same_to_the_model() -> None:
    model, x = small()
    x = torch.where(x > 0, x, 0.0)
    torch.testing.assert_close(model.eval()(x.to_sparse()), model(x))
    seen: list[Tensor] = []
    model.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.train()
    for _ in range(2000):
        model(x.to_sparse())
    dropped = torch.stack(seen)
    assert bool(((dropped == 0) | dropped.isclose(2 * x)).all())
    torch.testing.assert_close((dropped != 0).double().mean(0), 0.5 * (x != 0).double(), rtol=0, atol=0.05)


def test_cora_has_the_parameters_of_the_paper() -> None:
    """1,433 features, 16 hidden units and 7 classes."""
    model = GCN(normalised_adjacency(torch.zeros(0, 2, dtype=torch.int64), 1), 1433, 7)
    assert sum(p.numel() for p in model.parameters()) == 16 * (1433 + 7)
    bound = (6 / (1433 + 16)) ** 0.5
    assert 0.99 * bound < float(model.first.weight.detach().max()) <= bound


def test_the_family_sees_matrices_and_checkpoints_leave_the_graph_out() -> None:
    model, x = small()
    layers = find_layers(model, model.parameters())
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("first.weight", Kind.MATRIX),
        ("second.weight", Kind.MATRIX),
    ]
    assert set(model.state_dict()) == {"first.weight", "second.weight"}
    torch.testing.assert_close(copy.deepcopy(model).eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("edges", "nodes", "message"),
    [
        (torch.zeros(3, 2), 4, "whole numbers"),
        (torch.zeros(2, 3, dtype=torch.int64), 4, r"\(2, 3\)"),
        (torch.tensor([[0, 4]]), 4, "0 to 3"),
        (torch.tensor([[-1, 2]]), 4, "-1 to 2"),
    ],
)
def test_a_wrong_graph_is_named(edges: Tensor, nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalised_adjacency(edges, nodes)


def test_misuse_is_named() -> None:
    A = normalised_adjacency(torch.tensor(EDGES), NODES)
    with pytest.raises(ValueError, match="dropout is 1"):
        GCN(A, 5, 3, dropout=1.0)
    with pytest.raises(ValueError, match="hidden 0"):
        GCN(A, 5, 3, hidden=0)
    with pytest.raises(ValueError, match="sparse"):
        GCN(A.to_dense(), 5, 3)
    with pytest.raises(ValueError, match=r"features has shape \(5, 6\).*\(6, 5\)"):
        GCN(A, 5, 3)(torch.zeros(5, 6))
