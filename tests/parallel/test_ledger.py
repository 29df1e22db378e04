"""Leases of units: everything is settled in the end, and nothing is held twice for no reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from quadric.parallel.ledger import Ledger

OVERDUE = 5.0
WORKERS = st.integers(0, 3)
SHARDS = 2


class Leases(RuleBasedStateMachine):
    """Workers come, take, push, report, fall silent and die; shards are started again from old checkpoints.

    A unit's state is kept in plain sets: who holds it since when, whether it is settled, which shards have applied it.
    """

    @initialize(units=st.integers(1, 12), done=st.sets(st.integers(0, 11)))
    def begin(self, units: int, done: set[int]) -> None:
        self.units = range(units)
        self.done = done & set(self.units)
        self.settled = set(self.done)
        self.shards = [set(self.settled) for _ in range(SHARDS)]
        self.held: dict[int, dict[int, float]] = {}
        self.pushed: dict[int, list[int]] = {}
        self.dealt: list[int] = []
        self.now = 0.0
        self.ledger = Ledger(self.mask(self.settled))

    def mask(self, units: set[int]) -> Tensor:
        return torch.tensor([unit in units for unit in self.units])

    def waiting(self) -> list[int]:
        return [u for u in self.units if u not in self.settled and not any(u in held for held in self.held.values())]

    @rule(worker=WORKERS, count=st.integers(1, 4))
    def take(self, worker: int, count: int) -> None:
        expected = self.waiting()[:count]
        if not expected:
            others = [held for other, held in self.held.items() if other != worker]
            late = {u for held in others for u, since in held.items() if self.now - since > OVERDUE}
            expected = sorted(late - self.held.get(worker, {}).keys())[:count]
        given = self.ledger.take(worker, count, now=self.now, overdue=OVERDUE)
        assert given == expected
        self.dealt += [unit for unit in given if unit not in self.dealt and unit not in self.done]
        self.held.setdefault(worker, {})
        for held in self.held.values():
            held.update((unit, self.now) for unit in given if unit in held)
        self.held[worker].update((unit, self.now) for unit in given)

    @rule(worker=WORKERS, count=st.integers(1, 4))
    def push(self, worker: int, count: int) -> None:
        """To all shards; the driver hears of it later."""
        for unit in list(self.held.get(worker, {}))[:count]:
            for applied in self.shards:
                applied.add(unit)
            self.pushed.setdefault(worker, []).append(unit)

    @rule(worker=WORKERS)
    def report(self, worker: int) -> None:
        """Also of units that were settled or lost meanwhile, or that another has been given since."""
        units = self.pushed.pop(worker, [])
        self.ledger.settle(units)
        self.settled |= set(units)
        for held in self.held.values():
            for unit in units:
                held.pop(unit, None)

    @rule(worker=WORKERS, units=st.sets(st.integers(0, 11)))
    def give_back(self, worker: int, units: set[int]) -> None:
        """Of these, what the worker holds: nothing is lost by others."""
        self.ledger.give_back(worker, sorted(units))
        for unit in units:
            self.held.get(worker, {}).pop(unit, None)

    @rule(worker=WORKERS)
    def die(self, worker: int) -> None:
        own = self.held.pop(worker, {})
        self.pushed.pop(worker, None)
        back = self.ledger.release(worker)
        assert set(back) == own.keys() & set(self.waiting())

    @rule(seconds=st.sampled_from([1.0, OVERDUE + 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(shard=st.integers(0, SHARDS - 1), lost=st.sets(st.integers(0, 11)))
    def restart(self, shard: int, lost: set[int]) -> None:
        """The driver hears of it later."""
        self.shards[shard] -= lost

    @rule(shard=st.integers(0, SHARDS - 1))
    def ask(self, shard: int) -> None:
        lost = self.settled - self.shards[shard]
        assert self.ledger.lack(self.mask(self.shards[shard])) == sorted(lost)
        self.settled -= lost

    @invariant()
    def settled_is_known(self) -> None:
        if hasattr(self, "ledger"):
            assert torch.equal(self.ledger.settled, self.mask(self.settled))
            assert self.ledger.left == len(self.units) - len(self.settled)

    @precondition(lambda self: hasattr(self, "ledger"))
    @invariant()
    def first_leases_ascend(self) -> None:
        assert self.dealt == sorted(self.dealt)

    def teardown(self) -> None:
        """One worker that works, while all others are silent, brings all units to all shards."""
        if not hasattr(self, "ledger"):
            return
        self.pushed.clear()
        for _ in range(10 * len(self.units)):
            if not self.ledger.left:
                for shard in range(SHARDS):
                    self.ask(shard)
            if not self.ledger.left:
                break
            self.now += OVERDUE + 1
            self.take(9, 3)
            self.push(9, 3)
            self.report(9)
        assert not self.ledger.left and all(applied >= set(self.units) for applied in self.shards)


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=120, stateful_step_count=30)


def fresh(units: int) -> Ledger:
    return Ledger(torch.zeros(units, dtype=torch.bool))


def test_what_is_settled_late_is_not_dealt_out_again() -> None:
    """Of two workers on one unit, the second tells of it after a shard has lost it, and it was applied by then."""
    ledger = fresh(1)
    assert ledger.take(0, 1, now=0.0, overdue=1.0) == [0]
    assert ledger.take(1, 1, now=2.0, overdue=1.0) == [0]
    ledger.settle([0])
    assert ledger.lack(torch.tensor([False])) == [0]
    ledger.settle([0])
    assert ledger.take(2, 1, now=2.0, overdue=1.0) == []


def test_an_overdue_unit_goes_to_one_more_worker_at_a_time() -> None:
    ledger = fresh(2)
    assert ledger.take(0, 2, now=0.0, overdue=OVERDUE) == [0, 1]
    assert ledger.take(1, 2, now=OVERDUE, overdue=OVERDUE) == []
    assert ledger.take(1, 1, now=OVERDUE + 1, overdue=OVERDUE) == [0]
    assert ledger.take(2, 2, now=OVERDUE + 1, overdue=OVERDUE) == [1]
    assert ledger.take(3, 2, now=OVERDUE + 1, overdue=OVERDUE) == []
    assert ledger.take(0, 2, now=3 * OVERDUE, overdue=OVERDUE) == []  # it holds them already
    assert ledger.release(0) == [] and ledger.release(1) == [0] and ledger.release(2) == [1]


def test_the_state_given_is_copied() -> None:
    settled = torch.tensor([True, False])
    ledger = Ledger(settled)
    assert ledger.left == 1 and ledger.take(0, 5, now=0.0, overdue=1.0) == [1]
    ledger.settle([1])
    assert settled.tolist() == [True, False] and ledger.left == 0


@pytest.mark.parametrize("units", [[], [1, 1], [0, 1, 2]])
def test_giving_back_twice_or_what_one_has_not(units: list[int]) -> None:
    ledger = fresh(3)
    ledger.take(0, 2, now=0.0, overdue=1.0)
    ledger.give_back(0, units)
    ledger.give_back(0, units)
    ledger.give_back(7, units)
    expected = [*sorted({0, 1} & set(units)), 2]
    assert ledger.take(1, 9, now=0.0, overdue=1.0) == expected
