"""Whole jobs, from audio to the report: done once, the same again after any interruption, and only what must be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from quadric.comm import checkpoint as together
from quadric.comm.communicator import Solo
from quadric.data.batch import pad_context
from quadric.progress import silent
from quadric.recipes import speechocean
from quadric.speech.alignment import load_alignments, save_alignments
from quadric.speech.corpus import Corpus, read_data_dir
from quadric.speech.ctm import Token, read_ctm, word_segments, word_start_errors, word_tokens
from quadric.speech.lexicon import Lexicon
from quadric.speech.scoring import read_text, write_text
from quadric.speech.synthesis import DIGIT_LEXICON
from quadric.speech.topology import Tying, monophone
from quadric.train.decode import decode_directory
from quadric.train.finished import report
from quadric.train.flat_start import flat_start
from quadric.train.metrics import MetricsLog
from quadric.train.overrides import override
from quadric.train.pipeline import run
from quadric.train.prepare import prepare
from quadric.train.recipe import Network
from quadric.train.stages import Stages
from quadric.train.system import Front, System
from reference.tiny_job import TINY
from reference.whole_job import (
    PROGRAM,
    RANKS,
    Finished,
    assert_equal,
    contents,
    corpus,
    finish,
    job,
    only,
    parameters,
    start,
    wait_for,
    without_time,
)

pytestmark = [pytest.mark.speech, pytest.mark.demo]

LEXICON = Lexicon(DIGIT_LEXICON)
MONO = monophone(LEXICON.phones)
WER = re.compile(r"%WER \d+\.\d\d \[ \d+ / \d+, \d+ ins, \d+ del, \d+ sub \] (adamw|hessian_free) (dev|test)")


def stages(work: Path) -> set[str]:
    return {path.name for path in work.iterdir() if path.is_dir() and not path.is_symlink() and path.name != "cache"}


# ------------------------------------------------------------------------------------------------ a whole job


@pytest.mark.slow
def test_every_method_and_split_has_its_line(finished: Finished) -> None:
    assert [WER.fullmatch(line).groups() for line in finished.lines] == [  # type: ignore[union-attr]
        ("adamw", "dev"),
        ("adamw", "test"),
        ("hessian_free", "dev"),
        ("hessian_free", "test"),
    ]
    rates = [float(line.split()[1]) for line in finished.lines]
    assert max(rates) < 6.0  # measured: none of 35 and 38 words is wrong; two may be by accident, three are 8 percent


def test_the_report_is_one_page_that_needs_nothing_else(finished: Finished) -> None:
    page = (finished.work / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*|@import|url\(\s*["']?https?:""", page)
    for line in finished.lines:
        assert line.split()[1] in page
    before = page
    assert report(finished.work) == finished.work / "report.html"
    assert (finished.work / "report.html").read_text() == before


def test_decoded_files(finished: Finished) -> None:
    for method, split in (("adamw", "dev"), ("hessian_free", "test")):
        folder = finished.work / method / "decoded" / split
        said = {u.id: u.words for u in corpus(finished.work, split)}
        assert read_text(folder / "ref") == said
        assert read_text(folder / "text").keys() == said.keys()
        (line,) = [line for line in finished.lines if line.endswith(f"{method} {split}")]
        assert (folder / "wer").read_text().splitlines()[0] == line.removesuffix(f" {method} {split}")
        per_utt = (folder / "per_utt").read_text().splitlines()
        assert len(per_utt) == 4 * len(said)
        wrong = sum(sum(map(int, line.split()[3:])) for line in per_utt if " #csid " in line)
        assert wrong == int(line.split()[3])
        per_spk = (folder / "per_spk").read_text()
        assert all(re.search(rf"^{u.speaker} +raw ", per_spk, re.M) for u in corpus(finished.work, split))
        for name in ("ref.trn", "hyp.trn"):
            assert len(re.findall(r" ?\(\S+-\S+\)$", (folder / name).read_text(), re.M)) == len(said)
        sweep = json.loads((finished.work / method / "decoded" / "sweep.json").read_text())
        errors = {(row["lm_weight"], row["word_penalty"]): row for row in sweep["tried"]}
        assert {(3.0, 0.0), (6.0, 0.0), (60.0, 0.0)} <= errors.keys()
        counted = {
            pair: sum(row[k] for k in ("insertions", "deletions", "substitutions")) for pair, row in errors.items()
        }
        assert counted[tuple(sweep["chosen"].values())] == min(counted.values())
        assert sweep["chosen"]["lm_weight"] < 60.0


def test_the_report_tells_the_errors_of_what_was_decoded(finished: Finished, tmp_path: Path) -> None:
    """Of a job whose words are made wrong by hand: its own are right."""
    work = tmp_path / "digits"
    shutil.copytree(finished.work, work, symlinks=True)
    before = (work / "report.html").read_text()
    for method, count in (("adamw", 7), ("hessian_free", 5)):
        decoded = work / method / "decoded"
        words = read_text(decoded / "test" / "ref")
        wrong = sorted(words)[:count]
        write_text(decoded / "test" / "text", {id: said[1:] if id in wrong else said for id, said in words.items()})
        total = sum(map(len, words.values()))
        line = f'<span class="line">%WER {100 * count / total:.2f} [ {count} / {total}, 0 ins, {count} del, 0 sub ]<'
        rate = f'<span class="rate">{100 * count / total:.2f} %</span>'
        assert line not in before and rate not in before
        after = report(work).read_text()
        assert after.count(line) == after.count(rate) == 1


def test_what_is_done_is_not_done_again(finished: Finished, one_thread: object) -> None:
    before, links = contents(finished.work), (finished.work / "adamw").lstat().st_mtime_ns
    assert len(before) > 30
    again = run(job(), finished.work)
    assert again.lines == finished.lines
    assert again.report == finished.work / "report.html"
    assert contents(finished.work) == before
    assert (finished.work / "adamw").lstat().st_mtime_ns == links


@pytest.mark.parametrize(
    ("option", "kinds"),
    [
        ("decoding.beam=11", {"decoded"}),
        ("first_order.lr=6e-3", {"adamw"}),
        ("test.corpus.seed=5", {"decoded"}),
        ("tree.min_frames=40", {"tree", "graph", "adamw"}),
        ("realign.lr=5e-3", {"realign", "realigned", "adamw"}),
    ],
)
@pytest.mark.slow
def test_one_option_reruns_what_depends_on_it(
    finished: Finished, tmp_path: Path, one_thread: object, option: str, kinds: set[str]
) -> None:
    work = tmp_path / "digits"
    shutil.copytree(finished.work, work, symlinks=True)
    for folder in work.glob("cache/features"):
        shutil.rmtree(folder)  # their names hold the places of the audio
    before = contents(work)
    result = run(job("hessian_free=none", option), work)
    assert [line.split()[-2:] for line in result.lines] == [["adamw", "dev"], ["adamw", "test"]]
    after = contents(work)
    assert {name: after[name] for name in before} == before
    new = {Path(name).parts for name in after.keys() - before.keys()}
    if kinds == {"decoded"}:
        assert {parts[0] for parts in new} == {(finished.work / "adamw").readlink().name}
        assert {parts[1].split("-")[0] for parts in new} == {"decoded"}
    else:
        assert {parts[0].rsplit("-", 1)[0] for parts in new} == kinds
    if option.startswith("tree"):
        outputs = json.loads((work / "job.json").read_text())["outputs"]
        tying = Tying.load(only(work, "tree-*") / "tying.npz")
        assert tying.context == 3 and outputs == tying.num_pdfs > MONO.num_pdfs
    if option.startswith("realign"):
        truth = read_ctm(only(work, "cache/digits-*") / "train" / "words.ctm")
        found = load_alignments(only(work, "realigned-*") / "train.ark")
        assert found.keys() == truth.keys()
        assert start_errors(found, truth).mean() < 25.0  # measured: 16 ms
    if option.startswith("adamw"):
        first = parameters(finished.work, "adamw")
        assert any(not torch.equal(first[name], value) for name, value in parameters(work, "adamw").items())
    back = run(job(), work)
    assert back.lines == finished.lines


# ------------------------------------------------------------------------------------------------ interruptions


def copied(finished: Finished, exp: Path, *names: str) -> Path:
    """A working folder where only ``names`` are done, and the audio is there."""
    for pattern in ("cache/digits-*", *names):
        for path in finished.work.glob(pattern):
            shutil.copytree(path, exp / "digits" / path.relative_to(finished.work), symlinks=True)
    return exp / "digits"


def lines_in(work: Path, pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in work.glob(pattern))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_do_what_one_does(finished: Finished, tmp_path: Path) -> None:
    """Without dropout, which would draw other numbers; until rounding has grown."""
    options = ("network.dropout=0", "first_order.epochs=3", "hessian_free.epochs=2", "realign.epochs=1")
    one, two = (copied(finished, tmp_path / name, "bootstrap-*") for name in ("one", "two"))
    finish(tmp_path / "one", *options)
    process = start(tmp_path / "two", *options, program=RANKS)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    lines = printed.splitlines()
    assert [WER.fullmatch(line) is not None for line in lines] == [True] * 4 + [False]
    assert lines[-1] == f"report: {two}/report.html" and (two / "report.html").is_file()
    for text in (errors, (two / "log").read_text()):
        assert text.count("update 1 of 6: held-out") == 1
    assert {name.rsplit("-", 1)[0] for name in stages(two)} == {name.rsplit("-", 1)[0] for name in stages(one)}
    for name in ("train.ark", "dev.ark"):
        assert (only(two, "alignment-*") / name).read_bytes() == (only(one, "alignment-*") / name).read_bytes()
    for method in ("adamw", "hessian_free"):
        found, expected = (
            [(r["epoch"], r["dev_loss"]) for r in without_time(work, method) if "dev_loss" in r] for work in (two, one)
        )
        assert len(found) == len(expected) > 2
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_training(finished: Finished, tmp_path: Path) -> None:
    work = copied(finished, tmp_path, "bootstrap-*", "alignment-*")
    process = start(tmp_path, "hessian_free=none")
    wait_for(lambda: lines_in(work, "adamw-*/metrics.jsonl") >= 4, process)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = re.search(r"quadric: stopped after update (\d+) of (\d+), saved in (\S+): the same command", errors)
    assert stopped and 0 < int(stopped[1]) < int(stopped[2])
    assert (Path(stopped[3]) / "state").is_dir()
    assert "Traceback" not in errors and "%WER" not in printed
    resumed = finish(tmp_path, "hessian_free=none")
    assert resumed.lines == finished.lines[:2]
    assert_equal(parameters(resumed.work, "adamw"), parameters(finished.work, "adamw"))
    assert without_time(resumed.work, "adamw") == without_time(finished.work, "adamw")


@pytest.mark.slow
def test_kill_in_the_flat_start_and_in_training(finished: Finished, tmp_path: Path) -> None:
    work = copied(finished, tmp_path)
    for sign in ("flat-start-*/round-2/state/[0-9]*", "adamw-*/state/[0-9]*"):
        process = start(tmp_path, "hessian_free=none", program=("-c", PROGRAM))
        wait_for(lambda sign=sign: any(work.glob(sign)), process)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    folder = only(work, "adamw-*")
    updates = [together.load(place / "state", Solo())["update"] for place in (folder, finished.work / "adamw")]
    assert updates[0] < updates[1]
    resumed = finish(tmp_path, "hessian_free=none")
    assert resumed.lines == finished.lines[:2]
    assert_equal(parameters(resumed.work, "adamw"), parameters(finished.work, "adamw"))
    for name in ("train.ark", "dev.ark"):
        files = [only(place, "alignment-*") / name for place in (work, finished.work)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_while_processes_work(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "jobs=2", "train.corpus.utterances=[400,12,12]")
    log = tmp_path / "digits" / "log"
    wait_for(log.exists, process)
    time.sleep(2.0)  # the synthesiser's processes start
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith("quadric: interrupted; the same command goes on from what is done")


# ------------------------------------------------------------------------------------------------ alignments


def start_errors(alignments: Mapping[str, np.ndarray], reference: Mapping[str, tuple[Token, ...]]) -> np.ndarray:
    """Milliseconds by which word starts are off."""
    words = {id: [token.label for token in reference[id]] for id in alignments}
    found = {id: word_tokens(word_segments(words[id], pdfs, LEXICON, MONO)) for id, pdfs in alignments.items()}
    return word_start_errors(found, reference)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_flat_start_finds_the_words(finished: Finished, split: str) -> None:
    truth = read_ctm(only(finished.work, "cache/digits-*") / split / "words.ctm")
    found = load_alignments(only(finished.work, "alignment-*") / f"{split}.ark")
    assert found.keys() == truth.keys()
    errors = start_errors(found, truth)
    # Measured: 14 ms on average in either set, half of the words below 13 ms. A frame is 10 ms.
    assert errors.mean() < 25.0
    assert np.median(errors) < 20.0
    if split == "train":
        gaussian = start_errors(load_alignments(only(finished.work, "bootstrap-*") / "train.ark"), truth)
        assert errors.mean() < gaussian.mean() < 60.0  # measured: 29 ms


def aligned(finished: Finished, work: Path, *more: str) -> Mapping[str, np.ndarray]:
    if not (work / "cache").exists():
        copied(finished, work.parent)
    chosen = job("flat_start.rounds=1", "flat_start.warm=1", *more)
    done = Stages(work)
    return flat_start(chosen, prepare(chosen, done, silent), done, silent).train


@pytest.mark.parametrize("what", ["phones", "words"])
def test_times_made_elsewhere_are_taken(finished: Finished, tmp_path: Path, what: str) -> None:
    audio = only(finished.work, "cache/digits-*") / "train"
    found = aligned(finished, tmp_path / "digits", f"alignments={audio / f'{what}.ctm'}")
    assert found.keys() == corpus(finished.work, "train").by_id.keys()
    assert start_errors(found, read_ctm(audio / "words.ctm")).max() <= 10.0  # to the frame


def test_alignments_made_elsewhere_are_taken(finished: Finished, tmp_path: Path) -> None:
    work, archive = tmp_path / "digits", tmp_path / "ali.ark"
    given = dict(load_alignments(only(finished.work, "alignment-*") / "train.ark"))
    unaligned = sorted(given)[0]
    short = {id: pdfs[:-1] for id, pdfs in given.items() if id != unaligned}
    save_alignments(archive, short)
    found = aligned(finished, work, f"alignments={archive}")
    for id, pdfs in short.items():
        np.testing.assert_array_equal(found[id][:-1], pdfs)
        assert found[id][-1] == pdfs[-1]
    assert unaligned in found  # by the network that learnt the others
    # Another content under the same name is another alignment, and copies at other speeds may be in it.
    moved = {id: np.roll(pdfs, 0) for id, pdfs in given.items()} | {
        f"sp0.9-{id}": pdfs for id, pdfs in list(given.items())[:3]
    }
    lengths = {id: len(row) for id, row in aligned(finished, work, "speeds=[0.9,1.0]").items()}
    moved = {id: row[np.arange(lengths[id]) * len(row) // lengths[id]] for id, row in moved.items()}
    save_alignments(archive, moved)
    found = aligned(finished, work, f"alignments={archive}", "speeds=[0.9,1.0]")
    for id, pdfs in moved.items():
        np.testing.assert_array_equal(found[id], pdfs)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("absent.ctm", None, r"alignments=.*absent\.ctm: there is no such file"),
        ("other.ctm", "someone 1 0.0 0.5 ONE\n", "no utterance of the training set is in it"),
        ("bad.ctm", "Alex-00000 1 0.0 ONE\n", r"bad\.ctm:1: not `utterance channel start duration label`"),
        ("bad.ark", "neither one\n", r"bad\.ark: the alignment of neither, .*no integer vector"),
    ],
)
def test_useless_alignments_are_refused(
    finished: Finished, tmp_path: Path, name: str, text: str | None, problem: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        aligned(finished, tmp_path / "digits", f"alignments={tmp_path / name}")


def test_alignments_of_others_are_refused(finished: Finished, tmp_path: Path) -> None:
    save_alignments(tmp_path / "other.ark", {"someone": np.zeros(9, np.int32)})
    with pytest.raises(ValueError, match="no utterance of the training set is in it"):
        aligned(finished, tmp_path / "digits", f"alignments={tmp_path / 'other.ark'}")


# ------------------------------------------------------------------------------------------------ a trained system


def test_a_system_is_the_same_after_save_and_load(finished: Finished, tmp_path: Path) -> None:
    first = System.load(finished.work / "adamw" / "system")
    first.save(tmp_path / "copy")
    second = System.load(tmp_path / "copy")
    features = {f"u{T}": np.random.default_rng(T).normal(size=(T, first.inputs)).astype(np.float32) for T in (1, 3, 70)}
    a, b = first.likelihoods(features), second.likelihoods(features)
    for id in features:
        np.testing.assert_array_equal(a[id], b[id])
        assert a[id].shape == (len(features[id]), first.tying.num_pdfs) and np.isfinite(a[id]).all()
    for name in ("front", "inputs", "network", "decoding", "lm_weight", "word_penalty", "lexicon"):
        assert getattr(first, name) == getattr(second, name)
    assert isinstance(second.front, Front) and isinstance(second.network, Network)
    with pytest.raises(FileNotFoundError, match="no trained system there"):
        System.load(finished.work)
    with pytest.raises(ValueError, match=r"lm_weight=0\.0 must be positive"):
        first.tuned(0.0, 0.0)


def test_a_system_divides_by_the_prior_of_its_alignments(finished: Finished) -> None:
    system = System.load(finished.work / "adamw" / "system")
    pdfs = np.concatenate(list(load_alignments(only(finished.work, "alignment-*") / "train.ark").values()))
    log_prior = np.log(np.bincount(pdfs, minlength=MONO.num_pdfs) / len(pdfs))
    np.testing.assert_allclose(system.log_prior, log_prior, atol=1e-3)
    assert np.ptp(log_prior) > 1.0
    x = np.random.default_rng(0).normal(size=(20, system.inputs)).astype(np.float32)
    window = torch.from_numpy(pad_context(x, system.model.left_context, system.model.right_context))
    with torch.no_grad():
        log_posterior = torch.log_softmax(system.model(window[None])[0], -1).numpy()
    np.testing.assert_allclose(system.likelihoods({"u": x})["u"], log_posterior - log_prior, atol=2e-3)


def test_a_directory_is_decoded_as_the_job_did(finished: Finished, tmp_path: Path) -> None:
    dev = corpus(finished.work, "dev")
    lines = decode_directory(finished.work / "adamw" / "system", dev, tmp_path, jobs=1)
    there = finished.work / "adamw" / "decoded" / "dev"
    for name in ("text", "ref", "per_utt", "per_spk", "wer"):
        assert (tmp_path / name).read_bytes() == (there / name).read_bytes()
    assert f"{lines[0]} adamw dev" == finished.lines[0]
    times, words = read_ctm(tmp_path / "hyp.ctm"), read_text(tmp_path / "text")
    truth = read_ctm(only(finished.work, "cache/digits-*") / "dev" / "words.ctm")
    for id, said in words.items():
        tokens = times[id]
        assert tuple(token.label for token in tokens) == said
        assert all(a.start < a.end <= b.start + 1e-6 for a, b in pairwise(tokens))
        assert tokens[0].start >= 0.0 and tokens[-1].end <= truth[id][-1].end + 0.45  # the noise behind lasts 0.4 s
    right = {id: times[id] for id, said in words.items() if said == dev.by_id[id].words}
    assert len(right) >= 4
    assert word_start_errors(right, truth).mean() < 40.0


def test_without_transcripts_there_are_words_alone(finished: Finished, tmp_path: Path) -> None:
    dev = corpus(finished.work, "dev").head(2)
    mute = Corpus("mute", tuple(type(u)(u.id, u.speaker, (), u.audio) for u in dev))
    lines = decode_directory(finished.work / "adamw" / "system", mute, tmp_path, jobs=1)
    assert lines == (f"recognised 2 utterances: {tmp_path / 'text'}",)
    assert read_text(tmp_path / "text").keys() == dev.by_id.keys()
    assert not (tmp_path / "wer").exists()


# ------------------------------------------------------------------------------------------------ recordings


@pytest.mark.data
@pytest.mark.slow
def test_a_few_recordings_go_all_the_way(shared_data: Path, tmp_path: Path, one_thread: object) -> None:
    folder = shared_data / "speechocean762"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    options = [
        *TINY,
        "train.on_mismatch=drop",
        "tree=none",
        "hessian_free=none",
        "network.norm=layer",
        "first_order.epochs=1",
    ]
    options += ["flat_start.gaussian.components=[1,1]", "flat_start.warm=1", "flat_start.rounds=1", "autocast=false"]
    options += ["normalisation.over=utterance", "decoding.max_active=500", "decoding.lm_weights=[8]"]
    for split, count in (("train", 40), ("dev", 3), ("test", 3)):
        ids = [line.split()[0] for line in (folder / "data" / split / "text").read_text().splitlines()]
        (tmp_path / split).write_text("\n".join(ids[:: len(ids) // count][:count]))
        options.append(f"{split}.keep={tmp_path / split}")
    result = run(override(speechocean(folder), options), tmp_path / "work")
    assert [line.split()[-2:] for line in result.lines] == [["adamw", "dev"], ["adamw", "test"]]
    aligned = load_alignments(only(tmp_path / "work", "alignment-*") / "train.ark")
    assert len(aligned) >= 35
    losses = [r["dev_loss"] for r in MetricsLog(tmp_path / "work/adamw/metrics.jsonl").records() if "dev_loss" in r]
    assert losses[-1] < losses[0]
    times = tmp_path / "times"
    corpus = read_data_dir(folder / "data" / "dev").subset((tmp_path / "dev").read_text().split())
    decode_directory(tmp_path / "work/adamw/system", corpus, times, jobs=1)
    assert (times / "text").read_bytes() == (tmp_path / "work/adamw/decoded/dev/text").read_bytes()
