"""What a person sees while a job runs, and what the log keeps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from quadric.train.console import bar, logged

pytestmark = pytest.mark.speech

logger = logging.getLogger("quadric.somewhere")


def test_everything_is_logged_and_the_rest_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "log"
    with pytest.raises(ZeroDivisionError), logged(file):
        logger.debug("fine print")
        logger.info("so far")
        logger.warning("look at this")
        _ = 1 / 0
    logger.warning("afterwards")
    shown = capsys.readouterr().err
    assert "so far\nlook at this\n" in shown
    assert "fine print" not in shown and "Traceback" not in shown
    kept = file.read_text()
    for part in ("DEBUG quadric.somewhere: fine print", "WARNING quadric.somewhere: look at this", "ZeroDivisionError"):
        assert part in kept
    assert "afterwards" not in kept
    assert not logging.getLogger("quadric").handlers


def test_a_log_on_a_full_disk_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("there is no /dev/full, a file on a disk that is always full")
    with logged(full):
        for number in range(3):
            logger.info("message %d", number)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.count("cannot write to the log /dev/full: No space left on device") == 1
    assert all(f"message {number}\n" in shown for number in range(3))


def test_a_bar_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar(iter("abc"), total=3, what="letters")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "\r" not in shown and shown.endswith("\n")
    assert all(line.startswith("letters: ") for line in shown.splitlines())
    assert shown.splitlines()[-1].startswith("letters: 100%")
