from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quadric.space import ParameterSpace


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5))
def test_flatten_and_split_are_inverse(shapes: list[list[int]]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    space = ParameterSpace(model)
    vector = torch.randn(space.size)
    assert torch.equal(space.flatten(space.split(vector)), vector)
    assert all(torch.equal(a, b) for a, b in zip(space.split(space.point()), space.parameters, strict=True))


def test_views_share_memory_and_the_point_does_not() -> None:
    model = nn.Linear(2, 3, bias=False)
    space = ParameterSpace(model)
    vector = space.point()
    space.views(vector)["weight"].zero_()
    assert not vector.any()
    assert model.weight.all()


def test_a_tied_parameter_counts_once() -> None:
    space = ParameterSpace(Tied())
    assert (space.size, space.names) == (9, ("first.weight",))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert ParameterSpace(model).names == ("1.weight", "1.bias")


def test_misuse_is_explained() -> None:
    with pytest.raises(ValueError, match="model=ReLU has no trainable parameter"):
        ParameterSpace(nn.ReLU())
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"model=Sequential mixes .*float32.*float64.*move it"):
        ParameterSpace(mixed)
    with pytest.raises(ValueError, match=r"vector has shape \(8,\), this space needs \(9,\)"):
        ParameterSpace(nn.Linear(2, 3)).split(torch.zeros(8))
