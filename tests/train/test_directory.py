"""``quadric align`` and ``quadric lattice`` with a trained system, on good and on bad data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import kaldiio
import numpy as np
import pytest
import soundfile

from quadric import cli
from quadric.cli import main
from quadric.lattice.expectation import path_sums
from quadric.speech.alignment import load_alignments
from quadric.speech.ctm import read_ctm, word_start_errors
from quadric.speech.kaldi_archive import read_archive
from quadric.speech.kaldi_frames import acoustic_difference, read_lattices
from quadric.speech.kaldi_words import WordLabels
from quadric.speech.language_model import NGram
from quadric.speech.lattices import Lattices
from quadric.speech.scoring import read_text
from quadric.speech.transitions import TransitionModel
from quadric.train.prepare import make_features
from quadric.train.sources import material
from quadric.train.stages import alone_in
from quadric.train.system import System
from reference.whole_job import Finished, command, corpus, only, wait_for

pytestmark = [pytest.mark.speech, pytest.mark.demo]

Call = Callable[..., tuple[int, str, str]]
BEAMS = ("--beam", 11, "--lattice-beam", 5)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process: status, output, errors."""

    def called(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in (*arguments, "--jobs", 1)])
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            status = exit.code
        printed, errors = capsys.readouterr()
        assert "Traceback" not in errors and "[Errno" not in "".join(re.findall("^quadric: .*", errors, re.M))
        return status, printed, errors

    return called


@pytest.fixture(scope="module")
def system(finished: Finished) -> Path:
    return finished.work / "adamw" / "system"


@pytest.fixture
def data(finished: Finished, tmp_path: Path) -> Path:
    """Five utterances of dev, in a data directory of their own with audio of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    tables: dict[str, str] = {"text": "", "wav.scp": "", "utt2spk": ""}
    for utterance in corpus(finished.work, "dev").head(5):
        assert utterance.audio is not None and utterance.audio.path is not None
        shutil.copyfile(utterance.audio.path, folder / f"{utterance.id}.wav")
        tables["text"] += f"{utterance.id} {' '.join(utterance.words)}\n"
        tables["wav.scp"] += f"{utterance.id} {utterance.id}.wav\n"
        tables["utt2spk"] += f"{utterance.id} {utterance.speaker}\n"
    for name, text in tables.items():
        (folder / name).write_text(text)
    return folder


def ids(data: Path) -> list[str]:
    return sorted(read_text(data / "text"))


def say(data: Path, id: str, words: str) -> None:
    """Changes a transcript."""
    text = (data / "text").read_text()
    (data / "text").write_text(re.sub(rf"^{id} .*$", f"{id} {words}".rstrip(), text, flags=re.M))


def spoil(data: Path) -> dict[str, str]:
    """One utterance of each kind that cannot be aligned: why not."""
    lost, unknown, short, silent, _ = ids(data)
    (data / f"{lost}.wav").unlink()
    say(data, unknown, "ONE HUNDRED")
    samples, rate = soundfile.read(data / f"{short}.wav")
    soundfile.write(data / f"{short}.wav", samples[: rate // 10], rate)
    say(data, silent, "")
    least = 3 * 4 * 4
    say(data, short, "SEVEN SEVEN SEVEN")
    return {
        lost: f"audio missing: there is no file {data / lost}.wav",
        unknown: "the lexicon lacks HUNDRED",
        short: rf"10 frames, its words take at least {least - 3}",
        silent: "it has no transcript",
    }


# ------------------------------------------------------------------------------------------------ align


def test_align_finds_when_words_are_said(
    finished: Finished, system: Path, data: Path, tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "out"
    status, printed, errors = call("align", system, data, "--out", out)
    assert (status, printed) == (0, f"aligned 5 of 5 utterances: {out / 'ali.ark'}\n"), errors
    assert (out / "left_out").read_text() == ""
    truth = read_ctm(only(finished.work, "cache/digits-*") / "dev" / "words.ctm")
    words = read_ctm(out / "words.ctm")
    assert {id: tuple(token.label for token in tokens) for id, tokens in words.items()} == read_text(data / "text")
    assert word_start_errors(words, truth).mean() < 25.0
    pdfs, phones, tying = load_alignments(out / "ali.ark"), read_ctm(out / "phones.ctm"), System.load(system).tying
    for id in ids(data):
        frames = soundfile.info(data / f"{id}.wav").duration * 100
        assert abs(len(pdfs[id]) - frames) <= 1
        assert all(a.end == pytest.approx(b.start) for a, b in pairwise(phones[id]))
        middles = [round(100 * (token.start + token.end) / 2) for token in phones[id]]
        assert [tying.phones[tying.phone_of_pdf[pdfs[id][t]]] for t in middles] == [t.label for t in phones[id]]
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "log"}
    assert call("align", system, data, "--out", out)[:2] == (status, printed)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before


def test_align_leaves_out_what_is_bad(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    out, reasons = tmp_path / "out", spoil(data)
    status, printed, errors = call("align", system, data, "--out", out)
    assert (status, printed) == (
        0,
        f"aligned 1 of 5 utterances, 4 left out ({out / 'left_out'}): {out / 'ali.ark'}\n",
    ), errors
    told = (out / "left_out").read_text()
    assert [line.split(" ", 1) for line in told.splitlines()] == [[id, reasons[id]] for id in sorted(reasons)]
    assert list(load_alignments(out / "ali.ark")) == ids(data)[4:]
    call("align", system, data, "--out", out)  # with the features that are there
    assert (out / "left_out").read_text() == told
    (data / "wav.scp").write_text((data / "wav.scp").read_text() + "more more.wav\n")  # of no speaker
    printed = call("align", system, data, "--out", out, "--drop-mismatched")[1]
    assert printed.startswith("aligned 1 of 6 utterances, 5 left out")
    assert set((out / "left_out").read_text().splitlines()) == {*told.splitlines(), "more not in utt2spk"}
    (data / "wav.scp").write_text((data / "wav.scp").read_text().replace("more more.wav\n", ""))
    # When the last is bad as well, none is left.
    (data / f"{ids(data)[4]}.wav").write_bytes(b"no audio")
    status, printed, errors = call("align", system, data, "--out", out)
    last = errors.strip().splitlines()[-1]
    assert status == 1 and not printed
    assert last.startswith("quadric: data: none of 5 utterances could be done: 5 (") and "HUNDRED" in last


def test_audio_of_another_rate_is_resampled(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    path = data / f"{ids(data)[0]}.wav"
    samples, rate = soundfile.read(path)
    call("align", system, data, "--out", tmp_path / "first")
    assert rate == 16000
    soundfile.write(path, np.repeat(samples, 2), 2 * rate)
    status, printed, errors = call("align", system, data, "--out", tmp_path / "second")
    assert status == 0 and printed.startswith("aligned 5 of 5")
    assert f"of 5 utterances, resampled from {2 * rate} to {rate} Hz: 1 ({path.stem})" in errors
    first, second = (read_ctm(tmp_path / name / "words.ctm")[path.stem] for name in ("first", "second"))
    assert [t.start for t in first] == pytest.approx([t.start for t in second], abs=0.05)


# ------------------------------------------------------------------------------------------------ lattice


def test_lattices_and_their_archive(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    status, printed, errors = call("lattice", system, data, "--out", out, *BEAMS, "--archive", "binary")
    assert status == 0, errors
    made = Lattices(out / "lattices")
    assert list(made) == ids(data)
    told = re.fullmatch(
        r"lattices of 5 of 5 utterances, (\S+) arcs a frame\n"
        r"oracle %WER (\S+) \[ (\d+) / (\d+) \]: the best paths of 5 lattices\n",
        printed,
    )
    assert told and told[1] == f"{made.arcs / made.frames:.1f}"
    said = read_text(data / "text")
    assert int(told[4]) == sum(map(len, said.values()))
    # The decoder's words are those of one path at least.
    status, decoded, _ = call("decode", system, data, "--out", tmp_path / "decoded")
    assert status == 0 and int(told[3]) <= int(re.search(r"\[ (\d+) / ", decoded)[1])  # type: ignore[index]

    loaded = System.load(system)
    transitions = TransitionModel.load(out / "final.mdl")
    labels = WordLabels.read(out / "words.txt", loaded.lexicon)
    from_corpus = cli.read_data_dir(data)
    features = make_features(material(from_corpus), loaded.front, tmp_path / "cache", 1, cli.silent)
    scores = loaded.likelihoods(features)
    given = dict(read_archive(out / "lat.ark"))
    found = dict(read_lattices(out / "lat.ark", transitions, words=labels))
    assert list(found) == ids(data) == list(dict(read_archive(out / "lat.scp")))
    scale = 1 / loaded.lm_weight
    for id, lattice in found.items():
        assert acoustic_difference(given[id], transitions, scores[id]) < 1e-2
        first, second = (path_sums(x, scale * scores[id]) for x in (made[id], lattice))
        assert first.log_z == pytest.approx(second.log_z, abs=1e-3)
        np.testing.assert_allclose(first.occupancy, second.occupancy, atol=1e-3)
        assert set(lattice.word) == set(made[id].word)
    status, again, _ = call("lattice", system, data, "--out", out, *BEAMS, "--archive", "text")
    assert (status, again) == (0, printed)
    for id, lattice in read_lattices(out / "lat.ark", transitions, words=labels):
        assert path_sums(lattice, scale * scores[id]).log_z == pytest.approx(
            path_sums(made[id], scale * scores[id]).log_z, abs=1e-3
        )


def test_options_of_lattices(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    loaded = System.load(system)
    arpa = tmp_path / "lm.arpa"
    NGram.estimate([("ONE", "TWO"), ("TWO",)], loaded.lexicon.words, 1).write_arpa(arpa)

    def density(name: str, *options: object) -> tuple[int, float]:
        assert call("lattice", system, data, "--out", tmp_path / name, *options)[0] == 0
        made = Lattices(tmp_path / name / "lattices")
        return made.arcs, math.fsum(float(np.abs(made[id].weight).sum()) for id in made)

    usual = density("usual", *BEAMS)
    assert density("narrow", "--beam", 11, "--lattice-beam", 1)[0] < usual[0]
    assert density("few", *BEAMS, "--max-active", 3)[0] < usual[0]
    assert density("weak", *BEAMS, "--lm-weight", 60)[0] > usual[0]
    assert density("other", *BEAMS, "--arpa", arpa)[1] != usual[1]
    for option in (("--lm-weight", 60), ("--max-active", 3), ("--arpa", arpa)):
        status, printed, errors = call("lattice", system, data, "--out", tmp_path / "usual", *BEAMS, *option)
        assert status == 1 and not printed and "holds lattices made with" in errors.splitlines()[-1]
        assert "name another folder, or remove this one" in errors.splitlines()[-1]


def test_lattices_by_the_search_of_another(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    """Beams that cut little: nearly the same lattices; another search does not go on with them."""
    stores = {}
    for name in ("quadric", "kaldi"):
        status, printed, errors = call("lattice", system, data, "--out", tmp_path / name, *BEAMS, "--backend", name)
        assert status == 0, errors
        stores[name] = Lattices(tmp_path / name / "lattices"), printed
    (own, told), (found, other) = stores.values()
    assert list(own) == list(found) == ids(data)
    assert found.arcs == pytest.approx(own.arcs, rel=0.05)
    assert told.splitlines()[1] == other.splitlines()[1]  # the same errors on the best paths
    for name, options in (("kaldi", ()), ("quadric", ("--backend", "kaldi"))):
        status, printed, errors = call("lattice", system, data, "--out", tmp_path / name, *BEAMS, *options)
        assert status == 1 and not printed
        assert f"holds lattices made with --backend {name}, now " in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--lattice-beam", -1), "--lattice-beam -1.0 must be from 0.001 to --beam 13.0; 7 is usual"),
        (("--beam", 0), "--beam 0.0 must be a positive log weight; 13 is usual"),
        (("--max-active", 1), "--max-active 1 must be at least 2; 5000 is usual"),
        (("--lm-weight", 0), "--lm-weight 0.0 must be a positive number"),
        (("--lm-weight", "nan"), "--lm-weight nan must be a positive number"),
        (("--arpa", "nowhere.arpa"), "nowhere.arpa"),
    ],
)
def test_options_that_are_wrong(
    system: Path, data: Path, tmp_path: Path, call: Call, options: tuple[object, ...], problem: str
) -> None:
    status, printed, errors = call("lattice", system, data, "--out", tmp_path / "out", *options)
    assert status == 1 and not printed and problem in errors.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "lattices").exists()


def test_lattices_leave_out_what_is_bad(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    out, lost = tmp_path / "out", next(iter(spoil(data)))
    short, silent = ids(data)[2:4]
    samples, rate = soundfile.read(data / f"{short}.wav")
    soundfile.write(data / f"{short}.wav", samples[: rate // 50], rate)  # too short for any word
    status, printed, errors = call("lattice", system, data, "--out", out, *BEAMS)
    assert status == 0, errors
    assert printed.startswith("lattices of 3 of 5 utterances, ")
    assert printed.splitlines()[0].endswith(f", 2 left out ({out / 'left_out'})")
    reasons = dict(line.split(" ", 1) for line in (out / "left_out").read_text().splitlines())
    assert reasons.keys() == {lost, short}
    assert reasons[short].startswith("no path of the graph through 2 frames to a final state within a beam of 22")
    # A word that the lexicon lacks is an error on every path; what has no transcript is not judged.
    judged = [words for id, words in read_text(data / "text").items() if id not in (lost, short, silent)]
    assert f" / {sum(map(len, judged))} ]: the best paths of 2 lattices" in printed and " 0.00 [" not in printed
    for id in ids(data):
        (data / f"{id}.wav").unlink(missing_ok=True)
        soundfile.write(data / f"{id}.wav", samples[: rate // 50], rate)
    status, printed, errors = call("lattice", system, data, "--out", tmp_path / "none", *BEAMS)
    assert status == 1 and not printed
    assert "quadric: data: none of 5 utterances could be done: 5 (" in errors.strip().splitlines()[-1]


def test_lattices_of_audio_that_has_changed_are_made_again(
    system: Path, data: Path, tmp_path: Path, call: Call
) -> None:
    """Audio is repaired, other audio lost, an utterance new."""
    for table in ("wav.scp", "utt2spk", "text"):  # speakers of one utterance: normalisation joins no others
        (data / f"{table}.all").write_text((data / table).read_text())
        lines = (data / table).read_text().splitlines()
        split = [f"{line.split()[0]} {line.split()[0]}" for line in lines] if table == "utt2spk" else lines
        (data / f"{table}.all").write_text("".join(f"{line}\n" for line in split))
        (data / table).write_text("".join(f"{line}\n" for line in split[:4]))
    first, second, third, fourth, new = sorted(read_text(data / "text.all"))
    out, audio = tmp_path / "out", (data / f"{first}.wav").read_bytes()
    (data / f"{first}.wav").write_bytes((data / f"{second}.wav").read_bytes())
    assert call("lattice", system, data, "--out", out, *BEAMS)[0] == 0
    before = {path: path.read_bytes() for path in out.glob("lattices/*.zip")}
    (data / f"{first}.wav").write_bytes(audio)
    (data / f"{third}.wav").unlink()
    for table in ("wav.scp", "utt2spk", "text"):
        (data / f"{table}.all").replace(data / table)
    status, printed, errors = call("lattice", system, data, "--out", out, *BEAMS)
    assert status == 0 and printed.startswith("lattices of 4 of 5 utterances, "), errors
    assert (out / "left_out").read_text().startswith(f"{third} audio missing: ")
    assert {path: path.read_bytes() for path in before} == before
    (added,) = set(out.glob("lattices/*.zip")) - before.keys()
    with ZipFile(added) as file:
        assert [id for id, *_ in json.loads(file.read("contents.json"))["entries"]] == [first, new]
    whole = tmp_path / "whole"
    assert call("lattice", system, data, "--out", whole, *BEAMS)[1].splitlines()[1:] == printed.splitlines()[1:]
    ids_wanted = (first, second, fourth, new)
    found, expected = Lattices(out / "lattices", ids_wanted), Lattices(whole / "lattices", ids_wanted)
    assert (found.arcs, found.frames) == (expected.arcs, expected.frames) and len(found) == 4


def test_features_that_cannot_be_used(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    """Of a directory with features instead of audio."""
    loaded = System.load(system)
    rng = np.random.default_rng(0)
    matrices = {id: rng.normal(size=(120, loaded.inputs)).astype(np.float32) for id in ids(data)}
    first, second, third = ids(data)[:3]
    matrices[first][7] = np.nan
    (data / "wav.scp").unlink()
    kaldiio.save_ark(str(data / "feats.ark"), matrices, scp=str(data / "feats.scp"))
    table = (data / "feats.scp").read_text().splitlines()
    table[1] = f"{second} {tmp_path / 'gone.ark'}:7"
    (data / "feats.scp").write_text("\n".join(table) + "\n")
    for name in ("align", "lattice"):
        out = tmp_path / name
        status, printed, errors = call(name, system, data, "--out", out)
        assert status == 0 and " 3 of 5 utterances" in printed and "2 left out" in printed, errors
        assert "left out for features that cannot be used: 2 (" in errors
        reasons = dict(line.split(" ", 1) for line in (out / "left_out").read_text().splitlines())
        assert reasons.keys() == {first, second}
        assert reasons[first] == f"the features of {first} have no frames, or values that are not finite"
        assert reasons[second].startswith(f"the features of {second} cannot be read from {tmp_path / 'gone.ark'}:7")
    narrow = {id: np.ascontiguousarray(matrix[:, 1:]) for id, matrix in matrices.items() if id != first}
    kaldiio.save_ark(str(data / "feats.ark"), narrow | {first: narrow[third]}, scp=str(data / "feats.scp"))
    status, _, errors = call("align", system, data, "--out", tmp_path / "narrow")
    assert status == 1
    assert f"its features have {loaded.inputs - 1} columns, the system was trained on {loaded.inputs}" in errors


# ------------------------------------------------------------------------------------------------ places, interruption


@pytest.mark.parametrize("name", ["align", "lattice"])
def test_nothing_is_overwritten(
    finished: Finished, system: Path, data: Path, tmp_path: Path, call: Call, name: str
) -> None:
    job = finished.work
    for out, what in (
        (data, "a data directory is there (wav.scp)"),
        (system, "a trained system is there (options.json)"),
        (job, "a part of a job is there (job.json)"),
    ):
        status, printed, errors = call(name, system, data, "--out", out)
        assert status == 1 and not printed
        assert errors == f"quadric: --out {out}: {what}, which would be overwritten; name a folder of its own\n"
    with alone_in(tmp_path / "out"):
        status, _, errors = call(name, system, data, "--out", tmp_path / "out")
    assert status == 1 and errors.strip().endswith("another job is at work there; wait for it, or use another folder")
    status, _, errors = call(name, data, data, "--out", tmp_path / "out")
    assert status == 1 and "no trained system there" in errors
    status, _, errors = call(name, system, tmp_path / "none", "--out", tmp_path / "out")
    assert status == 1 and "there is no data directory" in errors


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_and_a_kill_while_lattices_are_made(system: Path, data: Path, tmp_path: Path, call: Call) -> None:
    program = (
        "import sys, time; from functools import partial; import quadric.train.directory as d\n"
        "d.make_lattices = partial(d.make_lattices, shard_size=1)\n"
        "from quadric.lattice.generate import Generator; make = Generator.__call__\n"
        "Generator.__call__ = lambda self, scores: time.sleep(1.0) or make(self, scores)\n"
        "from quadric.cli import main\n"
        "if __name__ == '__main__': sys.exit(main())"
    )
    out = tmp_path / "out"
    arguments = ("lattice", system, data, "--out", out, *BEAMS, "--jobs", 1)
    done = []
    for number, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = command(*arguments, program=("-c", program))
        more = len(done) + 1
        wait_for(lambda more=more: len(list(out.glob("lattices/lattices-*.zip"))) >= more, process)  # type: ignore[misc]
        os.killpg(process.pid, number)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == expected and not printed
        done = sorted(path.stat().st_mtime_ns for path in out.glob("lattices/lattices-*.zip"))
        if number == signal.SIGINT:
            assert errors.strip().endswith("quadric: interrupted; the same command goes on from what is done")
    assert 2 <= len(done) < 5
    status, printed, _ = call(*arguments[:-2])
    assert status == 0
    assert set(done) <= {path.stat().st_mtime_ns for path in out.glob("lattices/lattices-*.zip")}
    assert call("lattice", system, data, "--out", tmp_path / "whole", *BEAMS)[1] == printed
    first, second = (Lattices(folder / "lattices") for folder in (out, tmp_path / "whole"))
    assert list(first) == list(second)
    for id in first:
        for field in ("source", "target", "pdf", "weight", "word", "final"):
            np.testing.assert_array_equal(getattr(first[id], field), getattr(second[id], field))
