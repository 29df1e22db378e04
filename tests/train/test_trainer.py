"""The training loop: it learns, keeps the best, stops on request, and resumes to the bit."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from quadric.comm import checkpoint as together
from quadric.comm.communicator import Solo
from quadric.data.augment import SpecAugment
from quadric.data.stream import FrameStream
from quadric.loss.loss import CrossEntropy
from quadric.model.acoustic import TDNN
from quadric.optim.averaged import at_average, averaged_sgd
from quadric.optim.sampling import FixedSizes, GeometricSizes, VarianceTested
from quadric.optim.second_order import hessian_free
from quadric.train import checkpoint
from quadric.train.method import FirstOrder
from quadric.train.metrics import MetricsLog
from quadric.train.plan import Plan
from quadric.train.trainer import Diverged, Interrupted, Trainer, evaluate

CLASSES = 5


def _adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-2)


def _hessian_free(model: nn.Module) -> Optimizer:
    return hessian_free(model.parameters(), max_steps=10)


def _lbfgs(model: nn.Module) -> Optimizer:
    """Evaluates its closure several times an update."""
    return FirstOrder(optimizer=torch.optim.LBFGS, lr=0.3, arguments={"max_iter": 4}).build(model)


def _averaged(model: nn.Module) -> Optimizer:
    return averaged_sgd(model.parameters(), lr=0.5, start=20)


def _asgd(model: nn.Module) -> Optimizer:
    return FirstOrder(optimizer=torch.optim.ASGD, lr=0.5, arguments={"t0": 20}).build(model)


def _schedule_free(model: nn.Module) -> Optimizer:
    kind = pytest.importorskip("schedulefree").SGDScheduleFree
    return FirstOrder(optimizer=kind, lr=1.0).build(model)


METHODS = {
    "adam": (_adam, Plan(4, FixedSizes(100), evaluations=5, seed=3)),
    "lbfgs": (_lbfgs, Plan(4, FixedSizes(400), evaluations=5, seed=3)),
    "hessian_free": (_hessian_free, Plan(4, FixedSizes(400, 150), evaluations=5, seed=3)),
    "hessian_free, growing": (_hessian_free, Plan(8, GeometricSizes(300, 100, 1.15, 1.15), evaluations=5, seed=3)),
    "hessian_free, tested": (
        _hessian_free,
        Plan(8, VarianceTested(200, 0.4, theta=0.8, growth=1.3), evaluations=5, seed=3),
    ),
}

AVERAGED = {
    "averaged_sgd": (_averaged, Plan(6, FixedSizes(100), evaluations=5, seed=3)),
    "asgd": (_asgd, Plan(6, FixedSizes(100), evaluations=5, seed=3)),
    "schedule-free": (_schedule_free, Plan(6, FixedSizes(100), evaluations=5, seed=3)),
}


def _stream(seed: int, utterances: int, transform: SpecAugment | None = None, chunk: int | None = 20) -> FrameStream:
    """Frames whose class is written in them, under noise."""
    rng = np.random.default_rng(seed)
    targets = {f"u{i}": rng.integers(0, CLASSES, 40) for i in range(utterances)}
    noise = {id: rng.normal(size=(40, CLASSES)).astype(np.float32) for id in targets}
    features = {id: noise[id] + 2 * np.eye(CLASSES, dtype=np.float32)[target] for id, target in targets.items()}
    return FrameStream(features, targets, context=(2, 2), chunk=chunk, micro_frames=60, seed=1, transform=transform)


def _model(dropout: float) -> TDNN:
    return TDNN(CLASSES, CLASSES, [16, 16], offsets=[(-1, 0, 1), (-1, 1)], dropout=dropout)


def _trainer(folder: Path, method: str) -> Trainer:
    torch.manual_seed(7)
    model = _model(dropout=0.2)
    build, plan = (METHODS | AVERAGED)[method]
    schedule: Callable[[Optimizer, int], LambdaLR] = lambda o, n: LambdaLR(o, lambda u: 1 - 0.5 * u / n)  # noqa: E731
    transform = SpecAugment(1, 3, 1, 1)
    return Trainer(
        model, CrossEntropy(), build(model), _stream(0, 30, transform), _stream(1, 5), plan, folder, schedule=schedule
    )


class _Looking(Optimizer):
    """Changes nothing; keeps the value and a curvature product of every update, all at one point."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.values: list[float] = []
        self.products: list[float] = []

    def step(self, closure: Any = None) -> float:  # type: ignore[override]
        theta = closure.space.point()
        self.values.append(closure.value(theta))
        self.products.append(float((closure.curvature(theta) @ theta).norm()))
        return self.values[-1]


def _looked(folder: Path, utterances: int, dropout: float, seed: int = 3) -> _Looking:
    """Four updates whose gradient sees all utterances, and whose curvature a third of them or the only one."""
    torch.manual_seed(7)
    model = _model(dropout)
    optimizer, stream = _Looking(model), _stream(0, utterances, chunk=None)
    frames = stream.total_frames
    plan = Plan(4, FixedSizes(frames, math.ceil(frames / 3)), seed=seed)
    Trainer(model, CrossEntropy(), optimizer, stream, None, plan, folder).fit()
    assert len(optimizer.values) == 4
    return optimizer


def _interrupting_at(update: int) -> Callable[..., Iterable[int]]:
    """A progress that presses Ctrl-C as the update begins."""

    def progress(items: Iterable[int], *, total: int | None, what: str) -> Iterable[int]:
        for item in items:
            if item == update:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    return progress


def _without_time(records: Iterable[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records]


@pytest.mark.parametrize("method", [*METHODS, *AVERAGED])
def test_training_learns_and_keeps_the_best(tmp_path: Path, method: str) -> None:
    trainer = _trainer(tmp_path, method)
    before = evaluate(trainer.model, trainer.loss, trainer.held_out)
    best = trainer.fit()
    losses = [r["dev_loss"] for r in MetricsLog(tmp_path / "metrics.jsonl").records() if "dev_loss" in r]
    assert losses[0] == pytest.approx(before["loss"])
    assert best["loss"] == min(losses) < 0.6 * before["loss"]
    assert best["accuracy"] > 0.7
    plan, last = trainer.plan, trainer.optimizer.diagnosis if method.startswith("hessian") else None
    assert plan.epochs <= trainer.stream.epoch < plan.epochs + 1
    assert last is None or (last.gradient_frames > 400) == ("," in method)
    trainer.model.load_state_dict(best["model"])
    assert evaluate(trainer.model, trainer.loss, trainer.held_out)["loss"] == pytest.approx(best["loss"])


@pytest.mark.parametrize("method", AVERAGED)
def test_what_averages_is_judged_and_kept_at_its_average(tmp_path: Path, method: str) -> None:
    trainer = _trainer(tmp_path, method)
    trainer.held_out = None  # the last parameters count as the best
    kept = trainer.fit()["model"]
    assert not all(torch.equal(kept[name], value) for name, value in trainer.model.state_dict().items())
    with at_average(trainer.optimizer):
        assert all(torch.equal(kept[name], value) for name, value in trainer.model.state_dict().items())


def test_the_log_tells_what_every_update_saw_and_where_its_time_went(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "hessian_free, growing")
    trainer.fit()
    steps = MetricsLog(tmp_path / "metrics.jsonl").records()[1:]
    assert [round(step["gradient_frames"] / 20) for step in steps[:3]] == [15, 18, 20]  # 300, 345, 397
    assert [step["curvature_frames"] for step in steps[:3]] == [100, 120, 140]  # 100, 115, 132 in windows of 20
    for i, step in enumerate(steps):
        works = {name: step[f"{name}_seconds"] for name in ("gradient", "products", "evaluation", "solver")}
        assert all(spent > 0 for spent in works.values())
        assert sum(works.values()) <= step["seconds"] - (steps[i - 1]["seconds"] if i else 0.0)


def test_an_optimiser_may_evaluate_its_closure_several_times(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "lbfgs")
    trainer.fit()
    evaluations = trainer.optimizer.state[next(trainer.model.parameters())]["func_evals"]
    assert trainer.updates == 12 and evaluations > 3 * trainer.updates


def test_dropout_draws_anew_in_every_update(tmp_path: Path) -> None:
    values = [_looked(tmp_path / f"seed-{seed}", 1, dropout=0.2, seed=seed).values for seed in (0, 1)]
    assert len(set(values[0] + values[1])) == 8
    assert _looked(tmp_path / "again", 1, dropout=0.2, seed=0).values == values[0]
    assert len(set(_looked(tmp_path / "without", 1, dropout=0.0).values)) == 1


def test_curvature_sees_other_data_in_every_update(tmp_path: Path) -> None:
    assert len(set(_looked(tmp_path / "a third", 30, dropout=0.0).products)) == 4
    assert len(set(_looked(tmp_path / "the only one", 1, dropout=0.0).products)) == 1


@pytest.mark.parametrize("method", [*METHODS, *AVERAGED])
def test_resume_equals_no_interruption(tmp_path: Path, method: str) -> None:
    straight = _trainer(tmp_path / "straight", method)
    straight.fit()
    broken = _trainer(tmp_path / "broken", method)
    middle = straight.update // 2
    with pytest.raises(Interrupted, match=f"update {middle + 1} of {straight.updates}"):
        broken.fit(progress=_interrupting_at(middle))
    assert 0 < broken.stream.epoch % 1 < 1  # in the middle of an epoch
    resumed = _trainer(tmp_path / "broken", method)
    resumed.fit()
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    records = [MetricsLog(tmp_path / name / "metrics.jsonl").records() for name in ("straight", "broken")]
    assert _without_time(records[0]) == _without_time(records[1])
    models = [checkpoint.load(tmp_path / name / "model.pt") for name in ("straight", "broken")]
    assert models[0]["update"] == models[1]["update"]
    assert all(torch.equal(models[0]["model"][key], value) for key, value in models[1]["model"].items())


KILLED = """
import math, sys, time
from pathlib import Path

import quadric.train.trainer

sys.path.insert(0, sys.argv[1])
from train.test_trainer import _trainer

def hanging(items, *, total, what):
    quadric.train.trainer.CHECKPOINT_SECONDS = 0.0
    for item in items:
        if item == 3:
            quadric.train.trainer.CHECKPOINT_SECONDS = math.inf
        if item == int(sys.argv[4]):
            print("hanging", flush=True)
            time.sleep(600)
        yield item

_trainer(Path(sys.argv[2]), sys.argv[3]).fit(progress=hanging)
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_process_goes_on_from_its_checkpoint(tmp_path: Path, method: str) -> None:
    """It is killed in the middle, some updates behind its last checkpoint."""
    straight = _trainer(tmp_path / "straight", method)
    straight.fit()
    tests, killed = Path(__file__).parents[1], tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-c", KILLED, str(tests), str(killed), method, str(straight.update // 2)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = _trainer(killed, method)
    logged = MetricsLog(killed / "metrics.jsonl").records()[-1]["update"]
    assert together.load(killed / "state", Solo())["update"] == 3 < logged < resumed.updates
    resumed.fit()
    assert resumed.update == straight.update
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    records = [MetricsLog(folder / "metrics.jsonl").records() for folder in (tmp_path / "straight", killed)]
    assert _without_time(records[0]) == _without_time(records[1])


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = _trainer(tmp_path, "adam")
    best = first.fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = _trainer(tmp_path, "adam").fit()
    assert again["update"] == best["update"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def _too_fast(folder: Path, patience: int | None = 3, epochs: float = 12.0) -> Trainer:
    """Learns fast, and then no more."""
    torch.manual_seed(7)
    model = _model(dropout=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    plan = Plan(epochs, FixedSizes(100), evaluations=round(5 * epochs), seed=3, patience=patience)
    return Trainer(model, CrossEntropy(), optimizer, _stream(0, 30), _stream(1, 5), plan, folder)


def _losses(folder: Path) -> list[float]:
    return [r["dev_loss"] for r in MetricsLog(folder / "metrics.jsonl").records() if "dev_loss" in r]


def test_patience_ends_a_training_that_learns_no_more(tmp_path: Path) -> None:
    endless, patient = _too_fast(tmp_path / "endless", None), _too_fast(tmp_path / "patient")
    endless.fit()
    best = patient.fit()
    every, looked = _losses(tmp_path / "endless"), _losses(tmp_path / "patient")
    assert every[: len(looked)] == looked
    since = [len(looked[: i + 1]) - 1 - looked.index(min(looked[: i + 1])) for i in range(len(looked))]
    assert since[-1] == 3 and max(since[:-1]) == 2  # looks since the lowest one so far: not less, and not more
    assert 1 in since[:-1] and since.index(1) < since.index(2)
    assert best["loss"] == min(looked) and patient.update < endless.update == endless.updates
    (ended,) = [r["ended"] for r in MetricsLog(tmp_path / "patient" / "metrics.jsonl").records() if "ended" in r]
    assert ended == f"no lower held-out loss in 3 looks: ended after update {patient.update} of {patient.updates}"
    assert not any("ended" in r for r in MetricsLog(tmp_path / "endless" / "metrics.jsonl").records())
    before = (tmp_path / "patient" / "metrics.jsonl").read_bytes()
    assert _too_fast(tmp_path / "patient").fit()["update"] == best["update"]
    assert (tmp_path / "patient" / "metrics.jsonl").read_bytes() == before
    longer = _too_fast(tmp_path / "patient", patience=5)
    longer.fit()
    assert longer.update > patient.update and _losses(tmp_path / "patient") == every[: len(looked) + 2]


@pytest.mark.parametrize("looks", [1, 2])
def test_patience_is_resumed_to_the_bit(tmp_path: Path, looks: int) -> None:
    """Stopped when so many looks have gone by without a lower loss."""
    straight = _too_fast(tmp_path / "straight")
    straight.fit()
    broken = _too_fast(tmp_path / "broken")
    judged = [r["update"] for r in MetricsLog(tmp_path / "straight" / "metrics.jsonl").records()]
    with pytest.raises(Interrupted):
        broken.fit(progress=_interrupting_at(judged[looks - 4]))
    assert broken.stale == looks and broken.update == judged[looks - 4] + 1
    resumed = _too_fast(tmp_path / "broken")
    resumed.fit()
    assert resumed.update == straight.update
    records = [MetricsLog(tmp_path / name / "metrics.jsonl").records() for name in ("straight", "broken")]
    assert _without_time(records[0]) == _without_time(records[1])
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_patience_at_the_end_of_the_plan_is_no_early_end(tmp_path: Path) -> None:
    whole = _too_fast(tmp_path / "whole")
    whole.fit()
    exact = _too_fast(tmp_path / "exact", epochs=whole.drawn / whole.stream.total_frames)
    exact.fit()
    assert exact.stale == 3 and exact.update == exact.updates == whole.update
    assert not any("ended" in r for r in MetricsLog(tmp_path / "exact" / "metrics.jsonl").records())


def test_patience_needs_something_to_look_at(tmp_path: Path) -> None:
    model, plan = _model(0.0), Plan(1, FixedSizes(100), patience=2)
    with pytest.raises(ValueError, match="patience=2: there is no held_out to be patient with; give it, or None"):
        Trainer(model, CrossEntropy(), _adam(model), _stream(0, 3), None, plan, tmp_path)


class _Classes(tuple):
    """The classes of an utterance, as an object that cannot be cut."""


class _OfObjects(CrossEntropy):
    """Cross-entropy of such targets; it keeps what it saw while the model trained."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[_Classes]] = []

    def forward(self, output: torch.Tensor, target: list[_Classes]) -> torch.Tensor:
        if output.requires_grad:
            self.seen.append(target)
        frames = torch.cat([x[: len(y)] for x, y in zip(output, target, strict=True)])
        return super().forward(frames, torch.tensor([y for utterance in target for y in utterance]))

    def weight(self, target: list[_Classes]) -> torch.Tensor:
        return torch.tensor(sum(map(len, target)))

    def correct(self, output: torch.Tensor, target: list[_Classes]) -> None:
        return None


def test_of_one_frame_an_update_sees_one_utterance(tmp_path: Path) -> None:
    """Whole utterances of any length, as sequence losses want them, by the options of a job."""
    rng = np.random.default_rng(0)
    targets = {f"u{i}": _Classes(rng.integers(0, CLASSES, 10 + 7 * i).tolist()) for i in range(9)}
    features = {id: np.eye(CLASSES, dtype=np.float32)[list(target)] for id, target in targets.items()}
    stream, held_out = (FrameStream(features, targets, context=(2, 2), chunk=None, seed=1) for _ in range(2))
    method, loss, rates = FirstOrder(epochs=3.0, gradient_frames=1, lr=0.01, warmup=0.0, floor=0.0), _OfObjects(), []
    model = _model(0.0)
    optimizer = method.build(model)
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    plan = Plan(method.epochs, method.sampler, evaluations=3)
    trainer = Trainer(model, loss, optimizer, stream, held_out, plan, tmp_path, schedule=method.schedule)
    trainer.fit()
    assert trainer.update == trainer.updates == 3 * 9 and trainer.stream.epoch == 3.0
    assert [len(seen) for seen in loss.seen] == [1] * 27
    for epoch in range(3):
        assert sorted(seen[0] for seen in loss.seen[9 * epoch : 9 * epoch + 9]) == sorted(targets.values())
    records = MetricsLog(tmp_path / "metrics.jsonl").records()
    assert [record["update"] for record in records] == [0, *(_reached(loss.seen, share) for share in (1, 2, 3))]
    assert records[-1]["dev_loss"] < 0.8 * records[0]["dev_loss"]
    assert rates[0] == 0.01 and rates[-1] < 0.02 * 0.01  # the schedule comes to its end


def _reached(seen: list[list[_Classes]], epochs: int) -> int:
    """The first update that completes so many epochs."""
    frames = np.cumsum([len(utterance[0]) for utterance in seen])
    return int(np.searchsorted(frames, epochs * frames[-1] / 3)) + 1


def test_the_updates_are_those_that_the_items_make(tmp_path: Path) -> None:
    """Windows of 20 frames: a draw of 30 holds 40, so that three quarters of the updates are an epoch."""
    model = _model(0.0)
    plan = Plan(2, FixedSizes(30), evaluations=1)
    trainer = Trainer(model, CrossEntropy(), _adam(model), _stream(0, 30), None, plan, tmp_path)
    assert trainer.updates == 60
    trainer.fit()
    assert (trainer.update, trainer.stream.epoch) == (60, 2.0)


@pytest.mark.parametrize("option", ["epochs", "evaluations", "patience"])
def test_plan_names_what_is_wrong(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0"):
        Plan(**{"epochs": 1, "sampler": FixedSizes(1), option: 0})


@pytest.mark.parametrize("judged", [True, False])
def test_a_diverged_training_says_so_and_stops(tmp_path: Path, judged: bool) -> None:
    trainer = _trainer(tmp_path, "adam")
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e30
    trainer.scheduler = None
    if not judged:
        trainer.held_out = None
    with pytest.raises(Diverged, match=r"the (objective|held-out loss) is (nan|inf).*lower the learning rate"):
        trainer.fit()
