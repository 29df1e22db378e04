"""What every communicator owes its user, on a job of one; `tests/distributed` has several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cases import COMMUNICATORS
from quadric.comm.communicator import Communicator


@pytest.fixture(params=COMMUNICATORS, ids=lambda cls: cls.__name__)
def alone(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with COMMUNICATORS[request.param](tmp_path) as communicator:
        yield communicator


def test_one_rank_sums_to_itself(alone: Communicator) -> None:
    assert (alone.rank, alone.size, alone.bytes_sent) == (0, 1, 0)
    tensors = [torch.randn(3), torch.randn((), dtype=torch.float64), torch.randn(2, 4).T, torch.zeros(0)]
    before = [t.clone() for t in tensors]
    alone.sum_(*tensors)
    alone.sum_()
    alone.broadcast_(tensors[2])
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_one_rank_agrees_with_itself(alone: Communicator) -> None:
    for value in (1.5, float("nan"), "text", [("weight", (2, 3))], None):
        alone.agree("this", value)


def test_one_rank_is_the_first_and_hears_itself(alone: Communicator) -> None:
    done: list[int] = []
    alone.first("this", lambda: done.append(1))
    assert done == [1] and alone.gather("this", "said") == ["said"] and alone.gather("this", "") == [""]

    assert alone.first_then_all("this", lambda: 3) == 3

    def fail() -> None:
        raise KeyError("absent")

    with pytest.raises(KeyError, match="absent"):
        alone.first("this", fail)


@pytest.mark.parametrize("source", [-1, 1])
def test_a_source_that_is_no_rank_is_refused(alone: Communicator, source: int) -> None:
    with pytest.raises(ValueError, match=rf"source={source}: the ranks are 0 to 0"):
        alone.broadcast_(torch.ones(1), source)


def test_a_parameter_may_be_summed_and_broadcast(alone: Communicator) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.sum_(parameter)
    alone.broadcast_(parameter)
    assert parameter.tolist() == [1.0, 1.0] and parameter.requires_grad and parameter.grad_fn is None


def test_leaving_twice_is_leaving(alone: Communicator) -> None:
    alone.close()
    alone.close()
