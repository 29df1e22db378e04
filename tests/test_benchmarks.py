"""Benchmarks start, say what they measure, and draw the images that they promise."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quadric.data.stream import FrameStream
from quadric.model.acoustic import TDNN
from quadric.objective.curvature import Curvature
from quadric.optim.sampling import Sizes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())
NEEDS_SPEECH = {"acceleration", "generation", "iterations", "lattice", "sequence", "sequence_step", "speech"}


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("images")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.speech if name in NEEDS_SPEECH else []) for name in SCRIPTS]
)
def test_help_is_given(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


@pytest.mark.speech
def test_frames_come_in_as_many_parts_as_a_sampler_asks_for_and_unscaled_where_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("kaldifst", reason="needs the speech extra")
    frames, iterations = (importlib.import_module(name) for name in ("frames", "iterations"))
    rng = np.random.default_rng(0)
    features = {f"u{i}": rng.normal(size=(40, 3)).astype(np.float32) for i in range(10)}
    stream = FrameStream(features, {id: rng.integers(0, 4, 40) for id in features}, context=(0, 0))
    speech = frames.Speech(TDNN(3, 4, [5], offsets=[(0,)]), stream, stream)
    made = speech.objective(speech.again(), Sizes(200, 40), 3, parts=4, kind=iterations.Unscaled)
    assert made.frames == 200 and len(made._gradient) >= 4
    operators = made.curvatures(made.space.point(), (Curvature.GAUSS_NEWTON, Curvature.EMPIRICAL_FISHER))
    assert [operator.scale for operator in operators] == [0.0, 0.0]
    assert len(speech.objective(speech.again(), Sizes(200, 40), 3)._gradient) == 1


def test_curves_are_the_same_again_and_probabilities(images: Any) -> None:
    count = 600  # more than are drawn at a time
    drawn = images.draw_curves(images.control_points(count))
    assert drawn.shape == (count, 784) and drawn.dtype == np.float32
    assert drawn.min() == 0 and drawn.max() == 1
    again = images.draw_curves(images.control_points(count))
    np.testing.assert_array_equal(drawn, again)
    np.testing.assert_array_equal(drawn[:7], images.draw_curves(images.control_points(7)))
    assert not np.array_equal(drawn, images.draw_curves(images.control_points(count, seed=1)))
    grey = ((drawn > 0) & (drawn < 1)).sum(1)
    assert grey.min() > 0  # edges fall off
    frame = drawn.reshape(-1, 28, 28)[:, [0, -1], :]
    assert frame.max() <= 0.5  # no curve leaves the image


def test_curves_pass_their_points(images: Any) -> None:
    points = np.array([[[6.5, 6.5], [6.5, 14.5], [6.5, 22.5]], [[6.5, 6.5], [20.5, 14.5], [6.5, 22.5]]], np.float32)
    line, bend = images.draw_curves(points).reshape(2, 28, 28)
    np.testing.assert_array_equal(line[6, 6:23], 1)
    np.testing.assert_allclose(line[[5, 7], 6:23], 0.5, atol=1e-5)
    assert line.sum() == pytest.approx(2 * line[6, 6:23].sum() + 2 * (0.5 + 2 * (1.5 - 2**0.5)), rel=1e-5)
    assert bend[20, 14] == bend[6, 6] == bend[6, 22] == 1
    assert bend[6, 10:19].max() == 0
