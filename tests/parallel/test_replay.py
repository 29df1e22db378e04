"""Real gradients along simulated trainings, against plain loops and plain SGD."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from quadric.data.examples import ExampleStream
from quadric.loss.loss import SquaredError
from quadric.objective.objective import Objective
from quadric.optim.averaged import averaged_sgd
from quadric.parallel.exchange import Verdict
from quadric.parallel.replay import replay
from quadric.parallel.shard import Bounds
from quadric.parallel.simulation import Costs, Layout, Node, Trace, constant, lognormal, simulate
from quadric.parallel.units import Units
from reference import delayed, simulated
from reference.served import Served

FRAMES, XU = 4, {"lr": 0.2, "a": 0.5, "power": 0.75}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()


def data() -> ExampleStream:
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(24, 3, dtype=torch.float64, generator=generator)
    return ExampleStream(inputs, torch.randn(24, 1, dtype=torch.float64, generator=generator), seed=7)


def units(every: int = 1) -> Units:
    return Units(data(), frames=FRAMES, epochs=6, every=every)


MINIBATCHES = units()


def gradient(theta: np.ndarray, number: int) -> np.ndarray:
    """Of the minibatch of a number."""
    found = Objective(network(), SquaredError(), MINIBATCHES[number][0]).value_and_grad(torch.from_numpy(theta))
    return found[1].numpy()


def order(workers: int, pushes: int, shards: int = 1) -> Trace:
    return simulate(Costs(lognormal(1.0, 0.8), constant(0.3)), Layout.cluster(workers, shards, Node()), pushes)


def xu(module: nn.Module) -> Optimizer:
    return averaged_sgd(module.parameters(), **XU)


def plain(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=0.1)


def served(folder: Path, rule: Any, of: Units, **options: Any) -> Served:
    return Served(network(), rule, folder, units=len(of), **options)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("every", "scaled", "clip"), [(1, False, None), (1, True, 0.3), (3, True, None)])
def test_a_replay_is_asynchronous_training(every: int, scaled: bool, clip: float | None, tmp_path: Path) -> None:
    of = units(every)
    link, trace = served(tmp_path, xu, of, bounds=Bounds(scaled=scaled)), order(4, len(of))
    start = link.theta
    found = list(replay(trace, link.shards, network(), SquaredError(), of, clip=clip))
    expected = delayed.averaged_sgd(
        start, trace.worker.tolist(), gradient, every=every, **XU, scaled=scaled, clip=clip, begun=range(4)
    )
    assert close(link.theta, expected.theta) and close(link.average, expected.average)
    assert [push.staleness for push in found] == expected.ages == trace.staleness.tolist()
    assert [push.unit for push in found] == list(range(len(of)))
    assert max(expected.ages) > 2 and link.shards[0].applied.all()


@pytest.mark.parametrize("shards", [2, 1])
def test_shards_may_apply_pushes_in_different_orders(shards: int, tmp_path: Path) -> None:
    of = units()
    link = served(tmp_path, plain, of, shards=shards)
    layout = Layout.cluster(5, shards, Node())
    trace = simulate(Costs(lognormal(1.0, 0.8), lognormal(0.3, 1.0)), layout, len(of) - 8)
    orders = [trace.worker[trace.shard == shard].tolist() for shard in range(shards)]
    assert len(set(map(str, orders))) == shards
    start, sizes = link.theta, np.cumsum([0, *link.sizes])
    slices = [slice(*ends) for ends in pairwise(sizes)]
    events = list(zip(trace.shard.tolist(), trace.worker.tolist(), strict=True))
    found = list(replay(trace, link.shards, network(), SquaredError(), of))
    assert close(link.theta, simulated.in_shards(start, slices, events, gradient, 0.1))
    assert len(found) == len(of) - 8


def test_one_worker_is_plain_sgd_to_the_bit(tmp_path: Path) -> None:
    of = units()
    link, model = served(tmp_path, plain, of), network()
    losses = [push.loss for push in replay(order(1, len(of)), link.shards, network(), SquaredError(), of)]
    optimizer, expected = plain(model), []
    for number in range(len(of)):
        expected.append(float(Objective(model, SquaredError(), of[number][0])()))
        optimizer.step()
    point = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert link.theta.tolist() == point.tolist() and losses == expected


def test_what_is_too_stale_is_computed_again_by_its_worker(tmp_path: Path) -> None:
    of = units()
    link = served(tmp_path, plain, of, bounds=Bounds(staleness=2), shards=2)
    found = list(replay(order(6, 4 * len(of), shards=2), link.shards, network(), SquaredError(), of))
    done = Counter(push.unit for push in found if Verdict.STALE not in push.verdicts)
    assert done == dict.fromkeys(range(len(of)), 1)
    refused = [push for push in found if Verdict.STALE in push.verdicts]
    assert refused and all(push.staleness > 2 for push in refused)
    for shard in link.shards:
        assert max(shard.counts()["staleness"]) <= 2 and shard.clock == len(of)
    owners = {(push.unit, push.worker) for push in found}
    assert len(owners) == len(of)


def test_a_replay_ends_with_its_units(tmp_path: Path) -> None:
    of = units()
    link = served(tmp_path, plain, of, shards=2)
    found = list(replay(order(3, 2 * len(of), shards=2), link.shards, network(), SquaredError(), of))
    assert sorted(push.unit for push in found) == list(range(len(of)))


def test_a_trace_of_other_shards_is_refused(tmp_path: Path) -> None:
    link = served(tmp_path, plain, units())
    with pytest.raises(ValueError, match="shards: 1, but the trace is of 2: give as many"):
        list(replay(order(1, 3, shards=2), link.shards, network(), SquaredError(), units()))
