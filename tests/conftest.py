"""What all tests share."""

from __future__ import annotations

import os
import signal
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
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared corpora: QUADRIC_DATA, or ``../shared/data`` beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the shared corpora are not at {SHARED_DATA} (set QUADRIC_DATA)")
    return SHARED_DATA
