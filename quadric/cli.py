"""The command line: ``quadric train``, ``align``, ``lattice``, ``decode``, ``score`` and ``report``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from quadric.comm.collective import Collective
from quadric.comm.communicator import Communicator, FirstFailed

try:
    from quadric.lattice.generate import LatticeOptions
    from quadric.progress import Progress, silent
    from quadric.recipes import RECIPES
    from quadric.speech.backends import Backend
    from quadric.speech.corpus import Corpus, read_data_dir
    from quadric.speech.scoring import read_text, score
    from quadric.train import comparison
    from quadric.train.console import bar, logged
    from quadric.train.decode import check_output, decode_directory
    from quadric.train.directory import align_directory, lattice_directory
    from quadric.train.finished import report
    from quadric.train.method import TRAININGS
    from quadric.train.overrides import absent_options, convert, options, override
    from quadric.train.pipeline import Result, run
    from quadric.train.recipe import PAPER_NETWORKS, Job
    from quadric.train.stages import plain
    from quadric.train.task import TaskJob
    from quadric.train.trainer import Interrupted
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("quadric"):
        raise
    sys.exit(f"quadric: {missing.name} is not installed: pip install 'quadric[speech]'")


_ON_DATA = {
    'on_mismatch="drop"': "--drop-mismatched",
    "allow_commands=True": "--allow-commands",
    "root=PATH": "--root PATH",
    "out=": "--out ",
}

_HERE = {
    "train": {
        'on_bad_audio="drop"': "on_bad_audio=drop",
        ", or pass allow_missing_text=True to read it without words": "",
    },
    "decode": _ON_DATA | {'on_bad_audio="drop"': "--drop-bad-audio"},
    "align": _ON_DATA,
    "lattice": _ON_DATA
    | {"lattice_beam=": "--lattice-beam ", "max_active=": "--max-active ", "beam=": "--beam ", "backend=": "--backend "}
    | {"lm_weight=": "--lm-weight "},
    "score": {"on_missing='count'": "--count-missing"},
    "report": {},
}
"""Of each command, the arguments that messages name and what stands for them on the command line."""

_INTERRUPTED = "interrupted; the same command goes on from what is done"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 an error of the input, 2 of the call, 130 interrupted."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, in order
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides only where they stand in one row.
    if chosen.command is not _train or any(word.startswith("-") for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        chosen.overrides = [*chosen.overrides, *rest]
    try:
        chosen.command(chosen)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has enough of it; nothing is left to be flushed when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FirstFailed:
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        where = f"rank {chosen.rank}: " if chosen.rank else ""
        print(f"quadric: {where}{_sentence(error, _HERE[chosen.name])}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        if not chosen.rank:
            print(f"quadric: {stop if isinstance(stop, Interrupted) else _INTERRUPTED}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quadric",
        description="Few, strong steps: acoustic models from recordings to word error rate, and other networks.",
    )
    parser.set_defaults(rank=0)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="from recordings to word error rate, or from data to a trained network, by a recipe",
        description="Trains, decodes, scores and reports by a recipe. Run again, it goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_recipes(),
    )
    train.add_argument("recipe", metavar="RECIPE", choices=[recipe.__name__ for recipe in RECIPES], help="see below")
    train.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="OPTION=VALUE",
        help="recipe arguments and options, such as first_order.lr=3e-4",
    )
    train.add_argument("--work", type=Path, default=Path("exp"), help="folder of working folders (default: exp)")
    train.add_argument(
        "--async", action="store_true", dest="asynchronous",
        help="by workers on a parameter server that wait for nobody: averaged SGD in one pass, and what options bring "
        "in besides, such as first_order.optimizer=SGD; --options lists those of asynchronous.OPTION",
    )  # fmt: skip
    train.add_argument("--workers", type=int, help="with --async: processes that compute (default: 2)")
    train.add_argument("--options", action="store_true", help="print all options with their values, and stop")
    train.set_defaults(command=_train, name="train")

    decode = commands.add_parser(
        "decode",
        help="recognise a data directory with a trained system",
        description="Writes the words recognised in a Kaldi data directory, and their errors if it has transcripts.",
    )
    _add_data(decode, "folder for text, per_utt, per_spk, hyp.trn, ref.trn, hyp.ctm")
    decode.add_argument("--lm-weight", type=float, help="language-model weight (default: the system's)")
    decode.add_argument("--word-penalty", type=float, help="cost of a word, in nats (default: the system's)")
    decode.add_argument("--drop-bad-audio", action="store_true", help="leave out what is missing or damaged")
    decode.set_defaults(command=_decode, name="decode")

    align = commands.add_parser(
        "align",
        help="find which state sounds when in a data directory, by a trained system",
        description="Aligns the transcripts of a Kaldi data directory. An utterance that cannot be aligned is left "
        "out, counted, and named with the reason in OUT/left_out.",
    )
    _add_data(align, "folder for ali.ark (a pdf a frame), phones.ctm, words.ctm, left_out")
    align.set_defaults(command=_align, name="align")

    lattice = commands.add_parser(
        "lattice",
        help="make lattices of a data directory, by a trained system",
        description="Makes state-level lattices of a Kaldi data directory, and tells how few errors their best paths "
        "make. Run again, it goes on where it stopped. An utterance without a lattice is left out, counted, and named "
        "with the reason in OUT/left_out.",
    )
    _add_data(lattice, "folder for lattices, left_out, and Kaldi's lat.ark, final.mdl, words.txt")
    defaults = LatticeOptions()
    lattice.add_argument(
        "--beam", type=float, default=defaults.beam, help="of the search, in nats (default: %(default)s)"
    )
    lattice.add_argument(
        "--lattice-beam", type=float, default=defaults.lattice_beam,
        help="paths that are worse than the best by more are left out (default: %(default)s)",
    )  # fmt: skip
    lattice.add_argument(
        "--max-active", type=int, default=defaults.max_active,
        help="states a frame at most (default: %(default)s); not with --backend kaldi, which has no limit",
    )  # fmt: skip
    lattice.add_argument(
        "--backend", choices=get_args(Backend), default="quadric",
        help="whose search: quadric's, or kaldi-decoder's, an independent and slower one, which more jobs do not make "
        "faster (default: %(default)s)",
    )  # fmt: skip
    lattice.add_argument("--arpa", type=Path, help="language model of the lattices (default: the system's)")
    lattice.add_argument("--lm-weight", type=float, help="language-model weight (default: the system's)")
    lattice.add_argument(
        "--archive", choices=["none", "binary", "text"], default="none", help="write Kaldi's lattices as well"
    )
    lattice.set_defaults(command=_lattice, name="lattice")

    scoring = commands.add_parser(
        "score",
        help="word error rate of a hypothesis file against a reference file",
        description="Both files in Kaldi's form: an utterance id, then its words.",
    )
    scoring.add_argument("reference", type=Path)
    scoring.add_argument("hypothesis", type=Path)
    scoring.add_argument("--utt2spk", type=Path, help="speakers, for errors per speaker")
    scoring.add_argument("--count-missing", action="store_true", help="count missing hypotheses as deletions")
    scoring.set_defaults(command=_score, name="score")

    again = commands.add_parser("report", help="write the report of a finished job again")
    again.add_argument("work", type=Path, help="a working folder, such as exp/digits")
    again.set_defaults(command=_report, name="report")
    return parser


def _add_data(command: argparse.ArgumentParser, out: str) -> None:
    """The arguments of a command that has a trained system work on a data directory."""
    command.add_argument("system", type=Path, help="a trained system, such as exp/digits/adamw/system")
    command.add_argument("data", type=Path, help="a Kaldi data directory")
    command.add_argument("--out", type=Path, required=True, help=out)
    command.add_argument("--allow-commands", action="store_true", help="run the shell commands of wav.scp")
    command.add_argument("--root", type=Path, help="folder that relative paths in the data start from (default: found)")
    command.add_argument(
        "--drop-mismatched", action="store_true", help="leave out utterances that are not in every table"
    )
    command.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")


def _recipes() -> str:
    """The recipes with their arguments, for a person."""
    lines = ["recipes:"]
    for recipe in RECIPES:
        arguments = " ".join(
            f"{p.name}=..." if p.default is p.empty else f"[{p.name}={p.default}]"
            for p in inspect.signature(recipe).parameters.values()
        )
        lines.append(f"  {recipe.__name__} {arguments}")
        lines.append(f"      {(inspect.getdoc(recipe) or '').splitlines()[0]}")
    lines.append(
        "\nalignments=FILE takes times of phones or of words (FILE.ctm), or a Kaldi archive of one pdf a frame,"
    )
    lines.append("numbered as quadric does: state s of phone p is 3 p + s; phone 0 is SIL, then the lexicon's, by name")
    lines.append(f"\nnetwork=NAME takes {', '.join(PAPER_NETWORKS)}; network.OPTION=VALUE after it changes parts of it")
    lines.append("\nall options of a recipe with their values: quadric train RECIPE ... --options")
    return "\n".join(lines)


def make_job(name: str, assignments: Sequence[str]) -> Job | TaskJob:
    """The recipe's job: assignments to its arguments are passed, the others override the job's options."""
    recipe: Callable[..., Job | TaskJob] = next(recipe for recipe in RECIPES if recipe.__name__ == name)
    signature = inspect.signature(recipe, eval_str=True)
    parameters = signature.parameters
    arguments: dict[str, Any] = {}
    overrides = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key in parameters and equals:
            arguments[key] = convert(parameters[key].annotation, text, key)
        else:
            overrides.append(assignment)
    known = [*parameters, *(field.name for field in dataclasses.fields(signature.return_annotation))]
    _check_names(name, overrides, known)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(f"recipe {name} needs {' '.join(f'{key}=...' for key in missing)}")
    return override(recipe(**arguments), overrides)


def make_speech_job(name: str, assignments: Sequence[str]) -> Job:
    """The same of a recipe that goes from recordings to word error rate."""
    job = make_job(name, assignments)
    if not isinstance(job, Job):
        raise ValueError(f"recipe {name} is not of speech: choose one that has recordings")
    return job


def _check_names(recipe: str, overrides: Sequence[str], known: Sequence[str]) -> None:
    """Raises ``ValueError`` for an override that is meant for no option, with those that may be meant."""
    for override_ in overrides:
        path, equals, _ = override_.partition("=")
        name = path.split(".")[0]
        if not equals:
            raise ValueError(f"{override_!r} has no '=': write option=value, such as first_order.lr=3e-4")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "--options lists what there is"
            raise ValueError(f"{path}: recipe {recipe} has no argument or option {name!r}; {hint}")


def _train(chosen: argparse.Namespace) -> None:
    with Collective.from_environment(backend="gloo") as communicator:  # the networks of a job are trained on the CPU
        chosen.rank = communicator.rank
        if chosen.rank:
            logging.getLogger("quadric").addHandler(logging.NullHandler())
        else:
            _warn_of_restarts()
        _train_on(communicator, chosen)


def _warn_of_restarts() -> None:
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        remedy = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or most of them fail"
        print(f"quadric: torchrun may restart this {restarts} times: {remedy}", file=sys.stderr)


def _asynchronously(chosen: argparse.Namespace) -> list[str]:
    """The options that ``--async`` and ``--workers`` stand for."""
    if not chosen.asynchronous:
        if chosen.workers is not None:
            raise ValueError(f"--workers {chosen.workers}: is of asynchronous training; give --async as well")
        return []
    others = (f"{name}=none" for name in TRAININGS if name != "averaged")
    workers = 2 if chosen.workers is None else chosen.workers
    return [*others, "averaged.epochs=1", f"asynchronous.workers={workers}"]


def _train_on(communicator: Communicator, chosen: argparse.Namespace) -> None:
    """Only the first rank prints, logs and shows bars."""
    assignments = [*_asynchronously(chosen), *chosen.overrides]
    job = communicator.first_then_all("reading the options", partial(make_job, chosen.recipe, assignments))
    if chosen.rank:
        if not chosen.options:
            _run(job, chosen.work / job.name, progress=silent, communicator=communicator)
        return
    if chosen.options:
        for path, value in options(job):
            print(f"{path}={_written(value)}")
        for path, value in absent_options(job):
            print(f"# {path}={_written(value)}")
        return
    work = chosen.work / job.name
    with logged(work / "log"):
        outcome = _run(job, work, progress=bar, communicator=communicator)
    for line in outcome.lines:
        print(line)
    print(f"report: {outcome.report}")


def _run(job: Job | TaskJob, work: Path, *, progress: Progress, communicator: Communicator) -> Result:
    """What a job ends with."""
    if isinstance(job, TaskJob):
        return comparison.compare(job, work, progress=progress, communicator=communicator)
    return run(job, work, progress=progress, communicator=communicator)


def _written(value: Any) -> str:
    """``value`` as an override takes it."""
    value = plain(value)
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _sentence(error: Exception, here: Mapping[str, str]) -> str:
    """What went wrong, and what to do about it on the command line."""
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        message = f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    for argument, option in here.items():
        start = r"\b" if argument[0].isalpha() else ""  # "out=" is no part of "dropout="
        message = re.sub(start + re.escape(argument), option, message)
    return message


def _corpus(chosen: argparse.Namespace) -> Corpus:
    """The data directory of a command."""
    check_output(chosen.out)
    return read_data_dir(
        chosen.data,
        root=chosen.root,
        allow_commands=chosen.allow_commands,
        allow_missing_text=True,
        on_mismatch="drop" if chosen.drop_mismatched else "error",
    )


def _align(chosen: argparse.Namespace) -> None:
    corpus = _corpus(chosen)
    with logged(chosen.out / "log"):
        lines = align_directory(chosen.system, corpus, chosen.out, jobs=chosen.jobs, progress=bar)
    for line in lines:
        print(line)


def _lattice(chosen: argparse.Namespace) -> None:
    options = LatticeOptions(chosen.beam, chosen.lattice_beam, chosen.max_active)
    corpus = _corpus(chosen)
    with logged(chosen.out / "log"):
        lines = lattice_directory(
            chosen.system,
            corpus,
            chosen.out,
            options=options,
            arpa=chosen.arpa,
            lm_weight=chosen.lm_weight,
            archive=chosen.archive,
            backend=chosen.backend,
            jobs=chosen.jobs,
            progress=bar,
        )
    for line in lines:
        print(line)


def _decode(chosen: argparse.Namespace) -> None:
    corpus = _corpus(chosen)
    with logged(chosen.out / "log"):
        lines = decode_directory(
            chosen.system,
            corpus,
            chosen.out,
            lm_weight=chosen.lm_weight,
            word_penalty=chosen.word_penalty,
            on_bad_audio="drop" if chosen.drop_bad_audio else "error",
            jobs=chosen.jobs,
            progress=bar,
        )
    for line in lines:
        print(line)


def _score(chosen: argparse.Namespace) -> None:
    speakers = None
    if chosen.utt2spk is not None:
        speakers = {utterance: " ".join(speaker) for utterance, speaker in read_text(chosen.utt2spk).items()}
    result = score(
        read_text(chosen.reference),
        read_text(chosen.hypothesis),
        speakers=speakers,
        on_missing="count" if chosen.count_missing else "error",
    )
    for line in result.lines:
        print(line)
    for speaker, errors in result.per_speaker.items() if speakers else ():
        print(f"{speaker} {errors.line}")


def _report(chosen: argparse.Namespace) -> None:
    again = comparison.report if (chosen.work / comparison.JOB).is_file() else report
    print(f"report: {again(chosen.work)}")
