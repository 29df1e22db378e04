"""What tests of Ray share. A module that imports it is skipped where there is none."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:  # which is not imported here: quadric does, asking for tokens
    pytest.skip("asynchronous training needs ray: pip install 'quadric[async]'", allow_module_level=True)

TESTS = Path(__file__).resolve().parent
PATH = os.pathsep.join([str(TESTS.parent), str(TESTS)])


def environment(**given: str) -> dict[str, str]:
    """Of a process that finds the library and the tests, on one thread, and knows of no Ray that runs here already."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**clean, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", **given}
