"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run_in_order_and_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md, first example", "exec"), names)
    assert names["values"][-1] < 0.2 * names["values"][0]
    assert names["correct"] > 0.97
    exec(compile(blocks[1], "README.md, second example", "exec"), names)
    assert capsys.readouterr().out.strip() == "the step was accepted"
    names["model"] = names["nn"].Sequential(*(type(m)(*_sizes(m)) for m in names["model"]))
    exec(compile(blocks[2], "README.md, third example", "exec"), names)
    assert capsys.readouterr().out.splitlines()[0] == "0.weight, 0.bias: Averaged, 1 of 3 x 3 (Linear: a matrix)"
    assert (names["model"](names["inputs"]).argmax(1) == names["target"]).float().mean() > 0.9


def _sizes(module: Any) -> tuple[int, ...]:
    """Of a fresh one of its kind."""
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else ()
