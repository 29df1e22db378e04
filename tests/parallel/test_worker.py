"""Workers on shards in this process, one after the other in an explicit order, against plain loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from quadric.comm.compression import AdaComp, CLTk, Compressor, HalfPrecision, LowRank
from quadric.comm.message import Message
from quadric.data.examples import ExampleStream
from quadric.loss.loss import SquaredError
from quadric.optim.averaged import averaged_sgd
from quadric.parallel.exchange import Verdict
from quadric.parallel.shard import Bounds
from quadric.parallel.units import Units
from quadric.parallel.worker import Elastic, Gradients, OuterSteps, Strategy, Worker
from quadric.space import ParameterSpace
from reference import delayed
from reference.served import Served

FRAMES, MINIBATCHES, SIZE = 4, 12, 11
XU = {"lr": 0.2, "a": 0.5, "power": 0.75}


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()


def data(broken: int | None = None) -> ExampleStream:
    """Two minibatches in each minibatch, of 3 examples and of 1."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(24, 3, dtype=torch.float64, generator=generator)
    targets = torch.randn(24, 1, dtype=torch.float64, generator=generator)
    if broken is not None:
        inputs[broken] = math.nan
    return ExampleStream(inputs, targets, micro=3, seed=7)


def minibatches() -> list[tuple[np.ndarray, np.ndarray]]:
    stream, found = data(), []
    for _ in range(MINIBATCHES):
        batches = list(stream.draw(FRAMES))
        found.append((torch.cat([b.inputs for b in batches]).numpy(), torch.cat([b.target for b in batches]).numpy()))
    return found


DATA = minibatches()


def gradient(theta: np.ndarray, number: int) -> np.ndarray:
    """Of the mean of 1/2 (W2 (W1 x + b1) + b2 - y)^2."""
    x, y = DATA[number]
    W1, b1, W2, b2 = theta[:6].reshape(2, 3), theta[6:8], theta[8:10].reshape(1, 2), theta[10:]
    h = x @ W1.T + b1
    e = (h @ W2.T + b2 - y) / len(x)
    back = e @ W2
    return np.concatenate([(back.T @ x).ravel(), back.sum(0), (e.T @ h).ravel(), e.sum(0)])


def xu(module: nn.Module) -> Optimizer:
    return averaged_sgd(module.parameters(), **XU)


def order(units: int, seed: int, workers: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, workers, units).tolist()


class Crew:
    """Workers that take turns."""

    def __init__(
        self, folder: Path, rule: Any = xu, *, every: int = 1, shards: int = 1, bounds: Bounds = Bounds(),
        stream: ExampleStream | None = None, strategy: Strategy | None = None,
        compressors: list[Compressor] | None = None, model: nn.Module | None = None, **options: Any,
    ) -> None:  # fmt: skip
        model = model or network()
        self.units = Units(stream or data(), frames=FRAMES, epochs=2, every=every)
        self.link = Served(model, rule, folder, units=len(self.units), shards=shards, bounds=bounds)
        self.workers = [
            Worker(
                copy.deepcopy(model), SquaredError(), self.units, self.link, self.link.sizes, number=number,
                strategy=copy.deepcopy(strategy), compressors=copy.deepcopy(compressors), **options,
            )
            for number in range(3)
        ]  # fmt: skip
        self.start = self.link.theta

    def work(self, seed: int) -> tuple[list[int], list[Any]]:
        workers = order(len(self.units), seed)
        return workers, [self.workers[worker].do(unit) for unit, worker in enumerate(workers)]


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(found, expected, rtol=1e-10, atol=1e-12)


def point(worker: Worker) -> np.ndarray:
    return worker.space.point().numpy()


@pytest.mark.parametrize(
    ("every", "shards", "bounds", "clip"),
    [
        (1, 1, Bounds(), None),
        (1, 2, Bounds(scaled=True), None),
        (2, 1, Bounds(), 0.8),
        (3, 2, Bounds(staleness=1, scaled=True), None),
        (1, 2, Bounds(staleness=0), 0.5),
    ],
)
def test_sums_of_gradients_along_plain_steps(
    every: int, shards: int, bounds: Bounds, clip: float | None, tmp_path: Path
) -> None:
    crew = Crew(tmp_path, every=every, shards=shards, bounds=bounds, clip=clip)
    workers, reports = crew.work(every)
    expected = delayed.averaged_sgd(
        crew.start, workers, gradient, every=every, **XU, scaled=bounds.scaled, bound=bounds.staleness, clip=clip
    )
    assert close(crew.link.theta, expected.theta) and close(crew.link.average, expected.average)
    assert [report.staleness for report in reports] == expected.ages
    assert all(report.settled for report in reports) and crew.link.shards[0].applied.all()


def test_means_of_gradients_where_the_server_has_momentum(tmp_path: Path) -> None:
    crew = Crew(tmp_path, lambda m: SGD(m.parameters(), lr=0.1, momentum=0.8), every=3)
    workers, _ = crew.work(1)
    assert close(crew.link.theta, delayed.momentum(crew.start, workers, gradient, every=3, lr=0.1, beta=0.8))


def inner(module: nn.Module) -> Optimizer:
    return SGD(module.parameters(), lr=0.1)


def falling(optimizer: Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, 0.9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("every", "schedule"), [(1, None), (3, falling)])
def test_elastic_averaging(every: int, schedule: Any, tmp_path: Path) -> None:
    strategy = Elastic(inner, schedule, alpha=0.3)
    crew = Crew(tmp_path, lambda m: SGD(m.parameters(), lr=1.0), every=every, shards=2, strategy=strategy)
    workers, _ = crew.work(every)
    center, own = delayed.elastic(
        crew.start, workers, gradient, every=every, lr=lambda m: 0.1 * (0.9**m if schedule else 1), alpha=0.3
    )
    assert close(crew.link.theta, center)
    assert all(close(point(crew.workers[worker]), x) for worker, x in own.items())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("every", "schedule"), [(1, None), (3, falling)])
def test_outer_steps(every: int, schedule: Any, tmp_path: Path) -> None:
    def rule(module: nn.Module) -> Optimizer:
        return SGD(module.parameters(), lr=0.7, momentum=0.9, nesterov=True)

    crew = Crew(tmp_path, rule, every=every, strategy=OuterSteps(inner, schedule))
    workers, _ = crew.work(every)
    expected = delayed.outer_nesterov(
        crew.start, workers, gradient, every=every, lr=lambda m: 0.1 * (0.9**m if schedule else 1), outer=0.7, beta=0.9
    )
    assert close(crew.link.theta, expected)


def test_a_stale_push_is_computed_again(tmp_path: Path) -> None:
    crew = Crew(tmp_path, bounds=Bounds(staleness=0))
    first, second, _ = crew.workers
    first.do(0)
    second.do(1)
    before = crew.link.theta
    report = first.do(2)
    (stale, refused), (again, taken) = ((pushes[0], answers[0]) for pushes, answers in crew.link.heard[-2:])
    assert (refused.verdict, taken.verdict) == (Verdict.STALE, Verdict.APPLIED)
    assert again.sequence == stale.sequence + 1 and again.clock == 2
    assert isinstance(again.content, np.ndarray) and close(again.content, gradient(before, 2))
    assert report.verdicts == ("APPLIED",) and report.settled and report.staleness == 0


class Interrupted(Served):
    """Another push comes before each."""

    between: Worker
    unit = 5

    def push(self, pushes: Any) -> Any:
        if pushes[0].worker != 2:
            self.unit += 1
            self.between.do(self.unit)
        return super().push(pushes)


def test_what_is_too_old_twice_is_not_settled(tmp_path: Path) -> None:
    crew = Crew(tmp_path, bounds=Bounds(staleness=0))
    link = crew.link
    link.__class__ = Interrupted
    link.between = crew.workers[2]  # type: ignore[attr-defined]
    report = crew.workers[0].do(0)
    assert report.verdicts == ("STALE",) and not report.settled and not link.shards[0].applied[0]
    link.__class__ = Served
    assert crew.workers[1].do(0).settled


class Remembered(Gradients):
    """Keeps what was to be sent."""

    def __init__(self) -> None:
        self.sent: list[np.ndarray] = []

    def run(self, worker: Worker, unit: int) -> tuple[Tensor, float]:
        vector, value = super().run(worker, unit)
        self.sent.append(vector.numpy().copy())
        return vector, value


def compressors(kind: str) -> list[Compressor]:
    shapes = [[(2, 3), (2,)], [(1, 2), (1,)]]
    sizes = [8, 3]
    return {
        "adacomp": lambda: [AdaComp([size], bin=3) for size in sizes],
        "scalecom": lambda: [CLTk(0.3) for _ in sizes],
        "powersgd": lambda: [LowRank(shape, 1) for shape in shapes],
        "bfloat16": lambda: [HalfPrecision() for _ in sizes],
    }[kind]()


@pytest.mark.parametrize("kind", ["adacomp", "scalecom", "powersgd", "bfloat16"])
def test_what_was_sent_and_what_is_left_are_the_gradients_of_units_once(kind: str, tmp_path: Path) -> None:
    """Some pushes are refused by one shard and some by all: as too old, or of units that others have done."""
    crew = Crew(tmp_path, shards=2, bounds=Bounds(staleness=1), strategy=Remembered(), compressors=compressors(kind))
    link, generator = crew.link, np.random.default_rng(4)
    got, due = np.zeros(SIZE), np.zeros(SIZE)
    places = np.split(np.arange(SIZE), [8])
    met = set()
    for step in range(40):
        worker = crew.workers[generator.integers(3)]
        heard, strategy = len(link.heard), worker._strategy
        assert isinstance(strategy, Remembered)
        strategy.sent.clear()
        if step % 7 == 3:  # a shard is ahead of the other, as after a restart of that
            link.shards[0].clock += 2
        worker.do(int(generator.integers(len(crew.units))))
        for (pushes, answers), vector in zip(link.heard[heard:], strategy.sent, strict=True):
            for place, push, answer in zip(places, pushes, answers, strict=True):
                met.add(answer.verdict)
                if answer.verdict is Verdict.APPLIED:
                    got[place] += push.content.dense().numpy()  # type: ignore[union-attr]
                    due[place] += vector[place]
    assert met == {Verdict.APPLIED, Verdict.DUPLICATE, Verdict.STALE}
    left = np.zeros(SIZE)
    for worker in crew.workers:
        for place, compressor in zip(places, worker.compressors, strict=True):
            left[place] += compressor.residue.numpy() if len(compressor.residue) else 0
    np.testing.assert_allclose(got + left, due, atol=1e-6)


def test_what_a_refused_push_would_have_sent_later_is_not_sent(tmp_path: Path) -> None:
    """As without compression, a unit that another has done leaves no trace, in residues or in factors."""
    crew = Crew(tmp_path, shards=2, compressors=compressors("powersgd"))
    crew.workers[0].do(0)
    crew.workers[1].do(1)
    before = [compressor.state_dict() for compressor in crew.workers[0].compressors]
    assert crew.workers[0].do(1).verdicts == ("DUPLICATE", "DUPLICATE")
    for compressor, state in zip(crew.workers[0].compressors, before, strict=True):
        assert torch.equal(compressor.residue, state["residue"])
        assert all(torch.equal(a, b) for a, b in zip(compressor.state_dict()["Q"], state["Q"], strict=True))


def test_the_first_units_are_sent_whole(tmp_path: Path) -> None:
    crew = Crew(tmp_path, shards=2, compressors=compressors("scalecom"), whole=2)
    for unit in (1, 2, 0):
        crew.workers[0].do(unit)
    sent = [[isinstance(push.content, Message) for push in pushes] for pushes, _ in crew.link.heard]
    assert sent == [[False, False], [True, True], [False, False]]


def unit_of(crew: Crew, example: int) -> int:
    """The first unit with an example, by its first input."""
    value = data().inputs[example, 0]
    return next(unit for unit in range(len(crew.units)) if value in torch.from_numpy(DATA[unit][0][:, 0]))


def lively(module: nn.Module) -> Optimizer:
    return Adam(module.parameters(), lr=0.01)


@pytest.mark.parametrize("strategy", [Gradients(), Elastic(lively), OuterSteps(lively, falling)])
@pytest.mark.parametrize("kind", [None, "scalecom"])
def test_data_that_are_not_finite_cost_their_unit_alone(strategy: Strategy, kind: str | None, tmp_path: Path) -> None:
    """Nothing of them stays, neither in parameters nor in the state of the worker's own optimiser."""
    crew = Crew(
        tmp_path, lambda m: SGD(m.parameters(), lr=0.5), shards=2, stream=data(broken=9), strategy=strategy,
        compressors=compressors(kind) if kind else None,
    )  # fmt: skip
    bad, worker = unit_of(crew, 9), crew.workers[0]
    good = [unit for unit in range(6) if unit != bad]
    worker.do(good[0])
    before = crew.link.theta
    report = worker.do(bad)
    pushes, _ = crew.link.heard[-1]
    assert [push.content for push in pushes] == [None, None]
    assert report.verdicts == ("NOT_FINITE",) * 2 and report.settled and math.isnan(report.loss) and report.sent == 0
    assert (crew.link.theta == before).all()
    for unit in good[1:]:
        report = worker.do(unit)
        assert report.verdicts == ("APPLIED",) * 2 and math.isfinite(report.loss) and report.sent > 0
    assert np.isfinite(crew.link.theta).all() and (crew.link.theta != before).any()


def test_random_layers_draw_the_same_whoever_does_the_unit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def sent(folder: str, worker: int, units: list[int], **options: Any) -> np.ndarray:
        crew = Crew(tmp_path / folder, lambda m: SGD(m.parameters(), lr=0.0), model=model, every=2, **options)
        for unit in units:
            crew.workers[worker].do(unit)
        content = crew.link.heard[-1][0][0].content
        assert isinstance(content, np.ndarray)
        return content

    first = sent("a", 0, [0, 3])
    assert (first == sent("b", 1, [3])).all()
    assert (first != sent("c", 1, [3], seed=1)).any()


def test_reports_tell_of_the_unit(tmp_path: Path) -> None:
    crew = Crew(tmp_path, shards=2, every=2)
    report = crew.workers[1].do(4)
    start, rate = crew.start, delayed.xu_rate(1, **XU)
    moved = start - rate * gradient(start, 8)
    losses = []
    for theta, (x, y) in ((start, DATA[8]), (moved, DATA[9])):
        h = x @ theta[:6].reshape(2, 3).T + theta[6:8]
        losses.append(0.5 * np.mean((h @ theta[8:10] + theta[10] - y[:, 0]) ** 2))
    assert report.loss == pytest.approx(np.mean(losses))
    assert (report.unit, report.frames, report.sent, report.lives) == (4, 8, 8 * SIZE, (1, 1))
    (pushes, _), *_ = crew.link.heard
    assert {(p.worker, p.incarnation, p.sequence, p.unit) for p in pushes} == {(1, 1, 0, 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": math.nan}, "clip=nan"),
        ({"number": 0.5}, "number=0.5"),
        ({"incarnation": 1.5}, "incarnation=1.5"),
        ({"compressors": [CLTk(0.5)]}, "compressors: 1 for 2 shards"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = network()
    link = Served(model, xu, tmp_path, units=3, shards=2)
    units = Units(data(), frames=FRAMES)
    with pytest.raises(ValueError, match=message):
        Worker(model, SquaredError(), units, link, link.sizes, **options)


def test_sizes_of_another_model(tmp_path: Path) -> None:
    model = network()
    link = Served(model, xu, tmp_path, units=3)
    with pytest.raises(ValueError, match=f"sizes sum to 4: the model has {ParameterSpace(model).size}"):
        Worker(model, SquaredError(), Units(data(), frames=FRAMES), link, [4])
