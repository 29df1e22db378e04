"""Simulated training against queues in closed form, plain loops, and the laws that hold for every queue."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadric.parallel.simulation import (
    Costs,
    Layout,
    Node,
    Trace,
    constant,
    drawn,
    exponential,
    lognormal,
    simulate,
    summed,
)
from reference import simulated


def alone(compute: float, service: float) -> Costs:
    return Costs(constant(compute), constant(service))


def test_the_period_of_one_worker_is_all_that_it_does() -> None:
    """Messages go through both links at once, so that the slower one counts."""
    costs = Costs(constant(3.0), constant(0.5), sent=8.0, answered=6.0, latency=0.25)
    layout = Layout([Node(bandwidth=2.0), Node(bandwidth=4.0)], [0], [1])
    found = simulate(costs, layout, 21, warm=1)
    period = 3.0 + 8 / 2 + 0.25 + 0.5 + 6 / 2 + 0.25
    assert found.rate == pytest.approx(1 / period)
    assert found.staleness.tolist() == [0] * 21 and found.histogram() == {0: 20}
    assert found.response == pytest.approx(period - 3) and found.waiting == pytest.approx(1 - 3 / period)
    expected = {"shard": 0.5, "link to a shard": 2.0, "link from a shard": 1.5, "link of workers": 4.0}
    assert found.use == pytest.approx({k: v / period for k, v in {**expected, "cores of workers": 3.0}.items()})


def test_within_a_node_messages_need_no_link() -> None:
    costs = Costs(constant(3.0), constant(0.5), sent=8.0, answered=6.0)
    assert simulate(costs, Layout.one_node(1, 1, Node(bandwidth=1.0)), 5).seconds[-1] == 5 * 3.5


@pytest.mark.parametrize(
    ("costs", "bandwidth", "rate", "busy"),
    [
        (alone(3.0, 0.5), math.inf, 2.0, "shard"),
        (Costs(constant(3.0), constant(0.1), sent=4.0, answered=1.0), 8.0, 2.0, "link to a shard"),
        (Costs(constant(3.0), constant(0.1), sent=1.0, answered=4.0), 8.0, 2.0, "link from a shard"),
    ],
)
def test_many_workers_saturate_what_is_slowest(costs: Costs, bandwidth: float, rate: float, busy: str) -> None:
    found = simulate(costs, Layout.cluster(40, 1, Node(bandwidth=bandwidth)), 1000, warm=200)
    assert found.rate == pytest.approx(rate, rel=1e-6)
    assert max(found.use, key=found.use.__getitem__) == busy and found.use[busy] == pytest.approx(1)
    assert found.mean_staleness == pytest.approx(39)
    assert max(simulate(costs, Layout.cluster(40, 1, Node(bandwidth=bandwidth)), 5).use.values()) <= 1 + 1e-9


def test_workers_of_one_node_share_its_link_and_its_cores() -> None:
    """The second message waits for the first; both workers compute at the speed of half a core."""
    costs = Costs(constant(3.0), constant(0.0), sent=2.0)
    layout = Layout([Node(bandwidth=math.inf), Node(bandwidth=4.0)], [1, 1], [0])
    assert simulate(costs, layout, 2).seconds.tolist() == [6.5, 7.0]
    free = Layout([Node(), Node(cores=2.0, bandwidth=4.0)], [1, 1], [0])
    assert simulate(costs, free, 2).seconds.tolist() == [3.5, 4.0]


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_a_core_that_does_everything_is_never_idle(workers: int) -> None:
    costs = Costs(lognormal(3.0, 0.4), constant(0.5))
    found = simulate(costs, Layout.one_node(workers, 1, Node()), 4000, warm=100)
    assert found.rate == pytest.approx(1 / 3.5, rel=0.03)
    assert found.use["cores of workers"] == pytest.approx(1) and found.mean_staleness == pytest.approx(workers - 1)


@pytest.mark.parametrize("workers", [1, 3, 12])
def test_exponential_times_are_a_machine_repairman(workers: int) -> None:
    costs = Costs(exponential(4.0), exponential(1.0))
    found = simulate(costs, Layout.cluster(workers, 1, Node()), 12_000, warm=500, seed=1)
    rate, queue = simulated.repairman(workers, 4.0, 1.0)
    assert found.rate == pytest.approx(rate, rel=0.04) and found.use["shard"] == pytest.approx(rate, rel=0.04)
    assert found.waiting * workers == pytest.approx(queue, rel=0.05)
    assert found.mean_staleness == pytest.approx(workers - 1, abs=0.02)


@pytest.mark.parametrize(("workers", "spread"), [(2, 0.3), (6, 1.5)])
def test_a_shared_core_a_line_and_latency_are_a_network_of_queues(workers: int, spread: float) -> None:
    """What a shared processor takes on average says how many come through, whatever the distribution."""
    costs = Costs(lognormal(1.0, spread), exponential(0.8), latency=1.5)
    layout = Layout([Node(), Node()], [1] * workers, [0])
    found = simulate(costs, layout, 12_000, warm=500)
    assert found.rate == pytest.approx(simulated.mean_values(workers, 3.0, [1.0, 0.8]), rel=0.04)


@settings(max_examples=25, deadline=None)
@given(workers=st.integers(1, 6), service=st.floats(0.0, 2.0), latency=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_one_line_is_that_of_plain_loops(workers: int, service: float, latency: float, seed: int) -> None:
    times = lognormal(1.0, 0.7)
    found = simulate(
        Costs(times, constant(service), latency=latency), Layout.cluster(workers, 1, Node()), 60, seed=seed
    )
    draws = [np.random.default_rng([seed, number]) for number in range(workers)]
    expected = simulated.one_line(workers, 60, lambda w: times(draws[w]), service, latency)
    assert found.worker.tolist() == [worker for worker, _, _ in expected]
    assert found.staleness.tolist() == [staleness for _, staleness, _ in expected]
    assert np.allclose(found.seconds, [second for _, _, second in expected], rtol=1e-12)


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    times = st.sampled_from([constant(1.0), exponential(1.0), lognormal(1.0, 0.5), drawn([0.2, 1.8])])
    size, nodes = st.sampled_from([0.0, 0.3, 2.0]), draw(st.integers(1, 3))
    node = st.builds(Node, cores=st.sampled_from([1.0, 2.5]), bandwidth=st.sampled_from([1.0, 7.0, math.inf]))
    place = st.integers(0, nodes - 1)
    costs = Costs(draw(times), draw(times), draw(size), draw(size), draw(st.sampled_from([0.0, 0.2])))
    layout = Layout(
        draw(st.lists(node, min_size=nodes, max_size=nodes)),
        draw(st.lists(place, min_size=1, max_size=7)),
        draw(st.lists(place, min_size=1, max_size=3)),
    )
    return {"costs": costs, "layout": layout, "seed": draw(st.integers(0, 9))}


@settings(max_examples=40, deadline=None)
@given(training=trainings())
def test_what_holds_for_every_training(training: dict[str, Any]) -> None:
    pushes, layout = 300, training["layout"]
    found = simulate(**training, pushes=pushes, warm=100)
    n = len(layout.workers)
    assert all(0 <= use <= 1 + 1e-9 for use in found.use.values()) and 0 <= found.waiting <= 1
    assert (np.diff(found.seconds) >= 0).all()
    each_push_once_at_each_shard(found, pushes)
    # Little's law: those who wait are as many as come, times how long each waits (but for those at the ends).
    assert found.waiting * n == pytest.approx(found.rate * found.response, rel=0.1, abs=4 * n / (pushes - 100))
    again = simulate(**training, pushes=pushes, warm=100)
    assert again.seconds.tolist() == found.seconds.tolist() and again.worker.tolist() == found.worker.tolist()


def each_push_once_at_each_shard(found: Trace, pushes: int) -> None:
    """No worker is two pushes ahead at a shard; staleness is the pushes of others since its own last."""
    counts = np.zeros((found.workers, found.shards), int)
    last = np.zeros((found.workers, found.shards), int)
    clocks = np.zeros(found.shards, int)
    for shard, worker, staleness in zip(found.shard, found.worker, found.staleness, strict=True):
        counts[worker, shard] += 1
        assert np.ptp(counts[worker]) <= 1
        assert staleness == clocks[shard] - last[worker, shard]
        clocks[shard] += 1
        last[worker, shard] = clocks[shard]
    assert counts.min(1).sum() == pushes


def test_more_of_anything_is_not_worse() -> None:
    def rate(workers: int = 8, cores: float = 1.0, bandwidth: float = 4.0, service: float = 0.3) -> float:
        costs = Costs(lognormal(2.0, 0.3), constant(service), sent=1.0, answered=1.0)
        layout = Layout.cluster(workers, 1, Node(cores, bandwidth), each=2)
        return simulate(costs, layout, 1500, warm=200).rate

    for better in ("workers", "cores", "bandwidth"):
        rates = [rate(**{better: value}) for value in (1, 2, 4, 8)]
        assert all(after > 0.99 * before for before, after in pairwise(rates)), (better, rates)
    assert rate(service=0.2) > rate(service=0.4) > rate(service=0.8)


def test_a_worker_draws_its_own_times() -> None:
    """The first push of a worker is computed as long beside others as alone."""

    def first(workers: int) -> float:
        found = simulate(Costs(lognormal(1.0, 1.0), constant(0.0)), Layout.cluster(workers, 1, Node()), 40)
        return float(found.seconds[found.worker.tolist().index(0)])

    assert first(1) == first(5) == first(9)


def test_times_are_drawn_as_said() -> None:
    generator = np.random.default_rng(0)
    for times, mean, spread in [
        (exponential(3.0), 3.0, 1.0),
        (lognormal(3.0, 0.4), 3.0, 0.4),
        (drawn([1.0, 2.0, 6.0]), 3.0, math.sqrt(14 / 27)),
        (summed(exponential(3.0), 4), 12.0, 0.5),
        (constant(3.0), 3.0, 0.0),
    ]:
        found = [times(generator) for _ in range(10_000)]
        assert np.mean(found) == pytest.approx(mean, rel=0.03)
        assert np.std(found) / np.mean(found) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(-1.0), "seconds=-1.0: must be a number of at least 0"),
        (lambda: exponential(math.nan), "mean=nan"),
        (lambda: lognormal(0.0, 1.0), "mean=0.0: must be positive"),
        (lambda: drawn([]), "samples: there are none"),
        (lambda: drawn([1.0, -2.0]), r"samples\[1\]=-2.0"),
        (lambda: summed(constant(1.0), 0), "number=0: give one"),
        (lambda: Costs(constant(1.0), constant(1.0), latency=-1.0), "latency=-1.0"),
        (lambda: Node(cores=0), "cores=0: must be positive"),
        (lambda: Node(bandwidth=-2), "bandwidth=-2: must be positive"),
        (lambda: Layout([Node()], [], [0]), "workers=.*: give the node of one"),
        (lambda: Layout([Node()], [0], [1]), "shards: not all are on nodes 0 to 0"),
        (lambda: simulate(alone(1.0, 1.0), Layout.cluster(1, 1, Node()), 5, warm=5), "warm=5: must be from 0 to .* 4"),
        (lambda: simulate(alone(0.0, 0.0), Layout.cluster(1, 1, Node()), 5), "costs: pushes take no time"),
    ],
)
def test_misuse_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
