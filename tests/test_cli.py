"""The command line, as a person meets it: help, and one sentence with a remedy for everything that can be wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from quadric.cli import main
from quadric.progress import silent
from quadric.recipes import RECIPES, digits, directory
from quadric.speech.ctm import read_ctm
from quadric.speech.language_model import NGram
from quadric.speech.scoring import read_text
from quadric.train.overrides import options, override
from quadric.train.prepare import prepare
from quadric.train.stages import Stages, alone_in
from reference.tiny_job import TINY

pytestmark = pytest.mark.speech

REPOSITORY = Path(__file__).resolve().parents[1]
TONES = {"LOW": (300.0, 500.0), "MID": (900.0,), "HIGH": (2000.0, 1500.0)}
"""Words of a toy language and the tones that are their phones."""


class Call:
    """Runs a command in this process: exit status, output and errors, of which none may be a traceback."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            status = exit.code
        printed, errors = self._capsys.readouterr()
        assert "Traceback" not in errors
        return status, printed, errors

    def refused(self, *arguments: object) -> str:
        """What the command says when it refuses, with the status of bad input."""
        status, printed, errors = self(*arguments)
        assert status == 1 and not printed
        last = errors[errors.rindex("quadric: ") :]
        assert "[Errno" not in last
        return last.removeprefix("quadric: ").strip()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


AS_NOBODY = """
import os, sys
from quadric.cli import main

if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
sys.exit(main())
"""


def process(*arguments: object, program: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.distributed
def test_of_several_ranks_one_says_what_is_wrong(tmp_path: Path) -> None:
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "quadric")
    ended = process("train", "digits", "utterance=4", "--work", tmp_path / "exp", program=ranks)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("quadric: ")]
    assert said == ["quadric: utterance: recipe digits has no argument or option 'utterance'; did you mean utterances?"]
    ended = process("train", "digits", "--options", "--work", tmp_path / "exp", program=ranks)
    assert ended.returncode == 0 and ended.stdout.count("first_order.lr=") == 1
    assert not (tmp_path / "exp").exists()


def test_restarts_that_would_fail_are_told(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "quadric: torchrun may restart this 3 times: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or most of them fail"
    for restarts, store, expected in (("3", "", told), ("3", "1", ""), ("0", "", "")):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", store)
        assert call("train", "digits", "--options")[2].strip() == expected


def spoken(words: list[str], rng: np.random.Generator, rate: int = 8000) -> np.ndarray:
    """Every phone a tone of an eighth of a second, after and before a quarter of silence."""
    tones = [tone for word in words for tone in TONES[word]]
    clean = [np.sin(2 * np.pi * tone * np.arange(rate // 8) / rate) for tone in tones]
    quiet = np.zeros(rate // 4)
    samples = np.concatenate([quiet, *clean, quiet])
    return 0.2 * samples + 0.01 * rng.normal(size=len(samples))


def write_set(folder: Path, seed: int, count: int) -> None:
    (folder / "wav").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tables: dict[str, str] = {"text": "", "wav.scp": "", "utt2spk": ""}
    for i in range(count):
        words = [str(word) for word in rng.choice(sorted(TONES), size=rng.integers(2, 5))]
        soundfile.write(folder / "wav" / f"u{i:02d}.wav", spoken(words, rng), 8000, subtype="PCM_16")
        tables["text"] += f"u{i:02d} {' '.join(words)}\n"
        tables["wav.scp"] += f"u{i:02d} wav/u{i:02d}.wav\n"
        tables["utt2spk"] += f"u{i:02d} speaker{i % 2}\n"
    for name, text in tables.items():
        (folder / name).write_text(text)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Data directories of the toy language."""
    for seed, (split, count) in enumerate({"train": 24, "dev": 4, "test": 4}.items()):
        write_set(tmp_path / "tones" / split, seed, count)
    lines = (f"{word} {' '.join(f'P{tone:.0f}' for tone in tones)}\n" for word, tones in TONES.items())
    (tmp_path / "tones" / "lexicon.txt").write_text("".join(lines))
    return tmp_path / "tones"


def train(corpus: Path, *more: object) -> tuple[object, ...]:
    """The arguments that train on ``corpus``, in few steps."""
    few = ("hessian_free=none", "fbank.rate=8000", "first_order.epochs=20")
    data = (f"data={corpus}", f"lexicon={corpus / 'lexicon.txt'}")
    return ("train", "directory", *data, "--work", corpus.parent / "exp", *TINY, *few, *more)


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


# ------------------------------------------------------------------------------------------------ the call


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "required: COMMAND"),
        (["learn"], "invalid choice: 'learn'"),
        (["train"], "required: RECIPE\n"),
        (["train", "digit"], "invalid choice: 'digit' (choose from"),
        (["train", "digits", "--wrok", "x"], "unrecognized arguments: --wrok x"),
        (["decode", "system"], "required: data, --out"),
        (["decode", "system", "data", "--out", "o", "--jobs", "two"], "invalid int value: 'two'"),
        (["align", "system"], "required: data, --out"),
        (["lattice", "system", "data"], "required: --out"),
        (["lattice", "system", "data", "--out", "o", "--archive", "gz"], "--archive: invalid choice: 'gz'"),
        (["lattice", "system", "data", "--out", "o", "--backend", "k2"], "--backend: invalid choice: 'k2'"),
        (["lattice", "system", "data", "--out", "o", "--beam", "wide"], "--beam: invalid float value: 'wide'"),
        (["score", "ref"], "required: hypothesis"),
        (["report"], "required: work"),
    ],
)
def test_a_wrong_call(call: Call, arguments: list[str], problem: str) -> None:
    status, printed, errors = call(*arguments)
    assert status == 2 and not printed
    assert problem in errors and errors.startswith("usage: quadric")


@pytest.mark.parametrize("command", [[], ["train"], ["align"], ["lattice"], ["decode"], ["score"], ["report"]])
def test_help(call: Call, command: list[str]) -> None:
    status, printed, errors = call(*command, "--help")
    assert status == 0 and not errors
    assert max(map(len, printed.splitlines())) <= 140
    if command == ["train"]:
        for recipe in RECIPES:
            assert re.search(rf"^  {recipe.__name__} .*=", printed, re.M)
        assert "directory data=... lexicon=... [train=train]" in printed
        assert "--options" in printed and "first_order.lr=" in printed
    elif not command:
        assert all(name in printed for name in ("train", "align", "lattice", "decode", "score", "report"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["first_order.lrr=1"], "first_order.lrr: FirstOrder has no option 'lrr'; did you mean lr?"),
        (["utterance=4"], "recipe digits has no argument or option 'utterance'; did you mean utterances?"),
        (["hesian_free=none"], "did you mean hessian_free?"),
        (["zzz=1"], "--options lists what there is"),
        (["fast"], "'fast' has no '=': write option=value"),
        (["utterances"], "'utterances' has no '=': write option=value"),
        (["utterances=many"], "utterances=many: "),
        (["utterances=0"], "utterances=0"),
        (["first_order.lr=big"], "first_order.lr=big: "),
        (["unknown_words=skip"], "unknown_words=skip: must be 'error' or 'drop'"),
        (
            ["first_order=torch.optim.SGD"],
            "first_order=torch.optim.SGD: must be none or a group of options; set one of them, for exam",
        ),
        (["speeds=1.0"], "speeds=1.0: must be a list of numbers, for example speeds=[0.5,1.0]"),
        (["network.sizes=[48,48]"], "network.sizes=[48,48]: offsets has 3 rows for 2 hidden layers; give one row per"),
        (["chunk=20000"], "chunk=20000: must be between 1 and 10000"),
        (["first_order=fast"], "first_order=fast: "),
        (["first_order.epochs=0"], "first_order.epochs=0: must be positive"),
        (["jobs=0"], "jobs=0: must be positive"),
        (["seed=-1"], "seed=-1"),
        (["first_order=none", "hessian_free=none"], "leave one in at least"),
        (["fbank.high=9000"], "must lie between 0 and 8000 Hz"),
    ],
)
def test_wrong_options_end_before_any_work(call: Call, tmp_path: Path, overrides: list[str], problem: str) -> None:
    message = call.refused("train", "digits", "--work", tmp_path / "exp", *overrides)
    assert problem in message and not re.search(r"(\S+=\S+): \1", message)
    assert not (tmp_path / "exp").exists()


def test_arguments_that_a_recipe_needs(call: Call) -> None:
    assert call.refused("train", "directory", "lexicon=x") == "recipe directory needs data=..."
    assert call.refused("train", "directory") == "recipe directory needs data=... lexicon=..."


def test_the_listed_options_can_be_given(call: Call) -> None:
    status, printed, _ = call(
        "train", "digits", "first_order.lr=0.5", "--options", "utterances=12", "hessian_free=none"
    )
    assert status == 0
    present = [line for line in printed.splitlines() if not line.startswith("# ")]
    absent = dict(line.removeprefix("# ").split("=", 1) for line in printed.splitlines() if line.startswith("# "))
    assert absent["tree.leaves"] == "600" and "hessian_free.damping" in absent
    listed = dict(line.split("=", 1) for line in present)
    assert listed["first_order.lr"] == "0.5" and listed["train.corpus.utterances"] == "[12, 2, 4]"
    assert listed["hessian_free"] == "none"
    job = override(digits(utterances=12), ["first_order.lr=0.5", "hessian_free=none"])
    given = [f"{key}={value}" for key, value in listed.items()]
    assert dict(options(job)).keys() == listed.keys()
    assert override(digits(), given) == job


def test_options_into_a_pipe_that_closes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = f"{sys.executable} -m quadric train digits --options"
    with subprocess.Popen(command.split(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_ctrl_c_while_the_command_line_loads() -> None:
    program = (
        "import sys, quadric.__main__ as start\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "sys.exit(start.main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_what_every_process_imports_is_light() -> None:
    program = (
        "import quadric.__main__, sys; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------------ data that is wrong


def test_no_such_data(call: Call, corpus: Path) -> None:
    assert "there is no data directory /none/train" in call.refused("train", "directory", "data=/none", "lexicon=x",
                                                                    "--work", corpus.parent / "exp")  # fmt: skip
    (corpus / "lexicon.txt").unlink()
    assert "there is no such lexicon file" in call.refused(*train(corpus))
    (corpus / "dev" / "text").unlink()
    assert "dev holds no text" in call.refused(*train(corpus))


def test_commands_are_run_only_where_allowed(call: Call, corpus: Path) -> None:
    wav = corpus / "train" / "wav" / "u01.wav"
    edit(corpus / "train" / "wav.scp", lambda text: text.replace("wav/u01.wav", f"cat {wav} |"))
    message = call.refused(*train(corpus))
    assert f"shell commands in {corpus / 'train' / 'wav.scp'}: 1 (line 2)" in message
    option = re.search(r"\(that is (\S+)\)", message)
    assert option and option[1] == "train.allow_commands=true"
    status, _, errors = call(*train(corpus, option[1]))
    assert status == 0, errors


def test_missing_and_damaged_audio(call: Call, corpus: Path) -> None:
    (corpus / "train" / "wav" / "u03.wav").unlink()
    (corpus / "train" / "wav" / "u05.wav").write_bytes(b"no audio")
    message = call.refused(*train(corpus))
    assert "the audio of 2 utterances of train cannot be used" in message
    assert f"u03 missing: there is no file {corpus / 'train' / 'wav' / 'u03.wav'}" in message
    assert "u05 is not audio" in message
    assert "pass on_bad_audio=drop" in message
    status, printed, errors = call(*train(corpus, "on_bad_audio=drop"))
    assert status == 0, errors
    gone = f"u03: audio missing: there is no file {corpus / 'train' / 'wav' / 'u03.wav'}"
    assert f"train: left out for audio that cannot be used: 2 ({gone}, u05: audio is not audio: " in errors
    assert printed.count("%WER") == 2
    assert counted(corpus, "data", "train") == {
        "utterances": 22,
        "utterances left out": 2,
        "left out: audio that cannot be used": 2,
    }
    assert counted(corpus, "data", "test") == {"utterances": 4, "utterances left out": 0}
    assert counted(corpus, "alignment", "train")["utterances left out"] == 0
    page = (corpus.parent / "exp" / "tones" / "report.html").read_text()
    assert "<dt>train: left out: audio that cannot be used</dt><dd>2</dd>" in page


def counted(corpus: Path, part: str, split: str) -> dict[str, object]:
    """What a finished job says of a set."""
    facts = json.loads((corpus.parent / "exp" / "tones" / "job.json").read_text())[part]
    return {name.removeprefix(f"{split}: "): value for name, value in facts.items() if name.startswith(split)}


def latin(path: Path) -> None:
    """Makes the second line of a file one that is not UTF-8."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xe9" + b"".join(lines[1:]))


def test_all_audio_is_missing(call: Call, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (corpus / "train" / "wav").rename(tmp_path / "far" / "wav")
    message = call.refused(*train(corpus))
    assert message.startswith(
        f"train: wav/u00.wav, the first relative path of {corpus / 'train' / 'wav.scp'}, is not in "
    )
    assert "nor is any of the 23 others: the audio is missing, or lies in another folder" in message
    assert message.endswith("(that is train.root=PATH)") and "on_bad_audio" not in message
    options = [f"train.root={tmp_path / 'far'}", "fbank.rate=8000", "jobs=1"]
    job = override(directory(corpus, corpus / "lexicon.txt"), options)
    assert len(prepare(job, Stages(tmp_path / "work"), silent).corpora["train"]) == 24
    (corpus / "test" / "wav").rename(tmp_path / "far" / "test")
    message = call.refused("decode", tmp_path, corpus / "test", "--out", tmp_path / "out")
    assert message.endswith("or pass --root PATH with that folder")
    message = call.refused("decode", tmp_path, corpus / "test", "--out", tmp_path / "out", "--root", tmp_path)
    assert f"is not in {tmp_path}, nor is any of" in message


def test_decode_names_its_own_options_for_tables_that_disagree(call: Call, corpus: Path, tmp_path: Path) -> None:
    edit(corpus / "test" / "utt2spk", lambda text: text.replace("u02 speaker0\n", ""))
    arguments = ("decode", tmp_path, corpus / "test", "--out", tmp_path / "out")
    assert "or pass --drop-mismatched to keep only" in call.refused(*arguments)
    assert "no trained system there" in call.refused(*arguments, "--drop-mismatched")


def test_text_that_is_missing_in_train(call: Call, corpus: Path) -> None:
    (corpus / "dev" / "text").unlink()
    assert call.refused(*train(corpus)).endswith("dev holds no text: write the transcripts there")


@pytest.mark.parametrize("file", ["train/text", "train/wav.scp", "lexicon.txt", "lm.arpa", "times.ctm", "keep"])
def test_files_in_another_encoding(call: Call, corpus: Path, file: str) -> None:
    path = corpus / file
    model = NGram.estimate([["LOW", "MID"]], sorted(TONES), 2)
    model.write_arpa(corpus / "lm.arpa")
    (corpus / "keep").write_text("".join(f"u{i:02d}\n" for i in range(24)))
    (corpus / "times.ctm").write_text("".join(f"u{i:02d} 1 0.25 0.1 P300\n" for i in range(24)))
    options = {"lm.arpa": f"arpa={path}", "times.ctm": f"alignments={path}", "keep": f"train.keep={path}"}
    arguments = train(corpus, *([options[file]] if file in options else []))
    latin(path)
    message = call.refused(*arguments)
    assert re.search(rf"{path}:2: not UTF-8 .*: convert the file, for example with `iconv", message), message


def test_a_mark_of_byte_order_is_no_part_of_a_word(call: Call, corpus: Path, tmp_path: Path) -> None:
    for path in (*corpus.glob("*/*"), corpus / "lexicon.txt"):
        if path.is_file():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (corpus / "keep").write_bytes(b"\xef\xbb\xbfu00\nu01\n")
    options = [f"train.keep={corpus / 'keep'}", "fbank.rate=8000", "jobs=1"]
    found = prepare(override(directory(corpus, corpus / "lexicon.txt"), options), Stages(tmp_path / "work"), silent)
    assert found.corpora["train"].by_id.keys() == {"u00", "u01"}
    assert found.lexicon.words == tuple(sorted(TONES))
    assert "keep=nowhere: there is no such file" in call.refused(*train(corpus, "train.keep=nowhere"))


def test_nothing_is_left_of_a_set(call: Call, corpus: Path) -> None:
    """Of a set without one usable utterance the message says which it is, and why."""
    before = {path: path.read_text() for path in corpus.glob("*/text")}
    edit(corpus / "dev" / "text", lambda text: re.sub(r"(?m)$", 30 * " LOW", text.strip()))
    message = call.refused(*train(corpus))
    assert re.match(r"dev: no utterance is long enough for its words: 4 \(u00: \d+ frames, at least \d+, ", message)
    (corpus / "dev" / "text").write_text(before[corpus / "dev" / "text"])
    edit(corpus / "train" / "text", lambda text: re.sub(r"(?m)$", " NEVER", text.strip()))
    message = call.refused(*train(corpus, "unknown_words=drop"))
    assert message.startswith("train: unknown_words=drop leaves out all 24 utterances: the lexicon lacks 1 (NEVER)")


@pytest.mark.parametrize("word", ["<eps>", "<s>", "#0", "A\fB"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_words_that_cannot_be_are_refused_before_any_work(call: Call, corpus: Path, split: str, word: str) -> None:
    edit(corpus / split / "text", lambda text: text.replace("u02 ", f"u02 {word} "))
    message = call.refused(*train(corpus, "unknown_words=drop"))
    assert message.startswith(f"{split}: words that are reserved, or hold white space: 1 (u02: {word!r}): remove or")
    assert not (corpus.parent / "exp" / "tones" / "cache").exists()


def test_too_few_leaves_are_refused_before_any_work(call: Call, corpus: Path) -> None:
    message = call.refused(*train(corpus, "tree.leaves=17"))
    assert message.startswith("tree.leaves=17: 5 phones and silence with 3 states each need at least 18")
    assert not (corpus.parent / "exp" / "tones" / "cache").exists()


def test_a_flat_start_that_diverges(call: Call, corpus: Path) -> None:
    message = call.refused(*train(corpus, "flat_start.lr=1e8", "flat_start.network.norm=none"))
    assert re.match(r"the objective is (nan|inf) after update \d+: training diverged; lower the learning rate", message)


@pytest.mark.parametrize(
    ("table", "change", "problem", "option"),
    [
        ("text", ("u02 ", "u02\nx "), "empty transcripts in", "train.on_empty=drop"),
        ("text", ("u02 ", "u01 "), "repeated ids in .*: 1 (u01 on line 3): keep one line of each", None),
        ("wav.scp", ("u02 ", "u01 "), "repeated ids in", None),
        ("wav.scp", ("u02 ", "v02 "), "the tables of .* disagree: .*not in wav.scp: 1 (u02)", "train.on_mismatch=drop"),
        ("utt2spk", ("u02 speaker0", "u02"), "malformed lines in .*: 1 (line 3: one field expected", None),
    ],
)
def test_tables_that_are_wrong(
    call: Call, corpus: Path, table: str, change: tuple[str, str], problem: str, option: str | None
) -> None:
    edit(corpus / "train" / table, lambda text: text.replace(*change, 1))
    if "\nx " in change[1]:
        edit(corpus / "train" / table, lambda text: re.sub(r"x .*\n", "", text))
    message = call.refused(*train(corpus))
    assert re.search(problem.replace("(", r"\(").replace(")", r"\)"), message), message
    offered = re.search(r"\(that is (\S+)\)", message)
    assert (offered[1] if offered else None) == option
    assert message.startswith("train: ")


@pytest.mark.parametrize("shift", [10.0, 12.5])
def test_hours_are_those_of_the_audio(corpus: Path, caplog: pytest.LogCaptureFixture, shift: float) -> None:
    files = (corpus / "train" / "wav").iterdir()
    hours = 100 * sum(soundfile.info(file).duration for file in files) / 3600  # a hundred copies, by name
    for i in range(99):
        for table in ("text", "wav.scp", "utt2spk"):
            lines = (corpus / "train" / table).read_text().splitlines()[:24]
            with (corpus / "train" / table).open("a") as file:
                file.writelines(f"copy{i}-{line}\n" for line in lines)
    job = override(
        directory(corpus, corpus / "lexicon.txt"), ["fbank.rate=8000", f"fbank.frame_shift_ms={shift}", "jobs=1"]
    )
    with caplog.at_level("INFO"):
        prepare(job, Stages(corpus.parent / "work"), silent)
    (said,) = re.findall(r"train: 2400 utterances of 2 speakers, (\S+) hours", caplog.text)
    assert float(said) == pytest.approx(hours, abs=0.02)


def test_words_that_are_not_in_the_lexicon(call: Call, corpus: Path) -> None:
    edit(corpus / "train" / "text", lambda text: text.replace("u04 ", "u04 NEVER ").replace("u06 ", "u06 EVER NEVER "))
    message = call.refused(*train(corpus))
    assert "train: 2 words of the text are not in the lexicon: NEVER (2), EVER (1)" in message
    assert "unknown_words=drop" in message
    edit(corpus / "test" / "text", lambda text: text.replace("u00 ", "u00 OTHER "))
    edit(corpus / "train" / "text", lambda text: f"{text}more LOW\n")
    status, printed, errors = call(*train(corpus, "unknown_words=drop", "train.on_mismatch=drop"))
    assert status == 0
    assert "left out 2 of 24 utterances for 2 words that are not in the lexicon: {'NEVER': 2, 'EVER': 1}" in errors
    assert "test: 1 words are not in the lexicon and cannot be recognised: {'OTHER': 1}" in errors
    assert counted(corpus, "data", "train") == {
        "utterances": 22,
        "utterances left out": 3,
        "left out: words that the lexicon lacks": 2,
        "left out: not in wav.scp nor utt2spk": 1,
    }
    assert counted(corpus, "data", "test") == {"utterances": 4, "utterances left out": 0}
    words = sum(len(line.split()) - 1 for line in (corpus / "test" / "text").read_text().splitlines())
    assert re.search(rf"%WER \S+ \[ \d+ / {words}, .* adamw test", printed)  # the test set stays whole


def test_a_set_that_is_trained_on_is_named(call: Call, corpus: Path) -> None:
    status, _, errors = call(*train(corpus, "dev=train"))
    assert status == 0
    assert "dev: 24 of its 24 utterances are in the training set as well, u00 for one" in errors
    assert "test: 4 of its 4" in errors  # the toy sets number their utterances alike


def test_another_rate_and_too_short_for_its_words(call: Call, corpus: Path) -> None:
    rng = np.random.default_rng(0)
    path = corpus / "train" / "wav" / "u07.wav"
    soundfile.write(path, spoken(["LOW", "MID"], rng, 16000), 16000, subtype="PCM_16")
    edit(corpus / "train" / "text", lambda text: re.sub("u07 .*", "u07 LOW MID", text))
    soundfile.write(corpus / "train" / "wav" / "u08.wav", spoken(["MID"], rng)[:1000], 8000, subtype="PCM_16")
    edit(corpus / "train" / "text", lambda text: re.sub("u08 .*", "u08 LOW LOW LOW HIGH", text))
    status, printed, errors = call(*train(corpus, "sequence.nghf=none", "sequence.sgd.epochs=1"))
    assert status == 0
    assert "train: of 24 utterances, resampled from 16000 to 8000 Hz: 1 (u07)" in errors
    sentence = "left out utterances too short for their words: 1 (u08: 13 frames, at least 24)"
    assert sentence in errors
    assert sentence in (corpus.parent / "exp" / "tones" / "log").read_text()
    assert len(re.findall(r"%WER \S+ \[ \d+ / \d+, .*\] (?:adamw|smbr_sgd) (?:dev|test)", printed)) == 4
    assert "report: " in printed
    reason = "13 frames, its words take at least 24"
    assert f"train: of 24 utterances, left out 1 (u08: {reason})" in errors
    short = {"utterances left out": 1, "left out: too short for its words": 1}
    assert counted(corpus, "sequence", "train").items() >= ({"utterances": 23} | short).items()
    assert counted(corpus, "alignment", "train").items() >= ({"utterances aligned": 23} | short).items()
    assert counted(corpus, "data", "train") == {"utterances": 24, "utterances left out": 0}
    status, again, _ = call(*train(corpus, "sequence.nghf=none", "sequence.sgd.epochs=1"))
    assert (status, again) == (0, printed)
    assert counted(corpus, "sequence", "train").items() >= ({"utterances": 23} | short).items()


# ------------------------------------------------------------------------------------------------ places to write to


def test_a_folder_that_is_a_file(call: Call, corpus: Path) -> None:
    (corpus.parent / "exp").write_text("")
    message = call.refused(*train(corpus))
    assert message.startswith(f"cannot write to {corpus.parent / 'exp' / 'tones'}: ")
    assert "choose another folder" in message


def test_no_permission_to_write(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir(mode=0o500)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    done = process(*train(corpus), program=("-c", AS_NOBODY))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"quadric: cannot write to {tmp_path / 'exp' / 'tones'}: " in done.stderr


@pytest.mark.slow
def test_a_full_disk(call: Call, corpus: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("4m")
    arguments = [disk if argument == corpus.parent / "exp" else argument for argument in train(corpus)]
    full = set()
    for room in range(400_000, 4_000_000, 500_000):  # a person frees some space, and tries again
        (disk / "ballast").write_bytes(bytes(2**22 - 8192 - room))
        status, printed, errors = call(*arguments)
        (disk / "ballast").unlink()
        if status == 0:
            break
        found = re.search(rf"quadric: cannot write to {disk}/tones/(\S+): the disk is full: free some", errors)
        assert status == 1 and found, errors
        full.add(re.split("[-/]", found[1])[0])
    assert full >= {"cache", "flat", "adamw"}  # while caching features, aligning and training
    assert printed.count("%WER") == 2


# ------------------------------------------------------------------------------------------------ decode, score, report


def test_decode_and_report(call: Call, corpus: Path, tmp_path: Path) -> None:
    exp = corpus.parent / "exp" / "tones"
    assert "no finished job there; run quadric train first" in call.refused("report", exp)
    assert "no trained system there" in call.refused("decode", exp, corpus / "test", "--out", tmp_path / "none")
    status, trained, errors = call(*train(corpus))
    assert status == 0, errors
    status, printed, _ = call("report", exp)
    assert (status, printed) == (0, f"report: {exp / 'report.html'}\n")
    system, out = exp / "adamw" / "system", tmp_path / "decoded"
    status, printed, _ = call("decode", system, corpus / "test", "--out", out, "--jobs", 1)
    assert status == 0
    assert f"{printed.splitlines()[0]} adamw test" in trained
    assert read_ctm(out / "hyp.ctm").keys() == {id for id, words in read_text(out / "text").items() if words}
    assert "lm_weight=0.0 must be positive" in call.refused(
        "decode", system, corpus / "test", "--out", out, "--lm-weight", 0
    )
    assert "jobs=0 " in call.refused("decode", system, corpus / "test", "--out", out, "--jobs", 0)
    assert "there is no data directory" in call.refused("decode", system, tmp_path / "nowhere", "--out", out)
    (tmp_path / "file").write_text("")
    assert "choose another folder" in call.refused("decode", system, corpus / "test", "--out", tmp_path / "file" / "o")
    edit(corpus / "test" / "wav.scp", lambda text: text.replace("wav/u01", f"cat {corpus}/test/wav/u01") + "")
    edit(corpus / "test" / "wav.scp", lambda text: re.sub(r"(u01 cat .*)", r"\1 |", text))
    assert "pass --allow-commands" in call.refused("decode", system, corpus / "test", "--out", out)
    (corpus / "test" / "wav" / "u02.wav").unlink()
    allowed = ("decode", system, corpus / "test", "--out", out, "--jobs", 1, "--allow-commands")
    assert "pass --drop-bad-audio" in call.refused(*allowed)
    words = sum(len(said) for id, said in read_text(corpus / "test" / "text").items() if id != "u03")
    edit(corpus / "test" / "text", lambda text: re.sub(r"u03 .*", "u03", text))
    status, printed, errors = call(*allowed, "--drop-bad-audio")
    assert status == 0 and "1 of 4 utterances have no transcript: not scored" in errors
    assert f" / {words}, " in printed.splitlines()[0] and printed.splitlines()[0].endswith("[PARTIAL]")
    assert printed.splitlines()[2] == "Scored 3 sentences, 1 not present in hyp."
    assert read_text(out / "text").keys() == {"u00", "u01", "u03"}
    (corpus / "test" / "text").unlink()
    status, printed, _ = call(*allowed, "--drop-bad-audio")
    assert (status, printed) == (0, f"recognised 3 utterances: {out / 'text'}\n")


def test_decode_overwrites_no_data(call: Call, corpus: Path, tmp_path: Path) -> None:
    data, system, job = corpus / "test", tmp_path / "system", tmp_path / "job" / "dev"
    (tmp_path / "link").symlink_to(data)
    for file in (system / "options.json", job / "key.json", job.parent / "sweep.json", job / "inside" / "feats.scp"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, what in (
        (data, "a data directory is there (wav.scp)"),
        (tmp_path / "link", "a data directory"),
        (corpus / "dev" / ".." / "test", "a data directory"),
        (job / "inside", "a data directory is there (feats.scp)"),
        (system, "a trained system is there (options.json)"),
        (job, "a part of a job"),
        (job.parent / "test", "a part of a job is there (../sweep.json)"),
    ):
        message = call.refused("decode", system, data, "--out", out)
        assert message.startswith(f"--out {out}: ") and what in message
        assert message.endswith("which would be overwritten; name a folder of its own")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_decode_is_alone_where_it_writes(call: Call, corpus: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"):
        message = call.refused("decode", tmp_path, corpus / "test", "--out", tmp_path / "out")
    assert message == f"--out {tmp_path / 'out'}: another job is at work there; wait for it, or use another folder"
    assert (tmp_path / "out" / "log").read_text() == "", "the log is the other's"


def test_damaged_files_are_named_with_the_remedy(call: Call, corpus: Path, tmp_path: Path) -> None:
    exp = corpus.parent / "exp" / "tones"
    status, trained, errors = call(*train(corpus))
    assert status == 0, errors
    folder = (exp / "adamw").resolve()
    before = (folder / "metrics.jsonl").read_bytes()
    remedy = f"{folder} is damaged .*: delete it, and the same `quadric train` makes it again"
    (folder / "metrics.jsonl").unlink()
    assert re.match(remedy, call.refused("report", exp))
    (folder / "metrics.jsonl").write_bytes(before)
    edit(exp / "adamw" / "system" / "options.json", lambda text: text.replace('"inputs"', '"input"'))
    refused = call.refused("decode", exp / "adamw" / "system", corpus / "test", "--out", tmp_path / "out")
    assert "the system is damaged, or of another version of quadric (unknown option 'input')" in refused
    edit(exp / "adamw" / "system" / "options.json", lambda text: text.replace('"input"', '"inputs"'))
    graph = exp / "adamw" / "system" / "graph.fst"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    refused = call.refused("decode", exp / "adamw" / "system", corpus / "test", "--out", tmp_path / "out")
    assert "the system is damaged, or of another version of quadric" in refused and "graph.fst" in refused
    graph.write_bytes(whole)
    (lm,) = exp.glob("lm-*/lm.arpa")
    (features,) = (path for path in exp.glob("cache/features/*/feats.00000.ark") if path.stat().st_size > 200_000)
    for file in (features, lm):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        named = re.match(r"(\S+) is damaged .*: delete it, and the same (`quadric train`|command) makes it again$",
                         call.refused(*train(corpus)))  # fmt: skip
        assert named and Path(named[1]) == file.parent
        shutil.rmtree(named[1])
        status, again, errors = call(*train(corpus))
        assert (status, again) == (0, trained), errors
    (features.with_suffix(".scp")).write_text("u00\n")
    status, again, errors = call(*train(corpus))
    assert (status, again) == (0, trained) and "computing features again: malformed lines in" in errors
    for name in ("alignment", "bootstrap", "flat-start", "adamw"):
        (stage,) = exp.glob(f"{name}-*")
        for file in stage.rglob("*"):
            if file.suffix in (".ark", ".pt"):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if name != "alignment":  # made from what is damaged next
            for made in exp.glob("alignment-*"):
                shutil.rmtree(made)
        if name == "adamw":
            for made in exp.glob("flat-start-*"):
                shutil.rmtree(made)
        status, _, errors = call(*train(corpus))
        assert status == 1
        named = re.search(r"quadric: (\S+) is damaged .*: delete it, and the same `quadric train` makes", errors)
        assert named, errors
        assert Path(named[1]).relative_to(exp).parts[0] == stage.name
        shutil.rmtree(stage)
    status, again, errors = call(*train(corpus))
    assert (status, again) == (0, trained), errors


def test_score(call: Call, tmp_path: Path) -> None:
    reference, hypothesis, speakers = (tmp_path / name for name in ("ref", "hyp", "utt2spk"))
    reference.write_text("a ONE TWO\nb THREE\n")
    hypothesis.write_text("a ONE\nb THREE\n")
    speakers.write_text("a ann\nb bob\n")
    status, printed, _ = call("score", reference, hypothesis, "--utt2spk", speakers)
    assert status == 0
    assert printed.splitlines() == [
        "%WER 33.33 [ 1 / 3, 0 ins, 1 del, 0 sub ]",
        "%SER 50.00 [ 1 / 2 ]",
        "Scored 2 sentences, 0 not present in hyp.",
        "ann %WER 50.00 [ 1 / 2, 0 ins, 1 del, 0 sub ]",
        "bob %WER 0.00 [ 0 / 1, 0 ins, 0 del, 0 sub ]",
    ]
    hypothesis.write_text("a ONE\n")
    message = call.refused("score", reference, hypothesis)
    assert "none for b" in message and "--count-missing" in message
    status, printed, _ = call("score", reference, hypothesis, "--count-missing")
    assert status == 0 and printed.startswith("%WER 66.67 [ 2 / 3, 0 ins, 2 del, 0 sub ] [PARTIAL]")
    for text, problem in (
        ("a ONE\nb THREE\nc TWO\n", "no reference for c"),
        ("a ONE\nb THREE\na TWO\n", f"{hypothesis}:3: utterance a is already on line 1"),
        ("a ONE\n\nb THREE\n", f"{hypothesis}:2: the line is empty"),
    ):
        hypothesis.write_text(text)
        assert problem in call.refused("score", reference, hypothesis)
    assert "no such file" in call.refused("score", tmp_path / "none", hypothesis)
    assert call.refused("score", tmp_path, hypothesis)
    speakers.write_text("a ann\n")
    hypothesis.write_text("a ONE\nb THREE\n")
    assert "speakers: none given for b" in call.refused("score", reference, hypothesis, "--utt2spk", speakers)
