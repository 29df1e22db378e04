"""What all tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

SHARED_DATA = Path(os.environ.get("QUADRIC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

# A shell that runs this in the background ignores Ctrl-C, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Timings on a busy machine are no property of the code, and a failure must come back on the next run.
settings.register_profile("quadric", deadline=None, derandomize=True)
settings.load_profile("quadric")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random numbers, and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:  # it decides how sums are rounded, here and not in other processes
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared corpora: QUADRIC_DATA, or ``../shared/data`` beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the shared corpora are not at {SHARED_DATA} (set QUADRIC_DATA)")
    return SHARED_DATA


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size such as ``64k``."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        try:
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
            mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if mounted.returncode != 0:
            pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def alive() -> Callable[..., set[int]]:
    """Finds which of some processes run, or still run after ``patience`` seconds in which they may end."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("looks for processes in /proc")

    def runs(process: int) -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):  # the second: it ended between opening and reading
            return False

    def running(processes: Iterable[int], *, patience: float = 0.0) -> set[int]:
        deadline = time.monotonic() + patience
        left = set(filter(runs, processes))
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = set(filter(runs, left))
        return left

    return running
