from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("kaldi_decoder", reason="needs the speech extra")

from quadric.lattice.generate import Generator, LatticeOptions
from quadric.lattice.labelled import LabelledAutomaton
from quadric.lattice.lattice import StatePath
from quadric.lattice.paths import contains, path_weight
from quadric.lattice.words import best_words, oracle_errors
from quadric.speech.decoding import DecodeOptions, Decoder
from quadric.speech.epsilons import epsilons_before, numbered
from quadric.speech.graph import AlignmentGraphs, write_graph
from quadric.speech.lattices import Lattices, make_lattices
from reference.searches import same
from reference.toy_language import LEXICON, TYINGS, toy_graphs
from reference.wheel import as_transducer, sums, wheel_decoder, wheel_lattice

pytestmark = pytest.mark.speech

TEXT = [("A", "B"), ("AB",), ("BE", "A"), ("A", "B", "A"), ("ABBA",), ("A",), ("A", "B"), ("ABBAH", "BE")]
OPTIONS = LatticeOptions(12.0, 6.0, 300)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> LabelledAutomaton:
    return toy_graphs(tmp_path_factory.mktemp("toy"), "tri", 2, TEXT)[1]


def random_scores(count: int, seed: int = 0, longest: int = 60) -> dict[str, np.ndarray]:
    rng, pdfs = np.random.default_rng(seed), TYINGS["tri"].num_pdfs
    return {f"u{i:03}": rng.normal(scale=1.5, size=(int(frames), pdfs)).astype(np.float32)
            for i, frames in enumerate(rng.integers(20, longest, size=count))}  # fmt: skip


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("context", ["mono", "tri"])
def test_lattices_are_those_of_another_decoder(tmp_path: Path, context: str, order: int) -> None:
    """Best path, sum and size. With back-off, epsilon paths side by side count together here, and apart there."""
    fst, graph = toy_graphs(tmp_path, context, order, TEXT)
    rng, beam, lattice_beam = np.random.default_rng(order), 16.0, 6.0
    wheel = wheel_decoder(fst, beam, lattice_beam)
    generator = Generator(graph, LatticeOptions(beam, lattice_beam, 10**6))
    arcs = np.zeros(2)
    for frames in (3, 5, 12, 40, 90):
        scores = rng.normal(scale=1.5, size=(frames, TYINGS[context].num_pdfs)).astype(np.float32)
        there, lattice = wheel_lattice(wheel, scores), generator(scores)
        assert there is not None
        best, total = sums(there)
        own_best, own_total = sums(as_transducer(lattice, scores))
        if order == 1:
            assert own_best == pytest.approx(best, abs=1e-3)
            assert own_total == pytest.approx(total, abs=0.1)
        else:
            assert best - 1e-3 <= own_best <= best + 1.0
            assert own_total == pytest.approx(total, abs=0.3)
        arcs += lattice.num_arcs, len(numbered(epsilons_before(there)).arcs)
    assert arcs[0] == pytest.approx(arcs[1], rel=0.05 if order == 1 else 0.15)


def test_the_best_words_are_those_that_are_recognised(tmp_path: Path) -> None:
    """By the decoder for one-best words, on a unigram: no two epsilon paths are side by side."""
    fst, graph = toy_graphs(tmp_path, "tri", 1, TEXT)
    write_graph(fst, tmp_path / "graph.fst")
    scores = random_scores(12)
    generator = Generator(graph, LatticeOptions(20.0, 3.0))
    with Decoder(tmp_path / "graph.fst", LEXICON.words, TYINGS["tri"].num_pdfs, options=DecodeOptions(20.0)) as decoder:
        recognised = decoder.decode(scores, 1.0)
    for id, found in recognised.items():
        labels = best_words(generator(scores[id]), scores[id])
        assert tuple(LEXICON.words[label - 1] for label in labels) == found.words
        assert oracle_errors(generator(scores[id]), labels) == 0


def test_the_spoken_path_has_a_weight_and_is_found(graph: LabelledAutomaton) -> None:
    """Frames that spell a way to say words: it has a path in the graph, and one in the lattice."""
    tying, rng = TYINGS["tri"], np.random.default_rng(0)
    for words in (("A", "B"), ("ABBAH",), ("BE", "A", "B")):
        automaton = AlignmentGraphs(LEXICON, tying).automaton(words)
        state, path = automaton.start, list[int]()
        while not (automaton.final[state] > -np.inf and rng.random() < 0.5):
            path.append(int(rng.integers(automaton.offsets[state], automaton.offsets[state + 1])))
            state = automaton.target[path[-1]]
        pdfs = automaton.pdf[path]
        assert path_weight(graph, pdfs) > -np.inf
        assert path_weight(graph, pdfs[:2]) == -np.inf
        scores = np.full((len(pdfs), tying.num_pdfs), -9.0, np.float32)
        scores[np.arange(len(pdfs)), pdfs] = 0.0
        lattice = Generator(graph, LatticeOptions(30.0, 12.0))(scores)
        phone, state = tying.phone_of_pdf[pdfs], tying.state_of_pdf[pdfs]
        begins = np.concatenate([[True], (np.diff(phone) != 0) | (np.diff(state) < 0)])
        assert contains(lattice, StatePath(pdfs, phone, begins))
        assert oracle_errors(lattice, [LEXICON.words.index(word) + 1 for word in words]) == 0


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_store_holds_what_is_generated(tmp_path: Path, graph: LabelledAutomaton, jobs: int) -> None:
    scores, seen = random_scores(23), list[tuple[int | None, str]]()

    def progress(items: Iterator, *, total: int | None, what: str) -> Iterator:
        for item in items:
            seen.append((total, what))
            yield item

    made = make_lattices(scores, graph, OPTIONS, tmp_path / "s", jobs=jobs, shard_size=5, progress=progress)
    assert seen == [(23, "lattices")] * 23
    generator = Generator(graph, OPTIONS)
    for lattices in (made, Lattices(tmp_path / "s")):
        assert list(lattices) == list(scores) and len(lattices) == 23 and "u003" in lattices and "x" not in lattices
        assert all(same(lattice, generator(scores[id])) for id, lattice in lattices.items())
        assert lattices.frames == sum(map(len, scores.values()))
        assert lattices.arcs == sum(lattice.num_arcs for lattice in lattices.values())
        assert lattices.skipped == {}
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "key.json",
        *(f"lattices-{number:06}.zip" for number in range(5)),
    ]
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.zip"))
    assert size < 6 * made.arcs


def test_bytes_do_not_depend_on_threads(tmp_path: Path, graph: LabelledAutomaton) -> None:
    for jobs in (1, 4):
        make_lattices(random_scores(12), graph, OPTIONS, tmp_path / str(jobs), jobs=jobs, shard_size=5)
    names = sorted(path.name for path in (tmp_path / "1").glob("*.zip"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_an_interrupt_loses_no_lattice(tmp_path: Path, graph: LabelledAutomaton) -> None:
    scores = random_scores(12)

    def interrupted(items: Iterator, *, total: int | None, what: str) -> Iterator:
        for number, item in enumerate(items):
            if number == 8:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        make_lattices(scores, graph, OPTIONS, tmp_path / "s", shard_size=5, progress=interrupted)
    assert list(Lattices(tmp_path / "s")) == list(scores)[:8]
    made = list[int | None]()

    def told(items: Iterator, *, total: int | None, what: str) -> Iterator:
        made.append(total)
        return items

    assert list(make_lattices(scores, graph, OPTIONS, tmp_path / "s", shard_size=5, progress=told)) == list(scores)
    assert made == [4]


def test_bad_utterances_are_skipped_with_reasons(
    tmp_path: Path, graph: LabelledAutomaton, caplog: pytest.LogCaptureFixture
) -> None:
    scores = random_scores(9)
    scores["u001"] = scores["u001"].copy()
    scores["u001"][3, 2] = np.nan
    scores["u004"] = scores["u004"][:0]
    scores["u005"] = scores["u005"][:2]
    with caplog.at_level(logging.WARNING, logger="quadric.speech.lattices"):
        lattices = make_lattices(scores, graph, OPTIONS, tmp_path / "s", jobs=2, shard_size=2)
    assert list(lattices) == ["u000", "u002", "u003", "u006", "u007", "u008"]
    assert list(lattices.skipped) == ["u001", "u004", "u005"]
    assert lattices.skipped["u001"] == "scores that are not finite"
    assert lattices.skipped["u004"] == "no frames"
    assert "through 2 frames" in lattices.skipped["u005"]
    assert "of 9 utterances without a lattice: 3 (u001: scores that are not finite" in caplog.text
    assert Lattices(tmp_path / "s").skipped == lattices.skipped
    with pytest.raises(KeyError):
        lattices["u004"]
    with pytest.raises(ValueError, match=r"scores of u008 have shape \(\d+, 3\)"):
        make_lattices({"u008": scores["u008"][:, :3]}, graph, OPTIONS, tmp_path / "other")


class Reading(dict[str, np.ndarray]):
    """Scores that remember which were read."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.read: list[str] = []

    def __getitem__(self, id: str) -> np.ndarray:
        self.read.append(id)
        return super().__getitem__(id)


def test_only_what_is_missing_is_made(tmp_path: Path, graph: LabelledAutomaton) -> None:
    scores = random_scores(9)
    scores["u002"] = scores["u002"][:1]
    make_lattices({id: scores[id] for id in ("u002", "u005")}, graph, OPTIONS, tmp_path / "s")
    reading = Reading(scores)
    lattices = make_lattices(reading, graph, OPTIONS, tmp_path / "s", shard_size=3)
    assert reading.read == [id for id in scores if id not in ("u002", "u005")]
    assert [*lattices] == [id for id in scores if id != "u002"]
    assert list(lattices.skipped) == ["u002"]
    few = make_lattices(Reading({"u007": scores["u007"]}), graph, OPTIONS, tmp_path / "s")
    assert list(few) == ["u007"] and few.skipped == {}


def test_what_has_changed_is_made_again(tmp_path: Path, graph: LabelledAutomaton) -> None:
    """The last made counts, whether it is a lattice or a reason why there is none; also after damage."""
    scores, store, generator = random_scores(6), tmp_path / "s", Generator(graph, OPTIONS)
    digests = {id: "first" for id in scores}
    make_lattices(scores, graph, OPTIONS, store, digests=digests, shard_size=4)

    def again(wanted: list[str], **changed: tuple[str, np.ndarray]) -> Lattices:
        digests.update({id: digest for id, (digest, _) in changed.items()})
        scores.update({id: row for id, (_, row) in changed.items()})
        reading = Reading(scores)
        made = make_lattices(reading, graph, OPTIONS, store, digests=digests, shard_size=4)
        assert reading.read == wanted and [*made] == [id for id in scores if len(scores[id]) > 1]
        assert all(same(made[id], generator(scores[id])) for id in made)
        assert [*made.skipped] == [id for id in scores if len(scores[id]) == 1]
        assert sorted(Lattices(store)) == sorted(made) and Lattices(store).skipped == made.skipped
        return made

    first, other = scores["u001"], random_scores(2, seed=9)
    again([])
    again(["u001", "u004"], u001=("second", other["u000"]), u004=("short", other["u001"][:1]))
    again([])
    again(["u001", "u004", "new"], u001=("first", first), u004=("whole", other["u001"]), new=("first", other["u000"]))
    (store / "lattices-000003.zip").write_bytes(b"damaged")  # before it, the store has other lattices of the same
    again(["u001", "u004", "new"])
    digests.pop("u000")
    again(["u000"])


def test_threads_are_fed_as_they_work(tmp_path: Path, graph: LabelledAutomaton) -> None:
    """Not all scores at once: no more than some for each thread wait."""
    reading, most = Reading(random_scores(80)), 0

    def progress(items: Iterator, *, total: int | None, what: str) -> Iterator:
        nonlocal most
        for number, item in enumerate(items):
            most = max(most, len(reading.read) - number)
            yield item

    threads = threading.active_count()
    make_lattices(reading, graph, OPTIONS, tmp_path / "s", jobs=2, progress=progress)
    assert most < 20
    assert threading.active_count() == threads


def test_another_key_is_refused(tmp_path: Path, graph: LabelledAutomaton) -> None:
    scores, store = random_scores(2), tmp_path / "s"
    make_lattices(scores, graph, OPTIONS, store, made_from={"model": "a", "scale": 0.1})
    again = make_lattices(scores, graph, OPTIONS, store, made_from={"scale": 0.1, "model": "a"})
    assert len(again) == 2
    longer = replace(graph, automaton=replace(graph.automaton, weight=graph.automaton.weight - 0.5))
    for changed, said in (
        ({"options": replace(OPTIONS, beam=15.0)}, r"made with beam=12\.0, now 15\.0: name another folder"),
        ({"made_from": {"model": "b", "scale": 0.1}}, "made_from="),
        ({"graph": longer}, "graph="),
    ):
        arguments = {"graph": graph, "options": OPTIONS, "made_from": {"model": "a", "scale": 0.1}} | changed
        with pytest.raises(ValueError, match=said):
            make_lattices(scores, store=store, **arguments)
    (store / "key.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        make_lattices(scores, graph, OPTIONS, store)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="something else than lattices"):
        make_lattices(scores, graph, OPTIONS, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="there are no lattices"):
        Lattices(tmp_path / "other")
    with pytest.raises(ValueError, match="jobs=0"):
        make_lattices(scores, graph, OPTIONS, store, jobs=0)


@pytest.mark.parametrize("where", ["first", "middle", "end", "cut", "gone"])
def test_damage_is_told_and_mended(tmp_path: Path, graph: LabelledAutomaton, where: str) -> None:
    scores, store = random_scores(9), tmp_path / "s"
    lattices = make_lattices(scores, graph, OPTIONS, store, shard_size=3)
    path = store / "lattices-000001.zip"
    content = bytearray(path.read_bytes())
    at = {"first": 40, "middle": len(content) // 2, "end": len(content) - 15}.get(where, 0)
    content[at : at + 8] = bytes(255 - value for value in content[at : at + 8])
    if where == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if where == "cut" else content)
    with pytest.raises(ValueError, match=r"lattices-000001\.zip is (damaged \(.*\)|gone): make the lattices again"):
        for id in ("u003", "u004", "u005"):
            lattices[id]
    assert same(lattices["u000"], Generator(graph, OPTIONS)(scores["u000"]))
    reading = Reading(scores)
    mended = make_lattices(reading, graph, OPTIONS, store, shard_size=3)
    assert reading.read == ["u003", "u004", "u005"]
    generator = Generator(graph, OPTIONS)
    assert [*mended] == [*scores]
    assert all(same(mended[id], generator(scores[id])) for id in scores)


@pytest.mark.parametrize("target", ["lattices-000001.zip", "/proc/self/mem"], ids=["not opened", "not read"])
def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path: Path, graph: LabelledAutomaton, target: str) -> None:
    """A network drive that is away for a moment must not cost lattices."""
    if target.startswith("/") and not Path(target).exists():
        pytest.skip("has no file that opens and cannot be read")
    scores, store = random_scores(9), tmp_path / "s"
    make_lattices(scores, graph, OPTIONS, store, shard_size=3)
    path = store / "lattices-000001.zip"
    aside = path.rename(tmp_path / "aside")
    path.symlink_to(target)
    reading = Reading(scores)
    with pytest.raises(OSError, match=r"Too many levels|Input/output error"):
        make_lattices(reading, graph, OPTIONS, store, shard_size=3)
    assert path.is_symlink()
    aside.replace(path)
    assert len(make_lattices(reading, graph, OPTIONS, store, shard_size=3)) == 9 and not reading.read


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from quadric.lattice.generate import LatticeOptions
from quadric.lattice.labelled import LabelledAutomaton
from quadric.speech.lattices import make_lattices

class Slow(dict):
    def __getitem__(self, id):
        time.sleep(0.02)
        return super().__getitem__(id)

scores = Slow(np.load("scores.npz"))
graph, options = LabelledAutomaton.load(Path("graph.npz")), LatticeOptions(12.0, 6.0, 300)
make_lattices(scores, graph, options, Path("s"), jobs=2, shard_size=10)
"""


def test_a_killed_run_is_gone_on_with(tmp_path: Path, graph: LabelledAutomaton) -> None:
    scores, store = random_scores(100), tmp_path / "s"
    graph.save(tmp_path / "graph.npz")
    np.savez(tmp_path / "scores.npz", **scores)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment) as process:
        while len(list(store.glob("*.zip"))) < 3:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    there = {id for path in store.glob("*.zip") for id in Lattices(store)}
    assert 30 <= len(there) < 100
    assert json.loads((store / "key.json").read_text())["beam"] == 12.0
    reading = Reading(scores)
    lattices = make_lattices(reading, graph, OPTIONS, store, shard_size=10)
    assert reading.read == [id for id in scores if id not in there]
    whole = make_lattices(scores, graph, OPTIONS, tmp_path / "whole")
    assert [*lattices] == [*whole] == [*scores]
    assert all(same(lattices[id], whole[id]) for id in whole)
    assert not list(store.glob(".*"))
