"""Real gradients along a simulated training: what the staleness of many workers does to the loss, with one core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from quadric.loss.loss import Loss
from quadric.parallel.exchange import Answer, Push, Verdict
from quadric.parallel.shard import Shard
from quadric.parallel.simulation import Trace
from quadric.parallel.units import Units
from quadric.parallel.worker import Gradients, Link, Worker


class Replayed(NamedTuple):
    """A push that all shards have answered.

    Attributes:
        worker: who computed it.
        unit: of what.
        loss: of the unit's minibatches, at the parameters of that time.
        staleness: the largest, as shards have counted it.
        verdicts: of the shards.
    """

    worker: int
    unit: int
    loss: float
    staleness: int
    verdicts: tuple[Verdict, ...]


class _Network(Link):
    """Between a worker and shards: what is sent is on its way, and nobody has answered yet."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.sent: list[Push] = []

    def pull(self) -> list[Answer]:
        return self.answers

    def push(self, pushes: Sequence[Push]) -> list[Answer]:
        self.sent = list(pushes)
        return self.answers


@dataclass
class _Hand:
    """A simulated worker: the parameters that it has, and the push that it has under way."""

    answers: list[Answer]
    sequence: int = 0
    unit: int | None = None
    loss: float = 0.0
    sent: list[Push] = field(default_factory=list)
    heard: dict[int, Answer] = field(default_factory=dict)


def replay(
    trace: Trace,
    shards: Sequence[Shard],
    model: nn.Module,
    loss: Loss,
    units: Units,
    *,
    clip: float | None = None,
    seed: int = 0,
) -> Iterator[Replayed]:
    """Workers send gradients (`Gradients`) to shards in the order of a simulation; each push, when all have answered.

    A unit goes to the worker whose push is the next to arrive. Its gradient is that at the parameters which the worker
    had been sent with its last push; parameters are kept while a worker has them. A unit that was too stale for a shard
    is what its worker computes next. It ends with the trace or the units.

    Args:
        trace: the order.
        shards: as many as in the trace.
        model: of one worker; each sets its parameters to those it has. Running statistics are of all workers' units.
        loss: of the model's output.
        units: dealt out in their order.
        clip, seed: as in `Worker`.

    Raises:
        ValueError: there are not as many shards as in the trace, or they are not those of the model.
    """
    if len(shards) != trace.shards:
        raise ValueError(f"shards: {len(shards)}, but the trace is of {trace.shards}: give as many")
    network = _Network()
    worker = Worker(model, loss, units, network, [s.size for s in shards], strategy=Gradients(), clip=clip, seed=seed)
    start = [_kept(shard.pull()) for shard in shards]
    hands = [_Hand(start) for _ in range(trace.workers)]
    waiting = iter(range(len(units)))
    for place, number in zip(trace.shard.tolist(), trace.worker.tolist(), strict=True):
        hand = hands[number]
        if not hand.sent:
            hand.unit = next(waiting, None) if hand.unit is None else hand.unit
            if hand.unit is None:
                continue
            network.answers = hand.answers
            worker.pull()
            hand.loss, hand.sent = worker.do(hand.unit).loss, network.sent
        push = hand.sent[place]._replace(worker=number, sequence=hand.sequence)
        hand.heard[place] = _kept(shards[place].push(push))
        if len(hand.heard) == len(shards):
            yield _ended(hand, number)


def _ended(hand: _Hand, number: int) -> Replayed:
    """Of a push that all have answered; the worker goes on with what they have sent."""
    assert hand.unit is not None
    answers = [hand.heard[place] for place in range(len(hand.heard))]
    verdicts = tuple(answer.verdict for answer in answers if answer.verdict is not None)
    done = Replayed(number, hand.unit, hand.loss, max(answer.staleness for answer in answers), verdicts)
    hand.answers, hand.sequence, hand.sent, hand.heard = answers, hand.sequence + 1, [], {}
    if Verdict.STALE not in verdicts:
        hand.unit = None
    return done


def _kept(answer: Answer) -> Answer:
    return answer._replace(theta=answer.theta.copy())
