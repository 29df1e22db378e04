"""Asynchronous training on a cluster of two nodes, each with an address of its own, in a network of their own."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import TESTS, environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = r"""
set -e
ip link set lo up
ip addr add 10.77.0.1/32 dev lo
ip addr add 10.77.0.2/32 dev lo
export PATH=$(dirname {python}):$PATH
common="--num-cpus=1 --object-store-memory=200000000 --disable-usage-stats"
ray start --head --node-ip-address=10.77.0.1 --port=6379 --include-dashboard=false --temp-dir={temp} $common
export RAY_ADDRESS=10.77.0.1:6379
{python} {job} {folder} '{options}' > {folder}.out 2> {folder}.err &
until grep -q APPLIED {folder}.out; do kill -0 $!; sleep 0.2; done
ray start --address=$RAY_ADDRESS --node-ip-address=10.77.0.2 $common
both() {{ grep -q '\[0, [0-9]*, \["APPLIED' {folder}.out && grep -q '\[1, [0-9]*, \["APPLIED' {folder}.out; }}
until both; do kill -0 %1; sleep 0.2; done
touch $(dirname {folder})/hurry
wait %1
"""


def namespaces() -> bool:
    """Whether a network namespace can be made here."""
    try:
        ran = subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return ran.returncode == 0


@pytest.mark.skipif(not namespaces(), reason="no network namespaces here (unshare -rn, ip)")
def test_a_worker_joins_when_its_node_does(tmp_path: Path) -> None:
    """One node has room for one worker; the second joins in the middle, with the second node."""
    folder, job = tmp_path / "training", TESTS / "reference" / "asynchronous_job.py"
    options = json.dumps({"shards": 2, "rows": 20_000, "seconds": 0.02})
    temp = tempfile.mkdtemp(prefix="quadric-")  # sockets want a short path
    given = {"python": sys.executable, "temp": temp, "job": job, "folder": folder, "options": options}
    secured = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    # The namespace of processes ends with its first one, and all Ray with it.
    command = ["unshare", "-rnpf", "--mount-proc", "bash", "-c", SCRIPT.format(**given)]
    ran = subprocess.run(command, env=secured, capture_output=True, text=True, timeout=500, check=False)
    shutil.rmtree(temp, ignore_errors=True)
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    said = [json.loads(line) for line in Path(f"{folder}.out").read_text().splitlines() if line.startswith("{")]
    (end,) = [each for each in said if "best" in each]
    counts = next(each["counts"] for each in reversed(said) if each.get("counts"))
    assert [count["applied"] for count in counts] == [end["units"]] * 2
    order = [worker for each in said for worker, _, _ in each.get("reports", [])]
    late = order.index(1 - order[0])
    assert 10 < late < len(order) - 10, "one worker began with its node, the other worked before and after"
