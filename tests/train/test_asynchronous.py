"""Options of asynchronous training, and what they refuse; the training itself is in ``tests/distributed``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quadric import cli
from quadric.data.examples import ExampleStream
from quadric.loss.loss import CrossEntropy
from quadric.parallel.exchange import NO_UNIT, Push, Verdict
from quadric.parallel.shard import Shard, begin
from quadric.parallel.worker import Elastic, Gradients, OuterSteps
from quadric.train import checkpoint
from quadric.train.asynchronous import Asynchronous, asynchronous_key, check_methods
from quadric.train.asynchronous_trainer import AsynchronousTrainer
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.method import FirstOrder, HessianFree, Method
from quadric.train.task import Autoencoding, TaskJob


def trainer(method: Method, folder: Path, **options: Any) -> AsynchronousTrainer:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    stream = ExampleStream(torch.randn(50, 3), torch.arange(50) % 2)
    return AsynchronousTrainer(model, CrossEntropy(), method, stream, None, Asynchronous(**options), folder)


@pytest.mark.parametrize(
    "method",
    [
        FirstOrder(optimizer=torch.optim.LBFGS, gradient_frames=10),
        BlockDiagonalMethod(kind="kbfgs", gradient_frames=10),
        BlockDiagonalMethod(kind="kfac", gradient_frames=10),
        HessianFree(),
    ],
    ids=lambda method: method.name,
)
def test_an_optimiser_that_needs_more_than_gradients_is_refused(method: Method, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot step on gradients alone, .* take another, such as averaged_sgd"):
        trainer(method, tmp_path)


def test_what_server_and_driver_have_lost_together_counts(tmp_path: Path) -> None:
    made = trainer(AveragedSGDMethod(lr=0.1), tmp_path)
    made._state["told"] = 30
    made._tell_lost(30)
    assert made._state["lost"] == 0
    made._tell_lost(18)
    assert made._state["lost"] == 12


def test_a_damaged_checkpoint_of_the_server_is_named_with_the_remedy(tmp_path: Path) -> None:
    pytest.importorskip("quadric.parallel.engine", reason="asynchronous training needs ray", exc_type=ImportError)
    made = trainer(AveragedSGDMethod(lr=0.1), tmp_path)
    begin(made.model, tmp_path / "server" / "shard-0", units=len(made.units))
    for file in (tmp_path / "server" / "shard-0").rglob("*.distcp"):
        os.truncate(file, 100)
    with pytest.raises(ValueError, match=rf"checkpoints in {tmp_path}/server do not serve .*: delete {tmp_path}, and"):
        made._server()


@pytest.mark.parametrize(
    "method",
    [
        AveragedSGDMethod(lr=0.1),
        FirstOrder(),
        FirstOrder(optimizer=torch.optim.SGD, arguments={"momentum": 0.9, "nesterov": True}),
        BlockDiagonalMethod(),
        BlockDiagonalMethod(kind="shampoo"),
        BlockDiagonalMethod(kind="tnt"),
    ],
    ids=lambda method: method.name,
)
def test_a_first_order_optimiser_is_the_servers_rule(method: Method, tmp_path: Path) -> None:
    made = trainer(method, tmp_path)
    rule, schedule = made.options.rule(method, len(made.units))
    optimizer = rule(made.model)
    assert schedule is not None and schedule(optimizer).optimizer is optimizer
    assert type(optimizer) is type(method.build(made.model))


def test_what_is_sent_decides_who_steps_by_what() -> None:
    method = FirstOrder()
    model = nn.Linear(2, 2)
    assert isinstance(Asynchronous().strategy(method, 10), Gradients)
    elastic = Asynchronous(sends="elastic", alpha=0.2)
    strategy = elastic.strategy(method, 10)
    assert isinstance(strategy, Elastic) and strategy.alpha == 0.2
    assert isinstance(strategy.inner(model), torch.optim.AdamW)
    rule, schedule = elastic.rule(method, 10)
    assert rule(model).param_groups[0]["lr"] == 1.0 and schedule is None
    outer = Asynchronous(sends="outer", outer_lr=0.6, outer_momentum=0.8)
    assert isinstance(outer.strategy(method, 10), OuterSteps)
    group = outer.rule(method, 10)[0](model).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.6, 0.8, True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "workers=0: must be positive"),
        ({"shards": 1.5}, "shards=1.5: give a whole number"),
        ({"every": 0}, "every=0: must be positive"),
        ({"sends": "letters"}, "sends=letters: must be 'gradients' or 'elastic' or 'outer'"),
        ({"alpha": 1.5}, "alpha=1.5: must be between 0 and 1"),
        ({"outer_lr": 0.0}, "outer_lr=0.0: must be positive"),
        ({"outer_momentum": 1.5}, "outer_momentum=1.5: must be"),
        ({"warm": -1}, "warm=-1: must not be negative"),
        ({"clip": 0.0}, "clip=0.0: must be positive"),
        ({"staleness": -1}, "staleness=-1: must not be negative"),
        ({"not_finite": -1}, "not_finite=-1: must not be negative"),
        ({"whole": -1}, "whole=-1: must not be negative"),
        ({"compression": "zip"}, "compression=zip: must be"),
        ({"share": 0.0}, "share=0.0: must be more than 0"),
        ({"rank": 0}, "rank=0: must be positive"),
        ({"sends": "elastic", "clip": 1.0}, "clip=1.0: elastic averaging draws both sides alike"),
        ({"sends": "elastic", "scaled": True}, "scaled=True: elastic averaging draws both sides alike"),
        ({"sends": "elastic", "compression": "adacomp"}, "compression=adacomp: elastic averaging draws both"),
        ({"alpha": 0.3}, "alpha=0.3 has no effect with sends=gradients: leave it out, or give sends=elastic$"),
        ({"outer_lr": 0.3}, "outer_lr=0.3 has no effect with sends=gradients: .* sends=outer$"),
        ({"sends": "elastic", "outer_momentum": 0.3}, "outer_momentum=0.3 has no effect with sends=elastic"),
        ({"whole": 10}, r"whole=10 has no effect with compression=none: .* compression=adacomp\|scalecom\|powersgd"),
        ({"compression": "adacomp", "share": 0.1}, "share=0.1 has no effect with compression=adacomp"),
        ({"compression": "scalecom", "rank": 2}, "rank=2 has no effect with compression=scalecom"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Asynchronous(**options)


def test_the_number_of_workers_is_no_part_of_what_a_training_is() -> None:
    assert asynchronous_key(Asynchronous(workers=2)) == asynchronous_key(Asynchronous(workers=5))
    assert asynchronous_key(Asynchronous(every=2)) != asynchronous_key(Asynchronous())
    assert asynchronous_key(None) == ()


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    first = trainer(AveragedSGDMethod(lr=0.1, gradient_frames=10), tmp_path)
    checkpoint.save(first._state, tmp_path / "driver.pt")
    second = trainer(AveragedSGDMethod(lr=0.2, gradient_frames=10), tmp_path)
    with pytest.raises(ValueError, match="of other data or options is there; choose another folder"):
        second.fit()


def test_second_order_trainings_are_refused() -> None:
    with pytest.raises(
        ValueError, match="hessian_free takes steps that no parameter server can: leave out with hessian_free=none"
    ):
        TaskJob("a", Autoencoding("curves"), hessian_free=HessianFree(), asynchronous=Asynchronous())


@pytest.mark.parametrize("sends", ["elastic", "outer"])
@pytest.mark.parametrize(
    "method", [AveragedSGDMethod(lr=0.1), FirstOrder(optimizer=torch.optim.ASGD)], ids=lambda method: method.name
)
def test_an_average_is_kept_where_gradients_go(sends: Any, method: Method) -> None:
    with pytest.raises(ValueError, match=f"asynchronous.sends={sends}: {method.name} averages where the server is"):
        check_methods(Asynchronous(sends=sends), {method.name: method})
    check_methods(Asynchronous(), {method.name: method})


def test_a_schedule_free_optimiser_is_a_rule(tmp_path: Path) -> None:
    free = pytest.importorskip("schedulefree", reason="pip install schedulefree")
    method = FirstOrder(optimizer=free.SGDScheduleFree, gradient_frames=10)
    made = trainer(method, tmp_path)
    begin(made.model, tmp_path / "shard")
    shard = Shard(made.model, made.options.rule(method, 5)[0], folder=tmp_path / "shard")
    pulled = shard.pull()
    for sequence in range(3):
        answer = shard.push(Push(0, 1, sequence, NO_UNIT, pulled.life, 0, np.ones(shard.size, np.float32)))
        assert answer.verdict is Verdict.APPLIED
    assert not (shard.average() == answer.theta).all()
    with pytest.raises(ValueError, match="averages where the server is"):
        check_methods(Asynchronous(sends="outer"), {"free": method})


def test_the_command_lines_flags_stand_for_options() -> None:
    parsed = cli._parser().parse_args(["train", "autoencoder", "images=curves", "--async", "--workers", "3"])
    job = cli.make_job("autoencoder", [*cli._asynchronously(parsed), *parsed.overrides])
    assert list(job.methods) == ["averaged_sgd"]
    assert job.asynchronous is not None and job.asynchronous.workers == 3
    none = cli._parser().parse_args(["train", "autoencoder", "images=curves", "--async", "--workers", "0"])
    with pytest.raises(ValueError, match=r"workers=0: must be positive"):
        cli.make_job("autoencoder", [*cli._asynchronously(none), *none.overrides])
    alone = cli._parser().parse_args(["train", "autoencoder", "--workers", "3"])
    with pytest.raises(ValueError, match="--workers 3: is of asynchronous training; give --async as well"):
        cli._asynchronously(alone)
