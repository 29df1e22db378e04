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
from quadric.optim.sampling import FixedSizes, GeometricSizes, VarianceTested
from quadric.optim.second_order import hessian_free
from quadric.train import checkpoint
from quadric.train.method import FirstOrder
from quadric.train.metrics import MetricsLog
from quadric.train.trainer import Diverged, Interrupted, Plan, Trainer, evaluate

CLASSES = 5


def _adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-2)


def _hessian_free(model: nn.Module) -> Optimizer:
    return hessian_free(model.parameters(), max_steps=10)


def _lbfgs(model: nn.Module) -> Optimizer:
    """Evaluates its closure several times an update."""
    return FirstOrder(optimizer=torch.optim.LBFGS, lr=0.3, arguments={"max_iter": 4}).build(model.parameters())


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
    build, plan = METHODS[method]
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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("option", ["epochs", "evaluations"])
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
