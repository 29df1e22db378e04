"""Benchmarks start, say what they measure, and compare as they promise."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quadric.data.image_sets import control_points, draw_curves
from quadric.data.stream import FrameStream
from quadric.loss.loss import SquaredError
from quadric.model.acoustic import TDNN
from quadric.objective.curvature import Curvature
from quadric.objective.objective import Objective
from quadric.optim.sampling import Sizes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())
NEEDS_SPEECH = {
    "acceleration",
    "compression",
    "generation",
    "iterations",
    "lattice",
    "scale",
    "sequence",
    "sequence_step",
    "speech",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.speech if name in NEEDS_SPEECH else []) for name in SCRIPTS]
)
def test_help_is_given(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_a_cycle_is_put_together_from_the_kinds_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step with inverses takes 9 seconds, one with statistics 5, others 3, and Adam's 2."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    cost = importlib.import_module("step_cost")
    race = cost.Race(cost.OURS[0], cost.Task(lambda: torch.nn.Linear(3, 2), *draws()), torch.device("cpu"))
    schedule, clock, group = race.ours.optimizers[0].schedule, [0.0], race.ours.optimizers[0].param_groups[0]

    def ours() -> None:
        number = group["step"]
        clock[0] += 9 if schedule.refreshes(number) else 5 if number % schedule.statistics == 0 else 3
        race_ours()

    def adam() -> None:
        clock[0] += 2

    race_ours, optimizers = race.ours, race.ours.optimizers
    monkeypatch.setattr(cost, "now", lambda: clock[0])
    ours.optimizers = optimizers  # type: ignore[attr-defined]
    race.ours, race.adam = ours, adam
    ratios = race.ratios(2)
    assert ratios[1, 20] == pytest.approx((9 + 19 * 5) / 40)
    assert ratios[10, 100] == pytest.approx((9 + 9 * 5 + 90 * 3) / 200)


def test_a_peer_s_steps_are_summed_over_the_median_of_adam_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which one of its 20 steps takes 43 seconds and others 3; Adam's take 2, but for one of 100."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    cost = importlib.import_module("step_cost")
    peer = cost.Method("SGD", lambda model: torch.optim.SGD(model.parameters(), lr=0.1), ((10, 10),))
    race = cost.Race(peer, cost.Task(lambda: torch.nn.Linear(3, 2), *draws()), torch.device("cpu"))
    clock, steps, adams = [0.0], itertools.count(-3), itertools.count(-3)

    def ours() -> None:
        clock[0] += 43 if next(steps) == 7 else 3

    def adam() -> None:
        clock[0] += 100 if next(adams) == 11 else 2

    monkeypatch.setattr(cost, "now", lambda: clock[0])
    ours.optimizers = race.ours.optimizers  # type: ignore[attr-defined]
    race.ours, race.adam = ours, adam
    assert race.ratios(2) == {(10, 10): pytest.approx((43 + 19 * 3) / 40)}


def draws() -> tuple[torch.Tensor, torch.Tensor, Any]:
    return torch.randn(8, 3), torch.randint(2, (8,)), torch.nn.functional.cross_entropy


@pytest.mark.speech
def test_frames_come_in_as_many_parts_as_a_sampler_asks_for_and_unscaled_where_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("kaldifst", reason="needs the speech extra")
    frames, iterations = (importlib.import_module(name) for name in ("frames", "iterations"))
    rng = np.random.default_rng(0)
    features = {f"u{i}": rng.normal(size=(40, 3)).astype(np.float32) for i in range(10)}
    stream = FrameStream(features, {id: rng.integers(0, 4, 40) for id in features}, context=(0, 0))
    speech = frames.Speech(TDNN(3, 4, [5], offsets=[(0,)]), stream, stream)
    made = speech.objective(speech.again(), Sizes(200, 40), 3, parts=4, kind=iterations.Unscaled)
    assert made.frames == 200 and len(made._gradient) >= 4
    operators = made.curvatures(made.space.point(), (Curvature.GAUSS_NEWTON, Curvature.EMPIRICAL_FISHER))
    assert [operator.scale for operator in operators] == [0.0, 0.0]
    assert len(speech.objective(speech.again(), Sizes(200, 40), 3)._gradient) == 1


@pytest.fixture
def block_tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("block_tasks")


def points_on_a_line(block_tasks: Any, *, breaks_above: float = 1e9) -> Any:
    """A task of one weight that should become 3: the best rate is the one that gets there."""

    def batches(generator: torch.Generator) -> Any:
        while True:
            x = torch.randn(8, 1, generator=generator)
            yield x, 3 * x

    def measure(model: torch.nn.Module) -> dict[str, float]:
        away = abs(float(model.eval().weight.detach()) - 3)
        return {"training_loss": away if away < breaks_above else float("nan")}

    def test(model: torch.nn.Module) -> dict[str, float]:
        return {"held_out_loss": float(model.weight.detach())}

    return block_tasks.Task(lambda: torch.nn.Linear(1, 1, bias=False), SquaredError(), batches, measure, test)


def asked(monkeypatch: pytest.MonkeyPatch, block_tasks: Any, task: Any, *more: str) -> None:
    """Runs the command, every step of which takes a tenth of a second by its clock."""
    ticks = itertools.count()
    monkeypatch.setitem(block_tasks.CLOCKS, "wall", lambda: next(ticks) / 10)
    monkeypatch.setitem(block_tasks.TASKS, "curves", lambda *_: task)
    line = ["--task", "curves", "--seconds", "2", "--trials", "3", "--seeds", "2", "--looks", "4", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["block_tasks.py", *line, *more])
    block_tasks.main()


def test_a_method_is_tuned_and_run_from_all_seeds(
    block_tasks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, task = tmp_path / "runs.json", points_on_a_line(block_tasks)
    methods = ["--methods", "adam", "sgd", "mini_block_fisher", "--json", str(file)]
    asked(monkeypatch, block_tasks, task, *methods)
    out = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == ["| adam", "| sgd", "| mini_block_fisher"]
    kept = json.loads(file.read_text())
    for name in ("adam", "sgd", "mini_block_fisher"):
        runs = [run for run in kept["runs"] if run["asked"]["method"] == name]
        trials, finals = runs[:3], runs[3:]
        assert [run["asked"]["values"] for run in trials] == [
            block_tasks.drawn(block_tasks.METHODS[name].ranges, k) for k in range(3)
        ]
        assert [run["asked"]["seed"] for run in runs] == [0, 0, 0, 1, 2]
        assert all(run["steps"] == 20 for run in runs)
        best = min(trials, key=lambda run: run["measures"]["training_loss"])
        assert all(run["asked"]["values"] == best["asked"]["values"] for run in finals)
        assert [look["steps"] for look in finals[0]["curve"]] == [0, 5, 10, 15, 20]
        (row,) = (row for row in kept["rows"] if row["method"] == name)
        ends = [run["measures"]["training_loss"] for run in finals]
        assert row["training_loss"] == pytest.approx([sum(ends) / 2, min(ends), max(ends)])
        assert not any("held_out_loss" in run["measures"] for run in trials) and "held_out_loss" in row
        assert finals[0]["measures"] != finals[1]["measures"]


def test_what_is_finished_is_not_trained_again(
    block_tasks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = points_on_a_line(block_tasks)
    one, two = (["--methods", "adam", "--json", str(tmp_path / name)] for name in ("one", "two"))
    asked(monkeypatch, block_tasks, task, *one)
    table, trained = capsys.readouterr().out, []
    plain = block_tasks.Trainer.train

    def counted(self: Any, looks: int) -> Any:
        trained.append(looks)
        if len(trained) == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return plain(self, looks)

    stopped: list[bool] = []
    monkeypatch.setattr(block_tasks.Trainer, "train", counted)
    with pytest.raises(SystemExit) as end:
        asked(monkeypatch, block_tasks, task, *two)
    assert end.value.code == 130 and "what was finished is in" in capsys.readouterr().err
    asked(monkeypatch, block_tasks, task, *two)
    assert len(trained) == 3 + 3  # the one that was stopped, once more
    assert capsys.readouterr().out == table
    asked(monkeypatch, block_tasks, task, *two)
    assert len(trained) == 6
    assert json.loads((tmp_path / "one").read_text()) == json.loads((tmp_path / "two").read_text())
    asked(monkeypatch, block_tasks, task, *two, "--rates", "constant")
    assert len(trained) == 11
    (tmp_path / "two").write_text("[]")
    with pytest.raises(SystemExit, match="not written by this benchmark"):
        asked(monkeypatch, block_tasks, task, *two)


def test_rates_fall_by_a_cosine_and_weights_shrink_with_them(block_tasks: Any) -> None:
    task = replace(points_on_a_line(block_tasks), decay=0.1)
    method = block_tasks.Method(lambda model, schedule, lr: [torch.optim.SGD(model.parameters(), lr=lr)], {})
    for rates, expected in (("constant", [1.0] * 4), ("cosine", [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])):
        ticks = itertools.count()
        block_tasks.CLOCKS["tick"] = lambda ticks=ticks: next(ticks)
        chosen = argparse.Namespace(seconds=4, clock="tick", device="cpu", rates=rates)
        trainer = block_tasks.Trainer(task, method, {"lr": 0.02}, 0, chosen)
        weight, wanted = float(trainer.model.weight.detach()), []
        batches = task.batches(torch.Generator().manual_seed(0))
        for factor in expected:
            weight *= 1 - 0.1 * factor
            x, y = next(batches)
            weight -= 0.02 * factor * float((x * (weight * x - y)).mean())
            wanted.append(weight)
        found = []
        while not trainer.over:
            trainer.step()
            found.append(float(trainer.model.weight.detach()))
        assert found == pytest.approx(wanted, rel=1e-5)
        del block_tasks.CLOCKS["tick"]


def test_trainings_that_diverge_are_counted(
    block_tasks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch, block_tasks, points_on_a_line(block_tasks, breaks_above=0), "--methods", "sgd")
    assert capsys.readouterr().out.splitlines()[-1] == "| sgd | all diverged | - | - | - | - | - | - |"
    task = points_on_a_line(block_tasks)
    broken = block_tasks.Method(lambda model, schedule, lr: [Explodes(model.parameters(), lr)], {"lr": (1e-3, 1e3)})
    monkeypatch.setitem(block_tasks.METHODS, "sgd", broken)
    asked(monkeypatch, block_tasks, task, "--methods", "sgd")
    assert "| 3 (1 diverged) | 2 |" in capsys.readouterr().out


class Explodes(torch.optim.SGD):
    """Breaks what it trains where its rate is over 10, in its last step at the latest."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        return loss * float("nan") if self.defaults["lr"] > 10 else loss


def lowered(task: Any) -> dict[str, float]:
    """What is measured after five steps of Adam; the loss must have become less."""
    torch.manual_seed(0)
    model = task.build()
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=1e-3), task.batches(torch.Generator().manual_seed(0))
    before = task.measure(model)
    for _ in range(5):
        optimizer.step(Objective(model.train(), task.loss, [next(batches)]))
    after: dict[str, float] = task.measure(model)
    assert after["training_loss"] < before["training_loss"]
    return after


def test_values_that_are_set_need_no_search(
    block_tasks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--methods", "sgd", "--set", "lr=0.05", "eps=1", "--seeds", "2", "--json", str(tmp_path / "runs.json"))
    asked(monkeypatch, block_tasks, points_on_a_line(block_tasks), *more)
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert [run["asked"]["values"] for run in kept["runs"]] == [{"lr": 0.05}] * 2
    assert [run["asked"]["seed"] for run in kept["runs"]] == [1, 2]
    with pytest.raises(SystemExit, match="--set: adam has eps as well"):
        asked(monkeypatch, block_tasks, points_on_a_line(block_tasks), "--methods", "adam", "--set", "lr=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--device", "foo"], "--device foo: give cpu, cuda"),
        (["--device", "meta"], "--device meta: give cpu, cuda"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds .* GPUs? here"),
        (["--json", "nowhere/runs.json"], "--json nowhere/runs.json: there is no folder nowhere; make it first"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
@pytest.mark.parametrize("name", ["step_cost", "block_tasks"])
def test_what_cannot_be_is_said_before_anything_is_measured(
    name: str,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    line = {"step_cost": ["--tasks", "mlp", "--repeats", "1"], "block_tasks": ["--task", "curves", "--seconds", "1"]}
    refused(importlib.import_module(name), [*line[name], *options], message, monkeypatch)
    assert capsys.readouterr().out == ""


def refused(benchmark: Any, line: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *line])
    with pytest.raises(SystemExit, match=f"^{message}"):
        benchmark.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(block_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(block_tasks, ["--task", "curves", "--device", "cuda"], "--device cuda: torch finds no GPU", monkeypatch)


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_seconds_are_a_positive_number(seconds: str, block_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(block_tasks, ["--task", "curves", f"--seconds={seconds}"], "--trials, --seeds and --seconds", monkeypatch)


@pytest.mark.parametrize("task", ["mnist", "faces", "cora"])
def test_data_that_is_not_there_is_named(
    task: str, block_tasks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder, told in ((tmp_path / "nowhere", "there is no such folder"), (tmp_path, "give the parent of mnist/")):
        refused(block_tasks, ["--task", task, "--data", str(folder)], f"--data {folder}: .*{told}", monkeypatch)


@pytest.mark.parametrize("logistic", [True, False])
def test_an_autoencoder_is_measured_on_what_it_was_trained_on_and_on_other_images(
    logistic: bool, block_tasks: Any
) -> None:
    drawn = torch.from_numpy(draw_curves(control_points(1300)))
    tasks, images = (importlib.import_module(name) for name in ("tasks", "images"))
    known = images.Images(drawn[:1200], drawn[1200:], logistic, (784, 40, 6))
    task = tasks.autoencoding(known, narrow=True, batch=500, evaluated=1100)
    assert [p.shape[0] for p in task.build().parameters() if p.ndim == 2] == [20, 6, 20, 784]
    first = [x for x, _ in itertools.islice(task.batches(torch.Generator().manual_seed(1)), 2)]
    assert [len(x) for x in first] == [500, 500] and len(torch.cat(first).unique(dim=0)) == 1000
    model = task.build()
    found = task.measure(model)
    for name, part in (("training_loss", drawn[:1100]), ("held_out_loss", drawn[1200:])):
        output = model(part).detach().double()
        if logistic:
            loss = -(part * output.sigmoid().log() + (1 - part) * (-output).sigmoid().log())
        else:
            loss = 0.5 * (output - part) ** 2
        assert found[name] == pytest.approx(float(loss.sum(1).mean()), rel=1e-5)
    lowered(task)


@pytest.mark.data
def test_a_citation_network_is_trained_and_measured(block_tasks: Any, shared_data: Path) -> None:
    task = block_tasks.TASKS["cora"](shared_data, True, torch.device("cpu"))
    found = lowered(task)
    assert set(found) == {"training_loss", "validation_accuracy"}
    worse = {**found, "validation_accuracy": found["validation_accuracy"] - 1, "training_loss": 0.0}
    assert task.rank(found) < task.rank(worse)
    assert task.rank(found) < task.rank({**found, "training_loss": 99.0})


@pytest.mark.speech
def test_compressors_are_compared_on_made_frames(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("kaldifst", reason="needs the speech extra")
    compression = importlib.import_module("compression")
    methods = ["none", "adacomp-500", "cltk-0.01", "lowrank-1"]
    line = ["an4", "--quick", "--threads", "1", "--json", str(tmp_path / "rows.json"), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["compression.py", *line])
    compression.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["start", *methods]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    ends = {row["method"]: row["epochs"][-1] for row in rows[1:]}
    assert all(end["loss"] < rows[0]["loss"] and end["step"] == 40 for end in ends.values())
    assert rows[1]["ratio"] == 1 and rows[2]["ratio"] > 10 and rows[4]["ratio"] > 4
    parameters = sum(p.numel() for p in compression.made().model.parameters())
    assert rows[3]["ratio"] == pytest.approx(4 * parameters / (8 * round(0.01 * parameters)))


@pytest.mark.speech
def test_what_all_workers_send_and_keep_is_what_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("kaldifst", reason="needs the speech extra")
    compression = importlib.import_module("compression")
    given = [torch.randn(3, 50) for _ in range(5)]
    for name, build in compression.METHODS.items():
        if name == "cltk-0.01-filtered":
            continue
        workers = compression.Workers(build, [torch.zeros(10, 5)], 3)
        sent = sum(workers.mean(list(gradients)) for gradients in given)
        left = sum(c.residue for c in workers.compressors if c is not None) / 3
        torch.testing.assert_close(sent + left, sum(g.mean(0) for g in given), rtol=0, atol=1e-5)
        assert workers.plain == 5 * 3 * 50 * 4


@pytest.mark.speech
def test_a_cluster_is_asked_and_gradients_are_replayed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the nominal times: of 5 ms a gradient and 2 ms at the shard, 0.5 ms of them whatever its part."""
    scale = scale_benchmark(monkeypatch)
    line = ["an4", "--quick", "--threads", "1", "--parts", "cluster", "replay", "--lr", "0.3"]
    monkeypatch.setattr(sys, "argv", ["scale.py", *line, "--json", str(tmp_path / "rows.json")])
    scale.main()
    cluster, replayed = (json.loads((tmp_path / f"rows-{part}.json").read_text()) for part in ("cluster", "replay"))
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + len(cluster) + 1 + 2 + len(replayed)
    limits = {(row["shards"], row["every"]): row["rate"][-1] for row in cluster}
    assert limits[1, 1] == pytest.approx(500, rel=0.01) and limits[4, 1] == pytest.approx(1 / 0.000875, rel=0.01)
    assert limits[1, 20] == pytest.approx(16 * 20 / (20 * 0.005 + 0.0005 + 0.002 + 0.001), rel=0.05)
    assert [row["busiest"] for row in cluster[:3]] == ["shard", "shard", "cores of workers"]
    assert [(row["workers"], row["scaled"]) for row in replayed] == [(1, False), (4, False), (4, True)]
    assert replayed[0]["staleness"] == 0 and replayed[1]["staleness"] > 2
    assert replayed[0]["last"]["loss"] < 1.1
    assert len({row["last"]["loss"] for row in replayed}) == 3


@pytest.mark.speech
def test_times_are_read_off_one_worker_and_others_are_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing takes twice as long by the clock as on the core: so does the rest, but for what is on its way."""
    scale = scale_benchmark(monkeypatch)
    account = scale.Account(gradients=[0.01, 0.03], clock=[0.02, 0.06], cpu=0.045, staleness=0.0)
    one = scale.Round([account], pushes=2, seconds=2 * (2 * (0.02 + 0.005 + 0.01) + 0.008), served=0.02, ray=0.07)
    small = scale.Round([account], pushes=10, seconds=9.0, served=0.04, ray=1.0)
    machine = scale.fitted(one, small)
    found = (machine.sending, machine.serving, machine.fixed, machine.latency, machine.slower)
    assert found == pytest.approx((0.005, 0.01, 0.004, 0.004, 2.0))
    for workers, rate in ((1, one.rate), (8, 1 / 0.07)):
        trace = scale.predicted(machine, workers, 1)
        assert trace.rate == pytest.approx(rate, rel=0.03) and trace.mean_staleness == pytest.approx(
            workers - 1, abs=0.01
        )
    assert scale.predicted(machine, 8, 16).rate == pytest.approx(1 / 0.02, rel=0.01)
    # Nothing is on its way where the period is not even what computing would take if all of it were as slow.
    machine = scale.fitted(one._replace(seconds=2 * 0.056), small)
    assert (machine.latency, machine.slower) == pytest.approx((0.0, 1.6))


def scale_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("kaldifst", reason="needs the speech extra")
    return importlib.import_module("scale")
