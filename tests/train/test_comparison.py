"""Jobs that are not speech: trained by several methods, once, gone on with after a stop, and reported."""

from __future__ import annotations

import gzip
import json
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quadric.cli import main
from quadric.data.examples import ExampleStream
from quadric.loss.loss import CrossEntropy
from quadric.optim.block_diagonal import BlockDiagonal
from quadric.recipes import autoencoder, cifar10, citations
from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.comparison import JOB, compare
from quadric.train.method import FirstOrder, HessianFree
from quadric.train.task import Autoencoding, Citations, Material, Task, TaskJob
from quadric.train.trainer import Interrupted

pytestmark = pytest.mark.speech  # the command line and the report need its extra

FIRST = FirstOrder(epochs=1, gradient_frames=2, lr=0.01, warmup=0.0)
BLOCKS = BlockDiagonalMethod(epochs=12, gradient_frames=2, lr=0.05, damping=0.3, warmup=0.0)


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """Two clusters of nodes whose features tell little, and whose edges tell all."""
    rng = np.random.default_rng(0)
    nodes, half = 40, 20
    labels = np.repeat([0, 1], half)
    features = (rng.random((nodes, 12)) < 0.2) | (np.arange(12) == labels[:, None] * 5)
    edges = np.array([(a, b) for a in range(nodes) for b in range(a) if labels[a] == labels[b] and rng.random() < 0.3])
    order = rng.permutation(nodes)
    folder = tmp_path / "graphs"
    folder.mkdir()
    rows, columns = np.nonzero(features)
    np.savez(
        folder / "cora.npz",
        **planetoid(edges, rows, columns, features.shape, labels, (order[:10], order[10:20], order[20:])),
    )
    return folder


def planetoid(edges: Any, rows: Any, columns: Any, shape: Any, labels: Any, sets: Any) -> dict[str, Any]:
    """The arrays of a file that `read_planetoid` reads."""
    starts = np.searchsorted(rows, np.arange(shape[0] + 1))
    return {
        "edges": edges.astype(np.int32),
        "indptr": starts.astype(np.int32),
        "indices": columns.astype(np.int32),
        "values": np.ones(len(columns), np.float32),
        "shape": np.array(shape),
        "labels": labels.astype(np.int64),
        "train_idx": sets[0].astype(np.int64),
        "val_idx": sets[1].astype(np.int64),
        "test_idx": sets[2].astype(np.int64),
    }


def job(graphs: Path, **options: Any) -> TaskJob:
    task = Citations(graphs, hidden=8, dropout=0.0)
    return replace(TaskJob("graph", task, FIRST, BLOCKS, evaluations=3, device="cpu"), **options)


def test_a_job_compares_its_trainings_and_reports(graphs: Path, tmp_path: Path) -> None:
    result = compare(job(graphs), tmp_path / "work")
    assert [line.split(":")[0] for line in result.lines] == ["adamw", "mini_block_fisher"]
    assert all("test accuracy" in line and "updates" in line for line in result.lines)
    kept = json.loads((tmp_path / "work" / JOB).read_text())
    adam, blocks = kept["results"]["adamw"], kept["results"]["mini_block_fisher"]
    assert blocks["last_train_loss"] < adam["last_train_loss"] < 0.8
    assert (adam["updates"], blocks["updates"]) == (1, 12)
    page = result.report.read_text()
    assert "mini_block_fisher" in page and "held-out loss" in page


def test_what_is_done_is_not_done_again(graphs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = compare(job(graphs), work)
    logs = {path: path.read_bytes() for path in work.glob("*/metrics.jsonl")}
    again = compare(job(graphs), work)
    assert again.lines == first.lines
    assert logs and all(path.read_bytes() == held for path, held in logs.items())
    other = compare(job(graphs, block_diagonal=replace(BLOCKS, kind="kfac")), work)
    assert other.lines[0] == first.lines[0] and other.lines[1].startswith("kfac: ")


def best(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "model.pt")["model"])


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, others[name]) for name, value in some.items())


@dataclass(frozen=True)
class Points(Task):
    """Points in a plane that are drawn, and the side of a line they are on."""

    def load(self, device: torch.device, *, seed: int, shard: tuple[int, int]) -> Material:
        x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
        side = (x.sum(1) > 0).long()
        train = ExampleStream(x, side, seed=seed, shard=shard)
        known = ExampleStream(x, side)
        return Material(lambda: nn.Linear(2, 2), CrossEntropy(), train, known, known, None)


def test_every_training_begins_where_the_data_does(tmp_path: Path) -> None:
    """That before it has left the stream half-way: the second has seen the same minibatches as it has alone."""
    both = TaskJob("points", Points(), replace(FIRST, epochs=1.5, gradient_frames=7), replace(BLOCKS, epochs=2))
    both = replace(both, device="cpu", evaluations=2)
    compare(both, tmp_path / "both")
    compare(replace(both, first_order=None), tmp_path / "alone")
    assert same(*(best(tmp_path / name / "mini_block_fisher") for name in ("both", "alone")))


@pytest.mark.parametrize("options", [{"seed": 1}, {"autocast": True}])
def test_another_seed_or_precision_is_another_training(options: dict[str, Any], graphs: Path, tmp_path: Path) -> None:
    one = job(graphs, first_order=replace(FIRST, epochs=3), block_diagonal=None)
    other = replace(one, **options)
    compare(one, tmp_path / "work")
    compare(other, tmp_path / "fresh")
    before, wanted = (best(tmp_path / name / "adamw") for name in ("work", "fresh"))
    compare(other, tmp_path / "work")
    after = best(tmp_path / "work" / "adamw")
    assert same(after, wanted) and not same(after, before)
    compare(one, tmp_path / "work")
    assert same(best(tmp_path / "work" / "adamw"), before)


def test_a_training_that_was_stopped_goes_on_to_the_same_end(graphs: Path, tmp_path: Path) -> None:
    """With statistics, inverses and momentum: the parameters are the same to the bit."""
    assert threading.current_thread() is threading.main_thread()
    updates = []

    def stopping(items: Iterable[Any], *, total: int | None, what: str) -> Iterator[Any]:
        for item in items:
            updates.append(item)
            if item == 5:
                signal.raise_signal(signal.SIGINT)
            yield item

    only = job(graphs, first_order=None)
    with pytest.raises(Interrupted, match="stopped after update 6 of 12"):
        compare(only, tmp_path / "stopped", progress=stopping)
    compare(only, tmp_path / "stopped", progress=stopping)
    assert updates == list(range(12))
    compare(only, tmp_path / "whole")
    states = [torch.load(tmp_path / name / "mini_block_fisher" / "model.pt") for name in ("stopped", "whole")]
    assert all(torch.equal(x, states[1]["model"][name]) for name, x in states[0]["model"].items())
    assert states[0]["loss"] == states[1]["loss"]


@pytest.mark.parametrize("kind", ["mini_block_fisher", "kfac", "kbfgs", "kbfgs_l", "shampoo", "tnt"])
def test_every_kind_trains(kind: Any, graphs: Path, tmp_path: Path) -> None:
    method = replace(BLOCKS, kind=kind, damping=None, lr=0.05, epochs=30)
    result = compare(job(graphs, first_order=None, block_diagonal=method), tmp_path / "work")
    kept = json.loads((tmp_path / "work" / JOB).read_text())["results"][kind]
    assert result.lines[0].startswith(f"{kind}: ")
    assert kept["last_train_loss"] < 0.5 and kept["updates"] == 30


@pytest.mark.parametrize("autocast", [False, True])
def test_second_order_methods_train_too(autocast: bool, graphs: Path, tmp_path: Path) -> None:
    method = HessianFree(epochs=12, gradient_frames=1, curvature_frames=1, max_steps=5)
    only = job(graphs, first_order=None, block_diagonal=None, hessian_free=method, autocast=autocast)
    compare(only, tmp_path / "work")
    kept = json.loads((tmp_path / "work" / JOB).read_text())["results"]["hessian_free"]
    assert kept["last_train_loss"] < 0.5


def test_the_options_reach_the_optimiser() -> None:
    method = BlockDiagonalMethod(
        kind="tnt", lr=0.3, momentum=0.5, weight_decay=0.1, damping=0.7, statistics=3, inverses=9, fisher="sampled"
    )
    made = method.build(nn.Linear(3, 2))
    assert isinstance(made, BlockDiagonal)
    (group,) = made.param_groups
    assert {name: group[name] for name in ("lr", "momentum", "weight_decay", "damping")} == {
        "lr": 0.3,
        "momentum": 0.5,
        "weight_decay": 0.1,
        "damping": 0.7,
    }
    assert (made.schedule.statistics, made.schedule.inverses, made.fisher) == (3, 9, "sampled")
    assert BlockDiagonalMethod(kind="tnt").build(nn.Linear(3, 2)).param_groups[0]["damping"] == 1.0
    made = BlockDiagonalMethod(lr=1.0, warmup=0.5, floor=0.1).build(nn.Linear(3, 2))
    schedule = BlockDiagonalMethod(lr=1.0, warmup=0.5, floor=0.1).schedule(made, 8)
    rates = []
    for _ in range(9):
        rates.append(made.param_groups[0]["lr"])
        made.param_groups[0]["params"][0].grad = torch.zeros(2, 3)
        made.step()
        schedule.step()
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[8] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adam"}, "kind=adam: must be 'mini_block_fisher' or"),
        ({"damping": 0.0}, "damping=0.0: must be positive"),
        ({"statistics": 0}, "statistics=0: must be positive"),
        ({"momentum": 1.0}, "momentum=1.0: must be at least 0"),
        ({"fisher": "true"}, "fisher=true: must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockDiagonalMethod(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device=tpu: give cpu"),
        ({"name": "a/b"}, "name=a/b: must"),
        ({"first_order": None, "block_diagonal": None}, "are all none"),
        ({"evaluations": 0}, "evaluations=0"),
    ],
)
def test_jobs_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TaskJob("graph", Autoencoding("curves")), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="torch finds no GPU here; give cpu, or auto"):
        TaskJob("graph", Autoencoding("curves"), device="cuda")


def test_an_autoencoder_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, pixels = tmp_path / "mnist", np.random.default_rng(0).integers(0, 256, (50_040, 28, 28), np.uint8)
    data.mkdir()
    for name, images in (("train", pixels), ("t10k", pixels[:30])):
        header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in images.shape)
        packed = gzip.compress(header + images.tobytes(), compresslevel=0)
        (data / f"{name}-images-idx3-ubyte.gz").write_bytes(packed)
    monkeypatch.chdir(tmp_path)
    options = ["task.divide=50", "first_order.epochs=0.002", "block_diagonal.epochs=0.002", "evaluations=1"]
    frames = ["first_order.gradient_frames=20", "block_diagonal.gradient_frames=20", "device=cpu"]
    line = ["train", "autoencoder", "images=mnist", f"data={data}", *options, *frames]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert "mini_block_fisher: training loss" in told and "test loss" in told and "5 updates" in told
    page = tmp_path / "exp" / "autoencoder-mnist" / "report.html"
    held = page.read_bytes()
    page.unlink()
    assert main(["report", str(page.parent)]) == 0 and page.read_bytes() == held
    assert main(["train", "autoencoder", "images=mnist"]) == 1
    assert "data=none: the images of mnist are read from files" in capsys.readouterr().err
    assert main([*line, "block_diagonal.dampng=1"]) == 1
    assert "did you mean damping" in capsys.readouterr().err
    assert main([*line, "network.sizes=[3]"]) == 1
    assert "recipe autoencoder has no argument or option 'network'" in capsys.readouterr().err
    for option in ("device=tpu: give cpu", "name=a/b: must be the plain name"):
        assert main([*line, option.split(":")[0]]) == 1
        told = capsys.readouterr().err
        assert option in told and told.count(option.split("=")[0] + "=") == 1, told


def test_presets_are_the_authors_networks_or_smaller() -> None:
    small, full = (autoencoder(preset=preset) for preset in ("small", "full"))
    assert (small.task.divide, full.task.divide) == (2, 1)  # type: ignore[attr-defined]
    assert small.block_diagonal.epochs == 20 and full.block_diagonal.epochs == 150  # type: ignore[union-attr]
    for network, width, whole in (("resnet32", 8, 16), ("vgg16", 16, 64)):
        jobs = [cifar10(Path("d"), network, preset) for preset in ("small", "full")]  # type: ignore[arg-type]
        assert [made.task.width for made in jobs] == [width, whole]  # type: ignore[attr-defined]
        assert all(made.block_diagonal.statistics == 10 for made in jobs)  # type: ignore[union-attr]
    assert citations(Path("d"), "citeseer").name == "citations-citeseer"


def test_a_graph_is_not_shared_out(graphs: Path) -> None:
    with pytest.raises(ValueError, match="2 ranks: a graph is one piece"):
        Citations(graphs).load(torch.device("cpu"), seed=0, shard=(0, 2))
