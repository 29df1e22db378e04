from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quadric.comm.collective import Collective
from quadric.comm.communicator import Solo
from reference import ranks
from reference.ranks import Killed, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
SIZES = [1, 2, 7, 1000, 100_003]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_are_right_and_the_same_to_the_bit_on_every_rank(size: int, tmp_path: Path) -> None:
    results = run(tmp_path, size, ranks.sums, SIZES)
    assert all(result == results[0] for result in results)
    sums, sent = results[0]
    for n, (vector, number) in zip(SIZES, sums, strict=True):
        given = [ranks.numbers(rank, n) for rank in range(size)]
        expected = torch.stack([v.double() for v, _ in given]).sum(0)
        found = torch.frombuffer(bytearray(vector), dtype=torch.float32).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
        assert number == pytest.approx(sum(float(x) for _, x in given), rel=1e-14)
    assert sent == sum(4 * n + 8 for n in SIZES)


def test_a_broadcast_is_of_its_source_alone(tmp_path: Path) -> None:
    results = run(tmp_path, 3, ranks.broadcasts)
    assert [tensor for tensor, _ in results] == [[[0.0, 10.0], [1.0, 11.0]]] * 3
    assert [sent for _, sent in results] == [0, 0, 16]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 1.0, 1.0 + 2**-52], "disagree on it: ranks 0 and 1 have 1.0, rank 2 has 1.0000000000000002; start"),
        (["a", "b", "c"], "disagree on it: rank 0 has 'a', rank 1 has 'b', rank 2 has 'c'"),
        (["x" * 500 + "1", "x" * 500 + "2", "x" * 500], r"rank 0 has \.\.\.x{40}1', rank 1 has \.\.\.x{40}2'"),
    ],
)
def test_disagreement_is_told_to_every_rank(values: list[Any], message: str, tmp_path: Path) -> None:
    results = run(tmp_path, 3, ranks.agrees, values)
    assert [type(result) for result in results] == [ValueError] * 3
    for result in results:
        with pytest.raises(ValueError, match=message):
            raise result


def test_agreement_is_silent(tmp_path: Path) -> None:
    assert run(tmp_path, 3, ranks.agrees, [float("nan")] * 3) == [None] * 3


def test_each_rank_hears_what_all_say(tmp_path: Path) -> None:
    for texts in (["a", "", "ä\0ö\0"], ["", "", ""]):
        assert run(tmp_path, 3, ranks.says, texts) == [texts] * 3


def test_all_wait_for_the_first_as_long_as_it_takes(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for seen, said, seconds, total in run(
        tmp_path, 3, ranks.waits_for_first, tmp_path / "made", "works", timeout=ranks.PATIENCE
    ):
        assert (seen, said, total) == (["0"], "", 3.0) and seconds > ranks.PATIENCE + 0.9


def test_what_fails_on_the_first_is_told_to_all(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    own, *others = run(tmp_path, 3, ranks.waits_for_first, tmp_path / "made", "fails", timeout=ranks.PATIENCE)
    assert own[:2] == ([], "ValueError: the disk is on fire") and own[3] == 3.0
    for seen, said, _, total in others:
        assert said == "FirstFailed: the work, which rank 0 does for all, failed there: the disk is on fire"
        assert (seen, total) == ([], 3.0)


def test_the_others_find_what_the_first_has_made_and_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for rank, (found, seconds) in enumerate(
        run(tmp_path, 3, ranks.follows_the_first, tmp_path / "made", timeout=ranks.PATIENCE)
    ):
        assert found == ([] if rank == 0 else ["0"]) and seconds > ranks.PATIENCE + 0.9


def test_who_waits_for_the_first_learns_at_once_that_it_died(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    results = run(tmp_path, 4, ranks.waits_for_first, tmp_path / "made", "dies")
    assert results[0] is Killed
    for rank in (1, 2, 3):
        seen, said, seconds, _ = results[rank]
        assert said.startswith(f"RuntimeError: the work on rank {rank} of 4 failed: another rank died")
        assert seen == [] and seconds < ranks.PATIENCE + 6


def test_a_rank_killed_within_a_sum_leaves_every_tensor_as_it_was(tmp_path: Path) -> None:
    results = run(tmp_path, 3, ranks.dies_while_summing)
    assert results[1] is Killed
    for rank in (0, 2):
        message, again, intact, seconds = results[rank]
        assert message.startswith(f"a sum on rank {rank} of 3 failed: another rank died")
        assert "start all ranks again from the last checkpoint" in message
        assert again == f"a broadcast on rank {rank} of 3: impossible since a sum failed"
        assert intact and seconds < ranks.TIMEOUT


def test_a_silent_rank_ends_the_others_after_the_timeout(tmp_path: Path) -> None:
    results = run(tmp_path, 3, ranks.falls_silent, timeout=ranks.PATIENCE)
    for rank in (0, 2):
        message, value, seconds = results[rank]
        assert f"silent for {ranks.PATIENCE:g} s" in message
        assert value == rank + 1 and ranks.PATIENCE - 0.1 < seconds < ranks.PATIENCE + 5


def test_a_job_that_does_not_meet_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(RuntimeError, match=r"joining the job failed: not all ranks came within 1 s"):
        Collective(0, 2, f"file://{tmp_path}/meeting", timeout=1)


def test_misuse_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(ValueError, match="rank=2, size=2: give a rank from 0"):
        Collective(2, 2, f"file://{tmp_path}/a")
    with pytest.raises(ValueError, match="timeout=0"):
        Collective(0, 1, f"file://{tmp_path}/a", timeout=0)
    one = Collective(0, 1, f"file://{tmp_path}/b")
    with pytest.raises(ValueError, match=r"belongs to a torch\.distributed job already"):
        Collective(0, 1, f"file://{tmp_path}/c")
    one.close()
    with pytest.raises(RuntimeError, match="a sum on rank 0 of 1: impossible since the job was left"):
        one.sum_(torch.ones(1))
    Collective(0, 1, f"file://{tmp_path}/d").close()  # a process may join another job after leaving one


def test_without_torchrun_one_is_alone() -> None:
    communicator = Collective.from_environment()
    assert isinstance(communicator, Solo)


def test_torchrun_tells_who_one_is(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import torch\n"
        "from quadric.comm.collective import Collective\n"
        "with Collective.from_environment(timeout=20) as c:\n"
        "    total = torch.tensor([c.rank + 1.0])\n"
        "    c.sum_(total)\n"
        f"    open(f'{tmp_path}/{{c.rank}}', 'w').write(f'{{c.size}} {{total.item()}}')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(script)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2 3.0", "2 3.0"]
