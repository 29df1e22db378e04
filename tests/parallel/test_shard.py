"""A shard: each push once, whatever comes twice, late, broken or from processes that were replaced."""

from __future__ import annotations

import copy
import math
import shutil
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from quadric.comm.compression import CLTk, HalfPrecision
from quadric.comm.message import Sparse
from quadric.parallel.exchange import NO_UNIT, Push, Verdict
from quadric.parallel.partition import hollow, partition
from quadric.parallel.shard import Bounds, Rule, Shard, begin
from quadric.space import ParameterSpace
from reference import delayed
from reference.served import (
    SIZE,
    UNITS,
    XU,
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

# Each push once.


@st.composite
def deliveries(draw: st.DrawFn) -> list[delayed.Sent]:
    """Workers push in order, and again what they have pushed; others push the same units; processes are replaced."""
    sent: list[delayed.Sent] = []
    process, sequence = {0: 1, 1: 1, 2: 1}, {0: 0, 1: 0, 2: 0}
    for number in range(draw(st.integers(1, 20))):
        worker = draw(st.integers(0, 2))
        kind = draw(st.sampled_from(["new", "new", "new", "again", "replaced"]))
        if kind == "again" and sent:
            sent.append(draw(st.sampled_from(sent)))
            continue
        if kind == "replaced":
            process[worker], sequence[worker] = process[worker] + 1, 0
        unit = draw(st.integers(NO_UNIT, UNITS - 1))
        sent.append(delayed.Sent(worker, process[worker], sequence[worker], unit, vector(number)))
        sequence[worker] += 1
    return sent


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to begin with."""
    folder = tmp_path_factory.mktemp("begun")
    begin(part(), folder, units=UNITS)
    return folder


@settings(max_examples=20)
@given(sent=deliveries())
def test_each_push_and_each_unit_once(begun: Path, sent: list[delayed.Sent]) -> None:
    with TemporaryDirectory() as folder:
        shutil.copytree(begun, folder, dirs_exist_ok=True)
        server = shard(Path(folder))
        expected = delayed.once(theta(server), sent, **XU)
        for one in sent:
            server.push(Push(*one[:4], server.life, server.clock, one.vector))
        np.testing.assert_allclose(theta(server), expected.theta, rtol=1e-12)
        np.testing.assert_allclose(server.average(), expected.average, rtol=1e-12)
        counts = server.counts()
        assert sum(counts[verdict.name.lower()] for verdict in Verdict) == len(sent)
        assert counts["applied"] == counts["clock"] == server.clock


def test_verdicts_on_what_is_not_applied(tmp_path: Path) -> None:
    server = shard(tmp_path)
    first, second = push(0, vector(0), unit=2), push(0, vector(1), unit=2, worker=1)
    assert server.push(first).verdict is Verdict.APPLIED
    before = theta(server)
    assert server.push(first).verdict is Verdict.REPEATED
    assert server.push(second).verdict is Verdict.DUPLICATE
    assert (theta(server) == before).all()
    assert server.push(Push(0, 2, 0, 3, 1, 0, vector(2))).verdict is Verdict.APPLIED
    before = theta(server)
    assert server.push(push(1, vector(3), unit=4)).verdict is Verdict.SUPERSEDED
    assert (theta(server) == before).all()
    assert server.applied.tolist() == [False, False, True, True, False, False]
    assert server.counts()["incarnation"] == 2 and server.counts()["superseded"] == 1


def test_a_late_copy_of_a_refused_push_settles_nothing(tmp_path: Path) -> None:
    """It is older than what its worker has pushed since, and yet was never applied."""
    server = shard(tmp_path, bounds=Bounds(staleness=0))
    server.push(push(0, vector(0), worker=1))
    old = push(0, vector(1), unit=3)
    assert server.push(old).verdict is Verdict.STALE
    assert server.push(push(1, vector(2), unit=4, of=server)).verdict is Verdict.APPLIED
    server.push(old)
    assert server.applied.nonzero().flatten().tolist() == [4]
    assert server.push(push(2, vector(1), unit=3, of=server)).verdict is Verdict.APPLIED


# What is not finite.


@pytest.mark.parametrize(
    ("rule", "value"), [(xu, math.nan), (xu, None), (nesterov, math.inf), (nesterov, math.nan), (nesterov, None)]
)
def test_what_is_not_finite_moves_nothing(rule: Rule, value: float | None, tmp_path: Path) -> None:
    server = shard(tmp_path, rule, bounds=Bounds(not_finite=2))
    server.push(push(0, vector(0), unit=0))
    before, average = theta(server), server.average()
    broken = None if value is None else vector(1)
    if broken is not None and value is not None:
        broken[5] = value
    for number in range(1, 4):
        answer = server.push(push(number, broken, unit=number))
        assert answer.verdict is Verdict.NOT_FINITE and answer.verdict.settles
        assert server.push(push(number, broken, unit=number)).verdict is Verdict.REPEATED
    for content in (broken, vector(2)):
        assert server.push(push(4, content, unit=4)).verdict is Verdict.DROPPED
    assert (theta(server) == before).all() and (server.average() == average).all() and server.clock == 1
    assert server.applied.tolist() == [True] * 4 + [False] * 2
    counts = server.counts()
    assert (counts["not_finite"], counts["dropped"], counts["repeated"]) == (3, 2, 3)
    assert server.push(push(0, vector(3), unit=4, worker=1)).verdict is Verdict.APPLIED  # others are not concerned


def test_a_new_process_of_a_dropped_worker_is_heard(tmp_path: Path) -> None:
    server = shard(tmp_path, bounds=Bounds(not_finite=0))
    server.push(push(0, None))
    assert server.push(push(1, vector(0))).verdict is Verdict.DROPPED
    assert server.push(push(0, vector(0))._replace(incarnation=2)).verdict is Verdict.APPLIED
    server.push(push(1, None)._replace(incarnation=2))
    assert server.push(push(2, vector(0))._replace(incarnation=2)).verdict is Verdict.DROPPED


@pytest.mark.parametrize("rule", [xu, nesterov])
def test_what_follows_is_as_if_it_had_not_come(rule: Rule, tmp_path: Path) -> None:
    with_it, without = shard(tmp_path / "a", rule), shard(tmp_path / "b", rule)
    damaged = Sparse(SIZE, np.array([1], np.int32), np.array([math.nan], np.float32))
    with_it.push(push(0, damaged, worker=1))
    with_it.push(push(1, np.full(SIZE, math.inf), worker=1))
    message = Sparse(SIZE, np.array([4], np.int32), np.array([2.0], np.float32))
    for number, content in enumerate([vector(0), message, vector(1)]):
        for server in (with_it, without):
            assert server.push(push(number, content)).verdict is Verdict.APPLIED
    assert (theta(with_it) == theta(without)).all()


# Age.


@settings(max_examples=15)
@given(ages=st.lists(st.integers(0, 5), min_size=1, max_size=10), bound=st.none() | st.integers(0, 4))
def test_old_pushes_are_refused_and_steps_divided_by_age(begun: Path, ages: list[int], bound: int | None) -> None:
    with TemporaryDirectory() as folder:
        shutil.copytree(begun, folder, dirs_exist_ok=True)
        server = shard(Path(folder), bounds=Bounds(staleness=bound, scaled=True))
        expected, t, taken = theta(server), 0, []
        for number, age in enumerate(ages):
            age = min(age, t)
            answer = server.push(Push(0, 1, number, NO_UNIT, 1, t - age, vector(number)))
            assert answer.staleness == age
            if bound is not None and age > bound:
                assert answer.verdict is Verdict.STALE
                continue
            t += 1
            expected = expected - delayed.xu_rate(t, **XU) / max(1, age) * vector(number)
            taken.append(age)
        np.testing.assert_allclose(theta(server), expected, rtol=1e-12)
        assert server.counts()["staleness"] == {age: taken.count(age) for age in taken}
        assert server.counts()["stale"] == len(ages) - len(taken)


def test_scaling_leaves_the_schedule_alone(tmp_path: Path) -> None:
    """The rate is divided for one step, and the schedule goes on from what it was."""
    rates = []
    for scaled in (False, True):
        server = shard(tmp_path / str(scaled), lambda m: SGD(m.parameters(), lr=0.1), schedule=cosine,
                       bounds=Bounds(scaled=scaled))  # fmt: skip
        rates.append([server.push(push(n, vector(n))).rate for n in range(6)])
    assert rates[0] == rates[1]
    expected = [0.05 * (1 + math.cos(math.pi * (n + 1) / 8)) for n in range(6)]
    np.testing.assert_allclose(rates[0], expected, rtol=1e-12)


# What a push may be.


def test_what_cannot_be_taken_is_as_if_it_had_not_come(tmp_path: Path) -> None:
    server = shard(tmp_path)
    before = theta(server)
    contents: list[Any] = [
        np.zeros(SIZE - 1), np.zeros((SIZE, 1)), np.zeros(SIZE, np.float32), np.zeros(SIZE, ">f8"), [0.0] * SIZE,
        torch.zeros(SIZE, dtype=torch.float64), 0.0,
        Sparse(SIZE + 1, np.array([1], np.int32), np.array([1.0], np.float32)),
    ]  # fmt: skip
    for content in contents:
        for _ in range(2):
            with pytest.raises(ValueError, match="content is"):
                server.push(push(0, content, unit=1))
    assert (theta(server) == before).all() and not server.applied.any()
    assert server.push(push(0, vector(0), unit=1)).verdict is Verdict.APPLIED


@pytest.mark.parametrize("unit", [-2, UNITS])
def test_units_that_there_are_not(unit: int, tmp_path: Path) -> None:
    server = shard(tmp_path)
    with pytest.raises(ValueError, match=f"unit={unit}: there are {UNITS}"):
        server.push(push(0, vector(0), unit=unit))
    assert server.push(push(0, vector(0))).verdict is Verdict.APPLIED


@pytest.mark.parametrize(
    "rule",
    [
        nesterov,
        lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True),  # writes to gradients
        lambda m: Adam(m.parameters(), lr=0.05, maximize=True, weight_decay=0.1),
        lambda m: SGD(m.parameters(), lr=0.05, maximize=True, weight_decay=0.1, foreach=True),
        late_average,
        family,
    ],
)
def test_what_is_shared_is_not_written_to(rule: Rule, tmp_path: Path) -> None:
    server, plain = shard(tmp_path / "a", rule), shard(tmp_path / "b", rule)
    for number in range(4):
        shared = vector(number)
        shared.flags.writeable = False
        server.push(push(number, shared))
        plain.push(push(number, vector(number)))
        assert (shared == vector(number)).all()
    assert (theta(server) == theta(plain)).all()


def test_what_is_shared_is_let_go(tmp_path: Path) -> None:
    """A shared store frees what nobody holds."""
    server, shared = shard(tmp_path), vector(0)
    held = weakref.ref(shared)
    assert server.push(push(0, shared)).verdict is Verdict.APPLIED
    del shared
    assert held() is None


@pytest.mark.parametrize("compressor", [CLTk(0.4), HalfPrecision()])
@pytest.mark.parametrize("rule", [xu, nesterov])
def test_compressed_pushes_count_as_what_they_say(rule: Rule, compressor: Any, tmp_path: Path) -> None:
    server, plain = shard(tmp_path / "a", rule), shard(tmp_path / "b", rule)
    compressor = copy.deepcopy(compressor)
    for number in range(4):
        message = compressor.compress(torch.from_numpy(vector(number)))
        server.push(push(number, message))
        plain.push(push(number, message.dense().double().numpy()))
    assert (theta(server) == theta(plain)).all()


# What it says of itself.


def test_the_average_is_that_of_the_iterates(tmp_path: Path) -> None:
    server, path = shard(tmp_path), []
    for number in range(5):
        path.append(server.push(push(number, vector(number))).theta.copy())
    before = theta(server)
    np.testing.assert_allclose(server.average(), np.mean(path, axis=0), rtol=1e-12)
    assert (theta(server) == before).all()
    other = shard(tmp_path / "other", nesterov)
    other.push(push(0, vector(0)))
    assert (other.average() == theta(other)).all()


def grouped(module: nn.Module) -> Optimizer:
    return SGD([{"params": [p], "lr": 0.1 * n} for n, p in enumerate(module.parameters(), 1)])


@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        (xu, delayed.xu_rate(3, **XU)),
        (lambda m: SGD(m.parameters(), lr=0.2), 0.2),
        (lambda m: SGD(m.parameters(), lr=0.2, maximize=True), None),
        (grouped, None),
        (nesterov, None),
        (adam, None),
    ],
)
def test_plain_steps_have_a_rate(rule: Rule, rate: float | None, tmp_path: Path) -> None:
    server = shard(tmp_path, rule)
    server.push(push(0, vector(0)))
    before = server.push(push(1, vector(1)))
    assert before.rate == pytest.approx(rate)
    theta_before = before.theta.copy()
    if rate is not None:
        moved = server.push(push(2, vector(2))).theta
        np.testing.assert_allclose(moved, theta_before - rate * vector(2), rtol=1e-12)


def test_the_family_steps_on_a_part_as_on_the_model(tmp_path: Path) -> None:
    """Blocks are within layers, and layers are whole."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3), nn.Linear(3, 1)).double()
    alone = copy.deepcopy(model)
    optimizer = family(alone)
    shards = []
    for number, piece in enumerate(partition(model, 2)):
        begin(piece, tmp_path / str(number))
        shards.append(Shard(hollow(piece), family, folder=tmp_path / str(number)))
    space = ParameterSpace(alone)
    for number in range(5):
        gradient = torch.from_numpy(np.random.default_rng(number).standard_normal(space.size))
        for parameter, view in zip(space.parameters, space.split(gradient), strict=True):
            parameter.grad = view.clone()
        optimizer.step()
        for server, own in zip(shards, gradient.split([server.size for server in shards]), strict=True):
            assert server.push(push(number, own.numpy())).verdict is Verdict.APPLIED
    found = np.concatenate([theta(server) for server in shards])
    np.testing.assert_allclose(found, space.point().numpy(), rtol=1e-10)


@pytest.mark.parametrize("options", [{"staleness": -1}, {"staleness": 1.5}, {"not_finite": -1}, {"not_finite": 0.5}])
def test_bounds_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}="):
        Bounds(**options)
