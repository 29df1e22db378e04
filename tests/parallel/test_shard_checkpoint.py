"""A shard goes on from its checkpoint, wherever it was killed, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from quadric.parallel.exchange import NO_UNIT, Verdict
from quadric.parallel.partition import hollow
from quadric.parallel.shard import Bounds, Rule, Shard, begin
from quadric.space import ParameterSpace
from reference.served import (
    UNITS,
    adam,
    cosine,
    family,
    late_average,
    nesterov,
    part,
    push,
    shard,
    theta,
    vector,
    xu,
)

Schedule = Callable[[Optimizer], LRScheduler]


@pytest.mark.parametrize(
    ("rule", "schedule", "kind"),
    [
        (late_average, None, torch.float32),
        (late_average, cosine, torch.float64),
        (nesterov, cosine, torch.float32),
        (adam, cosine, torch.float32),
        (family, None, torch.float32),
    ],
)
def test_it_goes_on_from_its_checkpoint_to_the_bit(
    rule: Rule, schedule: Schedule | None, kind: torch.dtype, tmp_path: Path
) -> None:
    """Killed at any push, it is sent again what came after its checkpoint, and some of what came before."""
    dtype = np.float32 if kind is torch.float32 else np.float64
    options: dict[str, Any] = {"schedule": schedule}
    sent = [push(n, vector(n, dtype), unit=n % UNITS if n < UNITS else NO_UNIT) for n in range(8)]
    whole = shard(tmp_path / "whole", rule, module=part(kind), **options)
    path, averages = [theta(whole)], [whole.average()]
    for one in sent:
        whole.push(one)
        path.append(theta(whole))
        averages.append(whole.average())
    for saved, killed in [(0, 2), (3, 3), (3, 6)]:
        folder = tmp_path / f"{saved}-{killed}"
        first = shard(folder, rule, module=part(kind), **options)
        for number, one in enumerate(sent[:killed]):
            if number == saved:
                assert first.save() == saved
            first.push(one)
        if saved == killed:
            first.save()
        second = Shard(hollow(part(kind)), rule, folder=folder, **options)
        assert (second.life, second.clock) == (2, saved) and (theta(second) == path[saved]).all()
        assert int(second.applied.sum()) == min(saved, UNITS)
        for number, one in enumerate(sent):  # all of it, once more
            expected = Verdict.REPEATED if number < saved else Verdict.APPLIED
            assert second.push(one).verdict is expected
            if number >= saved:
                assert (theta(second) == path[number + 1]).all()
                assert (second.average() == averages[number + 1]).all()
        assert second.counts()["applied"] == len(sent)


def test_counts_and_the_dropped_survive(tmp_path: Path) -> None:
    server = shard(tmp_path, bounds=Bounds(not_finite=1))
    server.push(push(0, vector(0), unit=1))
    server.push(push(1, None, worker=1))
    server.push(push(2, None, worker=1))
    server.push(push(1, vector(1), unit=1))
    server.save()
    again = shard(tmp_path, bounds=Bounds(not_finite=1))
    assert again.counts() == {**server.counts(), "life": 2}
    assert again.push(push(3, vector(3), worker=1)).verdict is Verdict.DROPPED
    assert again.push(push(0, vector(0), unit=1)).verdict is Verdict.REPEATED


def test_the_rule_sees_the_parameters(tmp_path: Path) -> None:
    seen = []

    def rule(module: nn.Module) -> Optimizer:
        seen.append(ParameterSpace(module).point())
        return xu(module)

    server = shard(tmp_path, rule)
    server.push(push(0, vector(0)))
    server.save()
    shard(tmp_path, rule)
    assert torch.equal(seen[0], ParameterSpace(part()).point()) and (seen[1].numpy() == theta(server)).all()


def test_shards_of_another_training(tmp_path: Path) -> None:
    assert begin(part(), tmp_path, units=UNITS)
    assert not begin(part(), tmp_path, units=UNITS)
    for other, units in [(part(), UNITS + 1), (nn.Linear(2, 2).double(), UNITS), (part(torch.float32), UNITS)]:
        with pytest.raises(ValueError, match="another training"):
            begin(other, tmp_path, units=units)
    for other in (nn.Linear(2, 2).double(), part(torch.float32)):
        with pytest.raises(ValueError, match="another training"):
            Shard(other, xu, folder=tmp_path)
    with pytest.raises(FileNotFoundError):
        Shard(part(), xu, folder=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"part has parameters of torch\.bfloat16"):
        begin(part(torch.bfloat16), tmp_path / "nothing", units=UNITS)


def test_pushes_of_a_former_life_are_as_old_as_this_one_or_older(tmp_path: Path) -> None:
    """A clock that they name may have been turned back since; pushes after that count in any case."""
    first = shard(tmp_path, bounds=Bounds(staleness=2))
    first.push(push(0, vector(0), of=first))
    older = push(1, vector(1), worker=2, of=first)
    first.push(push(1, vector(1), of=first))
    first.save()
    for number in range(2, 4):
        first.push(push(number, vector(number), of=first))
    old = push(4, vector(4), of=first)
    second = shard(tmp_path, bounds=Bounds(staleness=2))
    assert second.clock == 2
    second.push(push(0, vector(9), worker=1, of=second))
    answer = second.push(old)
    assert answer.verdict is Verdict.APPLIED and answer.staleness == 1 and answer.life == 2
    answer = second.push(older)
    assert answer.verdict is Verdict.STALE and answer.staleness == 3
