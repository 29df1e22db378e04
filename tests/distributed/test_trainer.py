"""The training loop over several ranks."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quadric.comm import checkpoint as together
from quadric.comm.communicator import Solo
from quadric.train.metrics import MetricsLog
from quadric.train.trainer import Diverged, Interrupted
from reference import trainings
from reference.ranks import Killed, run
from reference.trainings import Trained

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def vector(trained: Trained, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.frombuffer(bytearray(trained.parameters), dtype=dtype)


def records(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if not key.endswith("seconds")}
        for record in MetricsLog(folder / "metrics.jsonl").records()
    ]


def check_close(found: list[dict], expected: list[dict]) -> None:
    """What was trained on and what came of it. How long a search took for it may hang on a rounding."""
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        keys = b.keys() & {"update", "epoch", "value", "objective", "damping", "gradient_frames", "curvature_frames"}
        keys |= {key for key in b if key.startswith("dev_")}
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Trained]]:
    """The folder of a training on two ranks by a method, and what the ranks know."""

    @functools.cache
    def train(method: str) -> tuple[Path, Trained]:
        folder = tmp_path_factory.mktemp("undisturbed")
        first, second = run(folder, 2, trainings.trains, folder / "shared", method)
        assert first[:4] == second[:4]
        return folder / "shared", first

    return train


@pytest.mark.parametrize("method", trainings.METHODS)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_does(size: int, method: str, tmp_path: Path) -> None:
    alone = trainings.trains_alone(tmp_path / "alone", method, precise=True)
    start = time.monotonic()
    results = run(tmp_path, size, functools.partial(trainings.trains, precise=True), tmp_path / "shared", method)
    assert together.load(tmp_path / "shared" / "state", Solo())["seconds"] < time.monotonic() - start
    assert sum(result.judged for result in results) == alone.judged > max(result.judged for result in results)
    for result in results:
        assert result[:4] == results[0][:4]  # to the bit
    assert results[0].updates == alone.updates
    found, expected = (vector(each, torch.float64) for each in (results[0], alone))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert results[0].scores == pytest.approx(alone.scores, rel=1e-6)
    check_close(records(tmp_path / "shared"), records(tmp_path / "alone"))
    assert results[0].best < 0.8 * records(tmp_path / "alone")[0]["dev_loss"]


def test_an_utterance_is_an_update_on_any_number_of_ranks(tmp_path: Path) -> None:
    """One rank has it, and the other no minibatch."""
    alone = trainings.trains_alone(tmp_path / "alone", trainings.UTTERANCES)
    first, second = run(tmp_path, 2, trainings.trains, tmp_path / "shared", trainings.UTTERANCES)
    assert first[:4] == second[:4] and first.updates == alone.updates == 2 * 12
    torch.testing.assert_close(vector(first), vector(alone), rtol=0, atol=1e-6)
    check_close(records(tmp_path / "shared"), records(tmp_path / "alone"))
    assert records(tmp_path / "shared")[-1]["epoch"] == 2.0
    assert first.best < 0.8 * records(tmp_path / "alone")[0]["dev_loss"]


def test_patience_ends_all_ranks_after_the_same_update(
    undisturbed: Callable[[str], tuple[Path, Trained]], tmp_path: Path
) -> None:
    """Also where they were stopped when half of it had passed."""
    straight, expected = undisturbed(trainings.PATIENT)
    *before, last = [record for record in records(straight) if "dev_loss" in record]
    assert re.fullmatch(rf"no lower .* in 2 looks: ended after update {expected.updates} of 76", last["ended"])
    assert not any("ended" in record for record in before)
    losses = [record["dev_loss"] for record in (*before, last)]
    assert min(losses) == losses[-3] == expected.best and len(losses) < 40
    event = (1, before[-1]["update"], trainings.terminate)
    for result in run(tmp_path, 2, trainings.trains, tmp_path / "broken", trainings.PATIENT, event):
        assert isinstance(result, Interrupted)
    assert together.load(tmp_path / "broken" / "state", Solo())["stale"] == 1
    resumed = run(tmp_path, 2, trainings.trains, tmp_path / "broken", trainings.PATIENT)
    assert all(result[:4] == expected[:4] for result in resumed)
    assert records(tmp_path / "broken") == records(straight)
    alone = trainings.trains_alone(tmp_path / "alone", trainings.PATIENT)
    assert alone.updates == expected.updates


def test_only_the_first_rank_writes_more_than_its_part_of_the_state(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    results = run(tmp_path, 2, trainings.trains, folder, "AdamW")
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "model.pt", "state"]
    first, second = (
        {Path(name).name if name.endswith(".distcp") else Path(name).name.split(".0.")[0] for name in result.opened}
        for result in results
    )
    assert second == {"__1_0.distcp"}
    assert any("model.pt" in name for name in first) and "metrics.jsonl" in first


@pytest.mark.parametrize("method", trainings.METHODS)
def test_a_request_on_one_rank_stops_all_after_the_same_update(
    method: str, undisturbed: Callable[[str], tuple[Path, Trained]], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    straight, expected = undisturbed(method)
    for result in run(tmp_path, 2, trainings.trains, folder, method, (1, 3, trainings.terminate)):
        with pytest.raises(Interrupted, match=rf"stopped after update 4 of \d+, saved in {folder}: the same command"):
            raise result
    shutil.copytree(folder, tmp_path / "alone")
    resumed = run(tmp_path, 2, trainings.trains, folder, method)
    assert all(result[:4] == expected[:4] for result in resumed)
    assert records(folder) == records(straight)
    alone = trainings.trains_alone(tmp_path / "alone", method)
    torch.testing.assert_close(vector(alone), vector(expected), rtol=0, atol=1e-6)
    check_close(records(tmp_path / "alone"), records(folder))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_checkpoint_stays(
    rank: int, undisturbed: Callable[[str], tuple[Path, Trained]], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    straight, expected = undisturbed("hessian_free")
    results = run(tmp_path, 2, trainings.trains, folder, "hessian_free", (rank, 4, trainings.kill), True)
    assert results.pop(rank) is Killed
    for result in results:
        with pytest.raises(RuntimeError, match=r"another rank died.*start all ranks again from the last checkpoint"):
            raise result
    assert together.load(folder / "state", Solo())["update"] == 4
    resumed = run(tmp_path, 2, trainings.trains, folder, "hessian_free")
    assert all(result[:4] == expected[:4] for result in resumed)
    assert records(folder) == records(straight)


def test_torchrun_restarts_ranks_that_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tests}:{tests.parent}",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    found = {}
    for name, falls in (("straight", "0"), ("fallen", "1")):
        (tmp_path / name).mkdir()
        job = [str(tests / "reference" / "elastic_job.py"), str(tmp_path / name), falls]
        ended = subprocess.run(
            [*command, *job], env=environment, capture_output=True, text=True, timeout=50, check=False
        )
        assert ended.returncode == 0, ended.stderr
        found[name] = {rank: (tmp_path / name / f"rank-{rank}").read_bytes() for rank in range(2)}
    assert (tmp_path / "fallen" / "fallen").exists()
    assert found["fallen"] == found["straight"] and found["straight"][0] == found["straight"][1]
    assert records(tmp_path / "fallen" / "training") == records(tmp_path / "straight" / "training")


def test_running_statistics_are_those_of_all_ranks(tmp_path: Path) -> None:
    (mean, variance, count), *others = (
        result.buffers for result in run(tmp_path, 2, trainings.trains, tmp_path / "shared", "AdamW", normalise=True)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, (mean, variance, count), strict=True))
    assert count > 0 and 0 < mean.abs().max() < 1 and variance.min() > 0.5


def test_a_diverged_training_ends_all_ranks_alike(tmp_path: Path) -> None:
    results = run(tmp_path, 2, trainings.trains, tmp_path / "shared", "AdamW", lr=1e30)
    for result in results:
        with pytest.raises(Diverged, match=r"lower the learning rate"):
            raise result
    assert str(results[0]) == str(results[1])


def test_ranks_that_train_otherwise_are_refused(tmp_path: Path) -> None:
    ways = {
        "plan": ("the training", "gradient=130", "gradient=131"),
        "activation": ("the model's layers", r"Tanh\(\)", r"ReLU\(\)"),
        "dropout": ("the model's layers", "p=0.25", "p=0.5"),
        "loss": ("the loss", "CrossEntropy", "Bernoulli"),
        "scale": ("the loss", r"FullSum\(.* scale=0.5", "scale=0.6"),
        "method": ("the optimiser", "AdamW", "NAdam"),
        "lr": ("the optimiser", "'lr': 0.00999", "'lr': 0.01000"),
        "max_steps": ("the optimiser", "max_steps=5", "max_steps=6"),
        "search": ("the optimiser", "shrink=0.5", "shrink=0.7"),
        "rule": ("the optimiser", "AfterRejection", "Fixed"),
        "preconditioner": ("the optimiser", "None", "SharedCounts"),
    }
    first, second = run(tmp_path, 2, trainings.refusals, tmp_path / "shared", list(ways))
    assert first == second
    for message, (what, one, other) in zip(first, ways.values(), strict=True):
        assert re.fullmatch(rf"the ranks disagree on {what}: rank 0 has .*{one}.*, rank 1 has .*{other}.*", message)
        assert len(message) < 400


def test_places_in_memory_need_not_be_the_same(tmp_path: Path) -> None:
    assert run(tmp_path, 2, trainings.trains_otherwise, tmp_path / "shared", "address") == [None, None]


def test_a_rank_with_the_data_of_another_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, 2, trainings.trains_with_the_shard_of_rank_0, tmp_path / "shared")[1]
    with pytest.raises(ValueError, match=r"stream has the shard \(0, 1\) on the rank \(1, 2\): give it shard=\(1, 2\)"):
        raise result
