"""Connected digit strings: lists of isolated recordings, which the data's own tool renders to audio."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from quadric.files import new_folder

_TOOL = "make_strings.py"
_LIST = "list.tsv"  # the copy of the list a folder was rendered from


def render_strings(
    data: str | os.PathLike[str], split: str, out: str | os.PathLike[str], *, tool: Path | None = None
) -> Path:
    """Renders the list ``<data>/strings/<split>.tsv`` into the Kaldi data directory ``out``, and returns it.

    The folder appears when it is complete: FLAC files, ``wav.scp``, ``text``, ``utt2spk``, ``ali`` (exact digit
    boundaries in samples) and a copy of the list. If it is already there, nothing is done.

    Args:
        tool: the program that renders; by default ``make_strings.py`` in ``data`` or in the folder above it. It is run
            as ``python make_strings.py render --data DATA --split SPLIT --out OUT``.

    Raises:
        FileNotFoundError: no such list or no tool.
        ValueError: ``out`` was rendered from another list.
        OSError: ``out`` holds something else or cannot be written; the message names the remedy.
        RuntimeError: the tool failed; the message holds what it said last.
    """
    data, out = Path(os.path.abspath(data)), Path(os.path.abspath(out))
    strings = data / "strings" / f"{split}.tsv"
    if not strings.is_file():
        there = sorted(file.stem for file in strings.parent.glob("*.tsv"))
        raise FileNotFoundError(f"there is no list {strings}: the lists there are {', '.join(there) or '(none)'}")
    if (out / _LIST).is_file():
        if (out / _LIST).read_bytes() != strings.read_bytes():
            raise ValueError(f"out={out} was rendered from another list than {strings}: choose another folder")
        return out
    program = _find_tool(data, tool)
    with new_folder(out, exclusive=True) as temporary:
        command = [sys.executable, str(program), "render", "--data", str(data), "--split", split]
        done = subprocess.run([*command, "--out", str(temporary)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{program} failed on {strings} with status {done.returncode}:\n{said}")
        shutil.copyfile(strings, temporary / _LIST)
    return out


def _find_tool(data: Path, tool: Path | None) -> Path:
    candidates = [Path(os.path.abspath(tool))] if tool is not None else [data / _TOOL, data.parent / _TOOL]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"the tool that renders digit strings is not at {' nor at '.join(map(str, candidates))}: pass its path as tool"
    )
