"""Asynchronous training with real processes and real kills: what is applied is applied once, and nobody waits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import TESTS, environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

Told = dict[str, Any]


class Job:
    """A process of `reference.asynchronous_job`, and what it has said so far."""

    def __init__(self, folder: Path, **options: Any) -> None:
        script = TESTS / "reference" / "asynchronous_job.py"
        self.folder, self.said, self._rest = folder, list[Told](), ""
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder), json.dumps(options)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=(folder.parent / "stderr").open("ab"),
            text=True,
        )

    def until(self, holds: Callable[[Told], Any]) -> Told:
        """Reads on until it says something of which ``holds`` is true."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.said.append(json.loads(line))
                if holds(self.said[-1]):
                    return self.said[-1]
        raise AssertionError(f"it ended: {(self.folder.parent / 'stderr').read_text()[-2000:]}")

    def end(self) -> Told:
        """The last thing that it says."""
        told = self.until(lambda told: told.keys() & {"best", "interrupted", "error"})
        assert self.process.wait(60) == 0
        return told

    def settled(self) -> int:
        return len({unit for told in self.said for _, unit, _ in told.get("reports", [])})

    @property
    def counts(self) -> list[Told]:
        """Of the shards, as last told."""
        return next(told["counts"] for told in reversed(self.said) if told.get("counts"))

    def news(self) -> str:
        return "\n".join(sentence for told in self.said for sentence in told.get("news", []))

    def processes(self) -> set[int]:
        """All workers and shards that it has told of."""
        shards = {count["pid"] for told in self.said for count in told.get("counts", [])}
        return shards | {pid for told in self.said for pid in told.get("workers", {}).values() if pid}

    def underway(self, workers: frozenset[int] = frozenset({0, 1}), units: int = 30) -> Told:
        """Reads until so many units were reported, by all of these workers."""

        def all_of_them(told: Told) -> bool:
            seen = {worker for each in self.said for worker, _, _ in each.get("reports", [])}
            return self.settled() >= units and seen == workers

        return self.until(all_of_them)

    def hurry(self) -> None:
        """From now on minibatches take no more time than they must."""
        (self.folder.parent / "hurry").touch()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def started(**options: Any) -> Job:
        jobs.append(Job(tmp_path / "training", **options))
        return jobs[-1]

    yield started
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
        job.process.wait()
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(json.loads((tmp_path / "training" / "ray" / "ray.json").read_text())["pid"], signal.SIGTERM)


def once_each(job: Job, end: Told) -> None:
    """Each shard has applied every unit exactly once, as its own counts and its checkpoint tell."""
    assert [count["applied"] for count in job.counts] == [end["units"]] * len(job.counts)
    assert [count["clock"] for count in job.counts] == [end["units"]] * len(job.counts)


def test_workers_train_together_refuse_what_is_not_finite_and_leave_nothing_running(
    start: Callable[..., Job], alive: Callable[..., set[int]]
) -> None:
    """Though a shard is killed when all is done: its last checkpoint lacks pushes that were reported."""
    job = start(shards=2, seconds=0.0, warm=10, bad=6, norm=True, last_kill=True)
    end = job.end()
    assert "shard 0 was started again" in job.news() and job.said[-2]["lost"] > 0
    assert [count["life"] for count in job.counts] == [2, 1]
    first, second = job.counts
    assert first["not_finite"] == second["not_finite"] > 0
    assert [count["applied"] + count["not_finite"] for count in job.counts] == [end["units"]] * 2 == [200] * 2
    assert end["best"]["accuracy"] > 0.7
    assert json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])["update"] == 200
    warm = [worker for told in job.said for worker, unit, _ in told.get("reports", []) if unit < 10][:10]
    assert len(warm) == 10 and len(set(warm)) == 1, "the warm start is one worker's alone"
    assert not alive(job.processes(), patience=10)
    assert not (job.folder / "ray" / "token").exists()


def test_whoever_is_killed_or_stopped_nobody_waits_and_every_unit_counts_once(
    start: Callable[..., Job], alive: Callable[..., set[int]]
) -> None:
    """In one training: a worker is killed, then a shard, then a worker is stopped for good.

    Only this machine gets in, and only with the token.
    """
    job = start(shards=2, rows=30_000, seconds=0.02)
    job.underway()
    only_with_the_token(job)
    os.kill(job.said[-1]["workers"]["1"], signal.SIGKILL)
    job.until(lambda told: any("worker 1 died" in sentence for sentence in told.get("news", [])))
    since = len(job.said)
    job.until(lambda told: any("worker 1 is there" in sentence for sentence in told.get("news", [])))
    meanwhile = [worker for told in job.said[since:] for worker, _, _ in told.get("reports", [])]
    assert set(meanwhile) == {0} and len(meanwhile) > 5, "the other worker waited"
    job.until(lambda told: any(worker == 1 for worker, _, _ in told.get("reports", [])))

    os.kill(job.counts[1]["pid"], signal.SIGKILL)
    job.until(lambda told: any("shard 1 was started again" in sentence for sentence in told.get("news", [])))

    pid = job.said[-1]["workers"]["1"]
    os.kill(pid, signal.SIGSTOP)
    job.hurry()
    end = job.end()  # which would not come if anybody waited
    assert not alive(job.processes(), patience=10), "the worker that is stopped was left behind"
    once_each(job, end)
    assert [count["life"] for count in job.counts] == [1, 2]
    told = re.findall(r"shard 1 was started again: (\d+) pushes were lost", job.news())
    lost = sum(int(number) for number in told)  # some are found at the end: their reports came after the first count
    assert lost == max(told.get("lost", 0) for told in job.said) and 0 < lost <= end["units"]
    assert job.counts[0]["duplicate"] >= lost, "the shard that lived has what was done again already"
    assert end["best"]["accuracy"] > 0.7


def test_a_driver_is_killed_and_the_next_finds_the_server_and_is_stopped_and_the_last_goes_on(
    start: Callable[..., Job], alive: Callable[..., set[int]], request: pytest.FixtureRequest
) -> None:
    job = start(rows=12_000, seconds=0.02, norm=True)
    job.underway()
    job.process.kill()
    job.process.wait()

    second = start(rows=12_000, seconds=0.02, norm=True, workers=3)
    second.underway(frozenset({0, 1, 2}))
    assert [count["life"] for count in second.counts] == [1], "the shards were not those of the first driver"
    second.process.send_signal(signal.SIGINT)
    assert "the same command goes on from there" in second.end()["interrupted"]
    assert not alive(second.processes(), patience=10)
    assert not (job.folder / "ray" / "token").exists(), "the Ray of the first driver was not the second's"

    command = [sys.executable, "-c", "import time; time.sleep(600)", "ray"]
    bystander = subprocess.Popen(command, start_new_session=True)
    request.addfinalizer(bystander.kill)
    gone = {"pid": bystander.pid, "place": str(job.folder / "quadric-gone"), "address": "127.0.0.1:1"}
    (job.folder / "ray" / "ray.json").write_text(json.dumps(gone))  # as a Ray leaves it that has died, long ago
    last = start(rows=12_000, seconds=0.0, norm=True)
    end = last.end()
    assert bystander.poll() is None, "a process was killed that has the number of a Ray that has died"
    once_each(last, end)
    assert [count["life"] for count in last.counts] == [2]
    (mean, _, _), begun = second.said[-2]["statistics"], last.said[0]["statistics"]
    assert abs(mean) > 1e-3 and begun[0] == pytest.approx(mean, abs=0.5 * abs(mean)), "running statistics were lost"
    assert 0 < last.settled() <= end["units"] - job.settled() - second.settled(), "what was done was done again"
    assert last.settled() < end["units"] - second.settled() - 20


def test_workers_that_send_too_much_that_is_not_finite_are_dropped(start: Callable[..., Job]) -> None:
    job = start(bad=2000, rows=2600, seconds=0.0, not_finite=3)
    assert "all workers were dropped" in job.end()["error"]
    assert "worker 0 was dropped" in job.news() and "worker 1 was dropped" in job.news()


def only_with_the_token(job: Job) -> None:
    """The Ray of a job that is under way listens on the loopback interface alone, and lets in who has its token."""
    folder = job.folder / "ray"
    about, token = json.loads((folder / "ray.json").read_text()), folder / "token"
    assert token.stat().st_mode & 0o077 == 0
    assert Path(about["place"]).stat().st_mode & 0o077 == 0, "others reach the sockets within"
    assert set(listening(about["pid"])) | set(listening(job.process.pid)) == {"127.0.0.1"}
    script = "import os\nimport sys\nfrom quadric.parallel.cluster import welcomes\n"
    script += "print(welcomes(sys.argv[1], dict(os.environ)))"
    command = [sys.executable, "-c", script, about["address"]]
    for wanted, code in (("refused", "0" * 64), ("let in", token.read_text())):
        given = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=code)
        ran = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines()[-1] == wanted


def listening(session: int) -> list[str]:
    """The addresses of all sockets on which processes of a session listen."""
    owned = set()
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if os.getsid(int(process.name)) == session or session in ancestors(int(process.name)):
                owned |= {os.readlink(link) for link in (process / "fd").iterdir()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned:
                raw = bytes.fromhex(fields[1].split(":")[0])[-4:]
                found.append(".".join(str(byte) for byte in raw[::-1]))
    assert found, "no socket of the session was found"
    return found


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        found.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return found


def test_a_warm_start_whose_worker_is_stopped_goes_on_with_another(start: Callable[..., Job]) -> None:
    """Of workers with parameters of their own: the first is stopped in what it does first, the second later."""
    options = {"sends": "elastic", "every": 4, "optimizer": "SGD", "alpha": 0.3}
    job = start(**options, workers=4, rows=8000, seconds=0.3, warm=60, silent=4.0)
    told = job.until(lambda told: any(told.get("workers", {}).values()))
    first = min(number for number, pid in told["workers"].items() if pid)
    os.kill(told["workers"][first], signal.SIGSTOP)
    told = job.until(lambda told: told.get("reports"))
    second = str(told["reports"][0][0])
    assert second != first and "no worker has reported for 4 s" in job.news()
    os.kill(told["workers"][second], signal.SIGSTOP)
    job.hurry()
    end = job.end()
    once_each(job, end)
    by = [{w for told in job.said for w, unit, _ in told.get("reports", []) if (unit < 60) == warm} for warm in (1, 0)]
    assert len(by[0]) == 2 and len(by[1]) == 2, "one works alone, and after it all that are not stopped"
    assert {int(first), int(second)}.isdisjoint(by[1]) and int(first) not in by[0]
    assert end["best"]["accuracy"] > 0.6


def test_a_ray_that_has_died_is_told_and_what_is_lost_with_it_is_done_again(start: Callable[..., Job]) -> None:
    job = start(seconds=0.02, rows=20_000, shards=2)
    job.underway(units=150)  # more than a second's: a driver tells of some, and keeps that it has
    os.kill(json.loads((job.folder / "ray" / "ray.json").read_text())["pid"], signal.SIGKILL)
    assert "the Ray of this training has ended" in job.end()["error"]
    told = torch.load(job.folder / "driver.pt")["told"]
    second = start(seconds=0.0, rows=20_000, shards=2)
    end = second.end()
    once_each(second, end)
    assert 0 < end["lost"] <= told


def test_a_cluster_is_refused_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quadric.parallel.cluster import Cluster

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.17:6379")
    with pytest.raises(ValueError, match="no token for it: set RAY_AUTH_MODE=token"):
        Cluster(tmp_path, cpus=1)


def test_the_command_line_trains_a_recipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quadric", "train", "autoencoder", "images=curves", "--async", "--workers", "2"]
    command += ["averaged.lr=0.001", "averaged.epochs=0.2", "evaluations=1", "asynchronous.compression=bfloat16"]
    command += ["asynchronous.warm=2", "asynchronous.staleness=50", "asynchronous.clip=1e6"]
    given = {"env": environment(), "capture_output": True, "text": True, "cwd": tmp_path}
    ran = subprocess.run(command, **given, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "averaged_sgd: training loss" in ran.stdout and (tmp_path / "exp/autoencoder-curves/report.html").is_file()
    log = (tmp_path / "exp/autoencoder-curves/averaged_sgd/metrics.jsonl").read_text().splitlines()
    first, last = json.loads(log[0]), json.loads(log[-1])
    assert last["dev_loss"] < first["dev_loss"] and last["pushes_per_second"] > 0 and "%" in last["staleness"]
    again = subprocess.run(command, **given, check=True)
    assert again.stdout == ran.stdout and "worker" not in again.stderr, "what was done is not done again"
