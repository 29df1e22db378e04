"""The README's Python runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_examples_run_in_order_and_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(first, "README.md, first example", "exec"), names)
    assert names["values"][-1] < 0.2 * names["values"][0]
    assert names["correct"] > 0.97
    exec(compile(second, "README.md, second example", "exec"), names)
    assert capsys.readouterr().out.strip() == "the step was accepted"
    names["model"] = names["nn"].Sequential(*(type(m)(*_sizes(m)) for m in names["model"]))
    exec(compile(third, "README.md, third example", "exec"), names)
    assert capsys.readouterr().out.splitlines()[0] == "0.weight, 0.bias: Averaged, 1 of 3 x 3 (Linear: a matrix)"
    assert (names["model"](names["inputs"]).argmax(1) == names["target"]).float().mean() > 0.9


@pytest.mark.distributed
@pytest.mark.slow
def test_the_asynchronous_example_trains(tmp_path: Path) -> None:
    """In a process of its own, as Ray would stay in this one."""
    from engine import environment  # which skips where there is no Ray

    first, (example,) = blocks("python")[0], blocks("python async")
    text = f"{first}\n{example}\nprint('right:', float((model(inputs).argmax(1) == target).float().mean()))\n"
    (tmp_path / "example.py").write_text(text)
    command = [sys.executable, "example.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *units, right = ran.stdout.splitlines()
    assert sorted(int(line.split()[0]) for line in units) == list(range(20))
    assert float(right.split()[1]) > 0.9


def blocks(kind: str) -> list[str]:
    """The README's code of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def _sizes(module: Any) -> tuple[int, ...]:
    """Of a fresh one of its kind."""
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else ()
