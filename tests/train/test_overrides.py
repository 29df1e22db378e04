"""Dotted overrides: typed, checked, with suggestions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch

from quadric.train.overrides import absent_options, convert, options, override


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth={self.depth}: must not be negative")


@dataclasses.dataclass(frozen=True)
class Named:
    depth: int = 1
    width: int = 1

    @staticmethod
    def presets() -> dict[str, Named]:
        return {"deep": Named(9), "wide": Named(1, 9)}


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float = 1.0
    sizes: tuple[int, ...] = (1,)
    nested: tuple[tuple[int, ...], ...] = ()
    path: Path = Path("x")
    kind: Literal["a", "b"] = "a"
    name: str = "n"
    inner: Inner = Inner()
    named: Named = Named()
    maybe: Inner | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam


def test_values_take_the_fields_types() -> None:
    changed = override(
        Outer(),
        ["rate=1e-3", "sizes=[4, 5]", "nested=[[1],[2,3]]", "path=a/b", "kind=b", "name=12", "inner.depth=7"],
    )
    assert changed == Outer(1e-3, (4, 5), ((1,), (2, 3)), Path("a/b"), "b", "12", Inner(7))


def test_a_group_with_names_takes_one_and_then_changes() -> None:
    assert override(Outer(), ["named=deep"]).named == Named(9, 1)
    assert override(Outer(), ["named=wide", "named.depth=3"]).named == Named(3, 9)
    assert override(Outer(), ["named.depth=3", "named=wide"]).named == Named(1, 9)


def test_an_absent_group_comes_to_life_and_goes() -> None:
    alive = override(Outer(), ["maybe.depth=3"])
    assert alive.maybe == Inner(3)
    assert override(alive, ["maybe=none"]).maybe is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rate", "has no '='"),
        ("rat=1", "did you mean rate"),
        ("rate=fast", "rate=fast.*number"),
        ("sizes=3", r"sizes=3: must be a list of whole numbers, for example sizes=\[4,5\]"),
        ("kind=c", "'a' or 'b'"),
        ("inner.depht=3", "did you mean depth"),
        ("inner.depth=-1", "^inner.depth=-1: must not be negative$"),
        (
            "nested=[1]",
            r"nested=\[1\]: must be a list of lists of whole numbers, for example nested=\[\[4,5\],\[4,5\]\]",
        ),
        ("maybe=3", r"maybe=3: must be none or a group of options; set one of them, for example maybe.depth=value"),
        ("inner=3", r"a group of options.*inner.depth=value \(it has depth\)$"),
        ("named=flat", r"named=flat: a group of options.*, or all of them, named=NAME: deep, wide$"),
        ("name.first=3", "name.first"),
        ("optimizer=Sgd", "no such Optimizer; name its class, for example torch.optim.SGD"),
        ("optimizer=torch.nn.Linear", "no such Optimizer"),
    ],
)
def test_errors_name_the_option_and_the_remedy(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(Outer(), [assignment])


@dataclasses.dataclass(frozen=True)
class Span:
    low: int = 0
    high: int = 9

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"the span from {self.low} to {self.high} is empty")


def test_options_that_go_together_are_given_in_any_order() -> None:
    for given in (["low=12", "high=15"], ["high=15", "low=12"], ["low=99", "high=15", "low=12"]):
        assert override(Span(), given) == Span(12, 15)
    with pytest.raises(ValueError, match=r"^low=12, high=10: the span from 12 to 10 is empty$"):
        override(Span(), ["low=12", "high=10"])
    assert override(Outer(), ["inner.depth=7", "maybe.depth=2", "maybe=none"]) == Outer(inner=Inner(7))
    assert override(Outer(maybe=Inner(5)), ["maybe=none", "maybe.depth=2"]) == Outer(maybe=Inner(2))


@pytest.mark.parametrize("name", ["SGD", "torch.optim.SGD", "torch.optim.sgd.SGD"])
def test_a_class_is_known_by_its_name(name: str) -> None:
    assert override(Outer(), [f"optimizer={name}"]).optimizer is torch.optim.SGD


def test_options_lists_the_leaves() -> None:
    assert list(absent_options(Outer())) == [("maybe.depth", 1)]
    assert not list(absent_options(Outer(maybe=Inner())))
    listed = dict(options(Outer()))
    assert listed["inner.depth"] == 1
    assert listed["maybe"] is None
    assert "inner" not in listed
    for path, value in listed.items():  # what is listed can be said again
        if path != "optimizer" and value is not None:
            text = str(
                list(map(list, value)) if path == "nested" else list(value) if isinstance(value, tuple) else value
            )
            assert override(Outer(), [f"{path}={text}"]) == Outer()


def test_convert_reads_paths_and_numbers() -> None:
    assert convert(Path, "a/b", "data") == Path("a/b")
    assert convert(int | None, "none", "n") is None
