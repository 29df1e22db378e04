"""Averaged SGD as a job says it: the rate that is searched, where averaging begins, and the way through a job."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quadric.comm.communicator import Solo
from quadric.data.examples import ExampleStream
from quadric.loss.loss import CrossEntropy
from quadric.optim.averaged import AveragedSGD
from quadric.optim.rate import sgd_cost
from quadric.train import checkpoint
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.comparison import compare
from quadric.train.method import FirstOrder, settled
from quadric.train.metrics import MetricsLog
from quadric.train.overrides import override
from quadric.train.task import Material, Task, TaskJob
from reference import ranks
from reference.averaged_training import found_by, speech
from reference.training import network

METHOD = AveragedSGDMethod(gradient_frames=60, search_frames=240)


def test_the_rate_that_is_found_is_the_best_of_its_neighbours(tmp_path: Path) -> None:
    model, stream = network(dropout=0.3), speech()
    before, place = {k: v.clone() for k, v in model.state_dict().items()}, stream.state_dict()
    random = torch.get_rng_state()
    found = METHOD.search(model, CrossEntropy(), stream)["lr"]
    assert stream.state_dict() == place and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    batches = [stream.draw(60) for _ in range(4)]
    cost = sgd_cost(model, CrossEntropy(), batches)
    assert cost(found) <= min(cost(found / 2), cost(2 * found))


def test_the_search_sees_what_it_is_told_and_the_whole_set_at_most() -> None:
    model, stream = network(), speech()
    drawn: list[int] = []
    draw = stream.draw
    stream.draw = lambda frames, parts=1: drawn.append(frames) or draw(frames, parts)  # type: ignore[assignment,func-returns-value,method-assign]
    METHOD.search(model, CrossEntropy(), stream)
    assert drawn == [60] * 4
    drawn.clear()
    replace(METHOD, search_frames=10**6).search(model, CrossEntropy(), stream)
    assert len(drawn) == 8  # windows are whole: 60 are 60 to 69


def test_what_was_found_is_remembered_in_the_folder(tmp_path: Path) -> None:
    stream = speech()
    first = settled(METHOD, network(), CrossEntropy(), stream, tmp_path)
    assert isinstance(first, AveragedSGDMethod) and first == replace(METHOD, lr=first.lr) and first.lr
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["options"] == {"lr": first.lr} and record["seconds"] > 0
    record["options"]["lr"] = 0.123
    (tmp_path / "found.json").write_text(json.dumps(record))
    assert settled(METHOD, network(), CrossEntropy(), stream, tmp_path) == replace(METHOD, lr=0.123)
    (tmp_path / "found.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        settled(METHOD, network(), CrossEntropy(), stream, tmp_path)


@pytest.mark.parametrize("method", [FirstOrder(), replace(METHOD, lr=0.5)])
def test_what_is_given_is_not_searched(tmp_path: Path, method: Any) -> None:
    assert settled(method, network(), CrossEntropy(), speech(), tmp_path) is method
    assert not list(tmp_path.iterdir())


class _Counting(Solo):
    """A rank that counts its sums."""

    def __init__(self) -> None:
        self.sums = 0

    def sum_(self, *tensors: torch.Tensor) -> None:
        self.sums += 1


def test_the_search_is_for_all_ranks_together() -> None:
    alone = _Counting()
    METHOD.search(network(), CrossEntropy(), speech(), communicator=alone)
    assert alone.sums >= 3 * 4  # of each gradient of three rates at least


@pytest.mark.distributed
def test_ranks_find_together_what_one_finds(tmp_path: Path) -> None:
    alone = found_by(Solo(), tmp_path / "alone", METHOD)
    for name in ("first", "again"):
        assert ranks.run(tmp_path, 2, found_by, tmp_path / "both", METHOD) == [alone, alone], name


def test_the_optimiser_is_of_the_options_and_averages_after_a_share_of_the_run() -> None:
    method = AveragedSGDMethod(lr=0.5, a=0.1, power=2 / 3, start=0.25, every=3, weight_decay=0.01)
    optimizer = method.build(network())
    assert isinstance(optimizer, AveragedSGD)
    scheduler = method.schedule(optimizer, 200)
    expected = {"lr": 0.5, "eta0": 0.5, "a": 0.1, "power": 2 / 3, "start": 50, "every": 3, "weight_decay": 0.01}
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_rate_that_was_not_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="lr=None: give a rate, or the method that quadric"):
        METHOD.build(network())


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"a": -1.0}, {"power": -1.0}, {"start": 1.0}, {"every": 0}, {"search_frames": 0}, {"every": 1.5}],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AveragedSGDMethod(**options)


@dataclass(frozen=True)
class Points(Task):
    """Points in a plane, and the side of a line they are on, sometimes the other."""

    def load(self, device: torch.device, *, seed: int, shard: tuple[int, int]) -> Material:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 2, generator=generator)
        side = (x.sum(1) + 0.5 * torch.randn(300, generator=generator) > 0).long()
        train = ExampleStream(x, side, seed=seed, shard=shard)
        known = ExampleStream(x, side)
        return Material(lambda: nn.Linear(2, 2), CrossEntropy(), train, known, known, None)


def job() -> TaskJob:
    job = TaskJob("points", Points(), None, None, AveragedSGDMethod(gradient_frames=4), evaluations=4, device="cpu")
    assert list(job.methods) == ["averaged_sgd"]
    return job


def stop_at(update: int) -> Callable[..., Any]:
    def progress(items: Any, *, total: int | None, what: str) -> Any:
        for item in items:
            if item == update:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.speech
def test_a_job_searches_its_rate_once_and_tells_the_average(tmp_path: Path) -> None:
    result = compare(job(), tmp_path)
    folder = (tmp_path / "averaged_sgd").resolve()
    told = json.loads((folder / "results.json").read_text())
    assert told["last_dev_loss"] == pytest.approx(told["last_train_loss"])
    assert result.lines[0].startswith("averaged_sgd: training loss") and told["last_dev_loss"] < 0.35
    looks = [record["dev_loss"] for record in MetricsLog(folder / "metrics.jsonl").records()]
    assert told["dev_loss"] == pytest.approx(min(looks), rel=1e-6)
    assert told["last_dev_loss"] == pytest.approx(looks[-1], rel=1e-6)
    found = json.loads((folder / "found.json").read_text())["options"]
    state = checkpoint.load(folder / "model.pt")
    (folder / "results.json").unlink()
    assert compare(job(), tmp_path).lines == result.lines
    assert json.loads((folder / "found.json").read_text())["options"] == found

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        compare(job(), broken, progress=stop_at(20))
    compare(job(), broken)
    again = checkpoint.load(broken / "averaged_sgd" / "model.pt")
    assert all(torch.equal(again["model"][name], value) for name, value in state["model"].items())


@pytest.mark.speech
def test_the_command_line_sets_it_and_takes_other_optimisers_that_average() -> None:
    changed = override(job(), ["averaged.lr=0.5", "averaged.start=0.2", "first_order.optimizer=ASGD"])
    assert changed.averaged == replace(job().averaged, lr=0.5, start=0.2)  # type: ignore[type-var]
    assert changed.first_order is not None and changed.first_order.optimizer is torch.optim.ASGD
    assert set(changed.methods) == {"asgd", "averaged_sgd"}
    bare = override(replace(job(), first_order=FirstOrder(), averaged=None), ["averaged.epochs=2"])
    assert bare.averaged == AveragedSGDMethod(epochs=2)
    kind = pytest.importorskip("schedulefree").SGDScheduleFree
    free = override(job(), ["first_order.optimizer=schedulefree.SGDScheduleFree", "first_order.lr=1"]).first_order
    assert free is not None and free.optimizer is kind and free.name == "sgdschedulefree"
