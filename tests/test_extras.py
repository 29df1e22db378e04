"""Without an optional package one sentence says what to install; what does not need it works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None

import quadric.optim.second_order, quadric.objective.objective, quadric.loss.loss, quadric.model.acoustic

for name in ("quadric.lattice.lattice", "quadric.loss.sequence", "quadric.loss.full_sum"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
from quadric.__main__ import main
main()
"""


def test_lattices_without_numba() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", WITHOUT_NUMBA]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    sentence = "lattices, the losses over them and quadric.speech need numba: pip install 'quadric[lattice]'"
    assert ended.stdout.splitlines() == [sentence] * 3, ended.stderr
    assert (ended.returncode, ended.stderr) == (1, "quadric: numba is not installed: pip install 'quadric[speech]'\n")


def test_extras_that_sentences_name_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    declared = (root / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", declared, re.MULTILINE))
    named = {
        name for file in (root / "quadric").rglob("*.py") for name in re.findall(r"quadric\[(\w+)\]", file.read_text())
    }
    assert {"images", "lattice", "speech"} <= named <= extras
