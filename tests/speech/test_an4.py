"""The two corpora with a form of their own: AN4's cepstra and the rendered digit strings."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from quadric.speech.an4 import read_an4
from quadric.speech.corpus import read_data_dir
from quadric.speech.digit_strings import render_strings


def write_split(path: Path, **changed: object) -> None:
    arrays = {
        "feats": np.arange(5 * 13, dtype=np.float16).reshape(5, 13),
        "lengths": np.array([2, 3]),
        "utts": np.array(["b", "a"]),
        "spks": np.array(["f1", "m1"]),
        "text": np.array(["ONE TWO", "YES"]),
    }
    np.savez(path, **{name: value for name, value in {**arrays, **changed}.items() if value is not None})  # type: ignore[arg-type]


def test_utterances_keep_their_frames_and_words(tmp_path: Path) -> None:
    write_split(tmp_path / "dev.npz")
    corpus, features = read_an4(tmp_path, "dev")
    assert [(u.id, u.speaker, u.words) for u in corpus] == [("a", "m1", ("YES",)), ("b", "f1", ("ONE", "TWO"))]
    assert list(features) == ["a", "b"]
    assert features["b"].dtype == np.float32
    np.testing.assert_array_equal(features["b"], np.arange(26).reshape(2, 13))
    np.testing.assert_array_equal(features["a"], np.arange(26, 65).reshape(3, 13))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": np.array([2, 2])}, "contradicts itself"),
        ({"utts": np.array(["a"])}, "contradicts itself"),
        ({"spks": None}, "has no array spks"),
        ({"feats": np.full((5, 13), np.nan)}, "not finite"),
        ({"utts": np.array(["a", "a"])}, r"repeated utterance ids: 1 \(a\)"),
    ],
)
def test_files_of_another_form(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    write_split(tmp_path / "dev.npz", **changed)
    with pytest.raises(ValueError, match=message):
        read_an4(tmp_path, "dev")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    write_split(tmp_path / "dev.npz")
    with pytest.raises(FileNotFoundError, match="holds the splits dev"):
        read_an4(tmp_path, "test")
    (tmp_path / "test.npz").write_bytes((tmp_path / "dev.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="cannot be read"):
        read_an4(tmp_path, "test")


@pytest.mark.data
def test_real_an4(shared_data: Path) -> None:
    corpus, features = read_an4(shared_data / "an4_mfcc", "dev")
    assert (len(corpus), len(corpus.speakers), sum(corpus.word_counts().values())) == (104, 8, 595)
    assert set(features) == set(corpus.by_id)
    assert {x.shape[1] for x in features.values()} == {13}


TOOL = """
import os, sys
out = sys.argv[sys.argv.index("--out") + 1]
open(os.path.join(out, "wav.scp"), "w").write("u u.flac\\n")
if os.path.exists(os.path.join(sys.argv[sys.argv.index("--data") + 1], "broken")):
    raise SystemExit("a recording is missing")
"""


def list_of_strings(folder: Path) -> Path:
    (folder / "strings").mkdir(parents=True)
    (folder / "strings" / "dev.tsv").write_text("utt\tspk\tnoise_seed\tlayout\n")
    return folder


@pytest.mark.parametrize("place", ["digits", "."])
def test_tool_is_found_in_or_above_the_data_and_runs_once(tmp_path: Path, place: str) -> None:
    data = list_of_strings(tmp_path / "digits")
    (tmp_path / place / "make_strings.py").write_text(TOOL)
    out = render_strings(data, "dev", tmp_path / "out" / "dev")
    assert sorted(path.name for path in out.iterdir()) == ["list.tsv", "wav.scp"]
    (tmp_path / place / "make_strings.py").unlink()
    assert render_strings(data, "dev", out) == out  # already there: the tool is not needed
    (data / "strings" / "dev.tsv").write_text("another list")
    with pytest.raises(ValueError, match="rendered from another list"):
        render_strings(data, "dev", out)


def test_failures_say_why_and_leave_nothing(tmp_path: Path) -> None:
    data = list_of_strings(tmp_path / "digits")
    with pytest.raises(FileNotFoundError, match=r"not at .*digits/make_strings\.py nor at .*pass its path as tool"):
        render_strings(data, "dev", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="the lists there are dev"):
        render_strings(data, "test", tmp_path / "out")
    (data / "make_strings.py").write_text(TOOL)
    (data / "broken").touch()
    with pytest.raises(RuntimeError, match="status 1:\na recording is missing"):
        render_strings(data, "dev", tmp_path / "out")
    (data / "broken").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OSError, match="something else is already there"):
        render_strings(data, "dev", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "out"]


@pytest.mark.data
@pytest.mark.speech
def test_rendered_strings_have_the_published_samples(shared_data: Path, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    folder = render_strings(shared_data / "fsdd", "dev", tmp_path / "dev")
    corpus = read_data_dir(folder)
    assert (len(corpus), sum(corpus.word_counts().values())) == (300, 1490)
    digest = hashlib.sha256()
    for utterance in corpus:
        assert utterance.audio is not None
        digest.update(soundfile.read(utterance.audio.path, dtype="int16")[0].astype("<i2").tobytes())
    assert digest.hexdigest() == (shared_data / "fsdd" / "strings" / "dev.sha256").read_text().split()[0]
    assert "make_strings" not in sys.modules
