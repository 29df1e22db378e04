"""Parts of a model: whole layers that follow one another, each parameter in one of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quadric.parallel.partition import hollow, partition
from quadric.space import ParameterSpace


class Scaled(nn.Module):
    """Parameters of its own, and children."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())


class Attention(nn.Module):
    """Names that containers of torch have methods of."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.items = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 1)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Nested layers of all sizes, some frozen in part or as a whole, some tied."""

    def module(depth: int) -> nn.Module:
        kind = draw(st.sampled_from(["linear", "linear", "bare", "scaled", "nested"] if depth else ["linear", "bare"]))
        if kind == "bare":
            return nn.ReLU()
        if kind == "scaled":
            return Scaled(draw(st.integers(1, 3)))
        if kind == "nested":
            return nn.Sequential(*(module(depth - 1) for _ in range(draw(st.integers(0, 3)))))
        return nn.Linear(draw(st.integers(1, 12)), draw(st.integers(1, 12)))

    model = nn.Sequential(*(module(2) for _ in range(draw(st.integers(1, 8)))))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for layer in linear:
        layer.weight.requires_grad_(draw(st.integers(0, 4)) > 0)
        layer.bias.requires_grad_(draw(st.integers(0, 4)) > 0)
    if len(linear) > 1 and draw(st.booleans()):
        first, second = draw(st.tuples(*[st.sampled_from(linear)] * 2))
        second.weight = first.weight
    return model


def trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def layers(model: nn.Module) -> int:
    """The most parts there can be."""
    if not trainable(model):
        return 0
    with pytest.raises(ValueError, match="give a number from 1 to") as refused:
        partition(model, 10**6)
    return int(str(refused.value).split()[-1])


@given(models(), st.data())
def test_parts_are_slices_of_the_parameter_vector(model: nn.Module, data: st.DataObject) -> None:
    most = layers(model)
    if not most:
        return
    shards = data.draw(st.integers(1, most))
    parts = partition(model, shards)
    spaces = [ParameterSpace(part) for part in parts]
    whole = ParameterSpace(model)
    assert len(parts) == shards and all(space.size for space in spaces)
    assert [id(p) for space in spaces for p in space.parameters] == [id(p) for p in whole.parameters]
    assert [name for space in spaces for name in space.names] == list(whole.names)
    assert torch.equal(torch.cat([space.point() for space in spaces]), whole.point())


@given(models(), st.data())
def test_parts_are_balanced_and_layers_whole(model: nn.Module, data: st.DataObject) -> None:
    most = layers(model)
    if not most:
        return
    finest = [ParameterSpace(part).size for part in partition(model, most)]
    shards = data.draw(st.integers(1, most))
    parts = partition(model, shards)
    sizes = [ParameterSpace(part).size for part in parts]
    assert max(sizes) <= sum(sizes) / shards + max(finest)
    for module in model.modules():
        if trainable(module) and any(p.requires_grad for p in module.parameters(recurse=False)):
            holders = [part for part in parts if any(module is m for m in part.modules())]
            assert len(holders) == 1


def test_equal_layers_are_dealt_out_equally() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    assert [ParameterSpace(part).size for part in partition(model, 4)] == [36] * 4


def test_one_large_layer_leaves_the_others_to_the_other_parts() -> None:
    model = nn.Sequential(nn.Linear(100, 10), *(nn.Linear(2, 2) for _ in range(4)))
    assert [ParameterSpace(part).size for part in partition(model, 3)] == [1010, 6, 18]
    assert [ParameterSpace(part).size for part in partition(model[1:], 4)] == [6] * 4


def test_a_module_with_parameters_and_children_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Scaled(3), nn.Linear(3, 1))
    names = [[name for name, _ in part.named_parameters()] for part in partition(model, 3)]
    assert names[1] == ["1.scale", "1.inner.0.weight", "1.inner.0.bias"]
    (part,) = partition(Scaled(2), 1)
    assert isinstance(part, Scaled)


def test_layers_that_share_a_parameter_stay_together_with_those_between() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 2), nn.Linear(2, 2))
    model[3].weight = model[1].weight
    names = [[name for name, _ in part.named_children()] for part in partition(model, 3)]
    assert names == [["0"], ["1", "2", "3"], ["4"]]
    assert layers(model) == 3


def test_one_module_in_two_places_counts_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared), nn.Linear(2, 1), nn.Sequential(shared), nn.Linear(1, 1))
    parts = partition(model, 2)
    assert [ParameterSpace(part).size for part in parts] == [9, 2]


def test_names_that_containers_have_methods_of() -> None:
    """A part cannot be a ModuleDict, which has no room for a layer ``keys``."""
    parts = partition(Attention(), 3)
    assert [[name for name, _ in part.named_children()] for part in parts] == [["keys"], ["values"], ["items"]]


def test_layers_without_entries_are_no_layers() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 2, bias=False), nn.Linear(2, 2), nn.Linear(2, 2))
    assert [ParameterSpace(part).size for part in partition(model, 2)] == [6, 6]


def test_a_part_is_the_models() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    parts = partition(model, 2)
    with torch.no_grad():
        for parameter in parts[1].parameters():
            parameter.add_(1)
    assert torch.equal(model[1].weight, before["1.weight"] + 1) and torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("shards", [0, -1, 3, 2.0, "2"])
def test_numbers_of_parts_that_cannot_be(shards: int) -> None:
    with pytest.raises(ValueError, match=rf"shards={shards}"):
        partition(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), shards)


def test_a_model_without_a_trainable_parameter() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        partition(nn.Linear(2, 2).requires_grad_(False), 1)


def test_a_hollow_copy_weighs_nothing_and_keeps_ties() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 100)).requires_grad_(True)
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    data = pickle.dumps(hollow(model))
    found = pickle.loads(data)
    assert len(data) < 10_000
    space, expected = ParameterSpace(found), ParameterSpace(model)
    assert space.names == expected.names and space.size == expected.size
    assert [p.shape for p in found.state_dict().values()] == [p.shape for p in model.state_dict().values()]
    assert not any(value.any() for value in found.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
