"""Joining a cluster that is there already: on the loopback interface, with its token and without."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

JOIN = """
import os, sys
from pathlib import Path
from quadric.parallel.cluster import Cluster
from quadric.parallel.engine import ray
try:
    cluster = Cluster(Path(sys.argv[1]), cpus=1)
except ValueError as error:
    print("refused:", error)
else:
    print("joined", cluster.own, ray.get(ray.remote(lambda: 7).options(num_cpus=0).remote()))
    cluster.leave()
    print("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ, os.environ["RAY_ADDRESS"] == sys.argv[2])
"""


@contextmanager
def cluster(tmp_path: Path, mode: str = "token") -> Iterator[tuple[str, str]]:
    """The address of a cluster on the loopback interface, and its token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(32)
    short = tempfile.TemporaryDirectory(prefix="quadric-", ignore_cleanup_errors=True)  # as sockets want it
    with short as place:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000"]
        command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={place}"]
        given = environment(RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        with (tmp_path / "ray.log").open("wb") as log:
            head = subprocess.Popen(command, env=given, stdout=log, stderr=log, start_new_session=True)
        try:
            yield f"127.0.0.1:{port}", token
        finally:
            head.terminate()  # which ends all that it has started
            head.wait(60)


def joined(tmp_path: Path, address: str, token: str) -> list[str]:
    command = [sys.executable, "-c", JOIN, str(tmp_path / "ray"), address]
    given = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_ADDRESS=address)
    ran = subprocess.run(command, env=given, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def joined_at_last(tmp_path: Path, address: str, token: str) -> list[str]:
    """The same, when the cluster is there."""
    for _ in range(30):
        said = joined(tmp_path, address, token)
        if "not there" not in said[0]:
            break
    return said


def test_a_cluster_on_loopback_is_joined_with_its_token_alone(tmp_path: Path) -> None:
    with cluster(tmp_path) as (address, token):
        assert joined_at_last(tmp_path, address, token) == ["joined False 7", "False True"]
        (refused,) = joined(tmp_path, address, secrets.token_hex(32))
    assert refused.startswith(f"refused: RAY_ADDRESS={address}: the cluster refuses the token")


def test_a_cluster_that_lets_in_strangers_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, "disabled") as (address, token):
        (refused,) = joined_at_last(tmp_path, address, token)
    assert refused.startswith(
        f"refused: RAY_ADDRESS={address}: the cluster lets in strangers: start all its nodes with"
    )


def test_an_address_without_a_port_is_refused(tmp_path: Path) -> None:
    (refused,) = joined(tmp_path, "somewhere", secrets.token_hex(32))
    assert refused == "refused: RAY_ADDRESS=somewhere: give HOST:PORT, as `ray start --head` has told it"
