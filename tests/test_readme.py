"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run_in_order_and_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md, first example", "exec"), names)
    assert names["values"][-1] < 0.2 * names["values"][0]
    assert names["correct"] > 0.97
    exec(compile(blocks[1], "README.md, second example", "exec"), names)
    assert capsys.readouterr().out.strip() == "the step was accepted"
