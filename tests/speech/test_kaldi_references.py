from __future__ import annotations

import gzip
import logging
import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import kaldiio
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.paths import contains, weight_in
from quadric.loss.sequence import MMI
from quadric.speech.alignment import load_alignments, save_alignments
from quadric.speech.kaldi_archive import read_archive, write_archive
from quadric.speech.kaldi_frames import to_lattice
from quadric.speech.kaldi_lattice import KaldiLattice
from quadric.speech.kaldi_references import read_references, reference_path, with_references
from quadric.speech.kaldi_vectors import read_alignments
from quadric.speech.topology import monophone
from quadric.speech.transitions import TransitionModel
from reference.kaldi_paths import allowed, expected, kaldi_paths, random_kaldi_lattice, short_model, split_to_phones
from reference.sequence import risk, worths

GOLDEN = Path(__file__).parents[1] / "golden" / "kaldi"
README = Path(__file__).parents[2] / "README.md"
OWN, SHORT = TransitionModel.of(monophone(("AH",))), short_model()
MODELS = {"own": OWN, "short": SHORT}
VECTORS = {"a": np.array([2, 4, 4, 70000], np.int32), "b-2": np.array([7], np.int32), "c": np.array([], np.int32)}


def linear(ids: list[int]) -> KaldiLattice:
    """A lattice of one path."""
    steps, zeros = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids))
    return KaldiLattice(
        steps, steps + np.int32(1), np.array(ids, np.int32), zeros.astype(np.int32), zeros, zeros,
        np.array([len(ids)], np.int32), np.zeros(1), np.zeros(1), len(ids) + 1,
    )  # fmt: skip


def row(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def says(path: StatePath) -> tuple[list[int], list[int], list[bool]]:
    return path.pdf.tolist(), path.phone.tolist(), path.begins.tolist()


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray] = VECTORS) -> None:
    assert list(found) == list(wanted)
    for id, values in found.items():
        assert values.dtype == np.int32
        assert values.tolist() == wanted[id].tolist()


# ----------------------------------------------------------------------------------------------------------- archives


def binary(vectors: dict[str, np.ndarray]) -> bytes:
    """As Kaldi's ``BasicVectorHolder<int32>`` lays them out."""
    parts = []
    for id, values in vectors.items():
        parts.append(id.encode() + b" \0B" + struct.pack("<bi", 4, len(values)))
        parts += [struct.pack("<bi", 4, value) for value in values.tolist()]
    return b"".join(parts)


def text(vectors: dict[str, np.ndarray]) -> bytes:
    """As Kaldi writes it, with a blank behind every number."""
    return "".join(f"{id} {''.join(f'{v} ' for v in values.tolist())}\n" for id, values in vectors.items()).encode()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", [binary, text])
def test_every_form_of_an_archive_is_read(form: Any, packed: bool, tmp_path: Path) -> None:
    raw = form(VECTORS)
    (tmp_path / "ali.1").write_bytes(gzip.compress(raw) if packed else raw)
    same(dict(read_alignments(tmp_path / "ali.1")))
    same(load_alignments(tmp_path / "ali.1"))
    places = [f"{id} ali.1:{raw.index(f'{id} '.encode()) + len(id) + 1}\n" for id in ("b-2", "a")]
    (tmp_path / "ali.scp").write_text("".join(places))
    same(dict(read_alignments(tmp_path / "ali.scp")), {id: VECTORS[id] for id in ("b-2", "a")})
    (tmp_path / "away").mkdir()
    (tmp_path / "ali.scp").rename(tmp_path / "away" / "ali.scp")
    same(dict(read_alignments(tmp_path / "away" / "ali.scp", root=tmp_path)), {id: VECTORS[id] for id in ("b-2", "a")})


def test_other_writers_and_long_vectors(tmp_path: Path) -> None:
    given = {"a": np.arange(200_000, dtype=np.int32), "b": np.array([1, 2], np.int32)}
    kaldiio.save_ark(str(tmp_path / "ali.ark"), given)
    assert (tmp_path / "ali.ark").read_bytes() == binary(given)
    same(dict(read_alignments(tmp_path / "ali.ark")), given)
    save_alignments(tmp_path / "own.ark", given)
    same(load_alignments(tmp_path / "own.ark"), given)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (binary(VECTORS)[:-3], r"alignment of c, from byte \d+: the file ends within it"),
        (binary(VECTORS)[:20], "alignment of a, from byte 1: the file ends within it, at byte 20"),
        (b"a \0", "alignment of a, from byte 1: the file ends within it"),
        (b"a ", "alignment of a, from byte 1: the file ends within it"),
        (b"a 1 2 3", "alignment of a, from byte 1: the file ends within it"),
        (b"a 1 2.5 3\n", "alignment of a, .*no integer vector"),
        (b"a 1 3000000000\n", "alignment of a, .*no integer vector"),
        (b"a \0BFM \4\1\0\0\0\4\1\0\0\0", "alignment of a, .*no integer vector: numbers of 4 bytes"),
        (b"a \0B\4\2\0\0\0\4\1\0\0\0\2\1\0\0\0", "alignment of a, .*no integer vector: numbers of 4 bytes"),
        (b"a \0B\4\xff\xff\xff\xff", "alignment of a, .*it has -1 numbers"),
        (b"a \0C\4\0\0\0\0", "alignment of a, .*neither Kaldi's mark"),
    ],
)
def test_what_is_no_archive_of_alignments_is_refused(raw: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "ali").write_bytes(raw)
    with pytest.raises(ValueError, match=said):
        list(read_alignments(tmp_path / "ali"))


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no archive of alignments .*ali\.1\.gz"):
        list(read_alignments(tmp_path / "ali.1.gz"))
    (tmp_path / "ali.scp").write_text("a gunzip -c ali.1.gz |\n")
    with pytest.raises(ValueError, match="copy-int-vector"):
        list(read_alignments(tmp_path / "ali.scp"))


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_alignment_becomes_the_path_that_its_topology_says(name: str, reorder: bool, seed: int) -> None:
    model, rng = MODELS[name], np.random.default_rng(seed)
    frames = int(rng.integers(3, 7) if model is OWN else rng.integers(1, 5))
    lattice = random_kaldi_lattice(model, rng, frames=frames, reorder=reorder, words=0.0)
    assume(lattice is not None)
    assert lattice is not None
    for ids, *_ in list(kaldi_paths(lattice))[:5]:
        tried = np.array(ids)
        for _ in range(6):
            if not allowed(tuple(tried.tolist()), model, reorder):
                with pytest.raises(ValueError, match=r"reorder=|does not end"):
                    reference_path(tried, model, reorder=reorder)
            else:
                path = reference_path(tried, model, reorder=reorder, weight=-2.5)
                assert path.pdf.tolist() == model.pdf[tried].tolist()
                assert path.phone.tolist() == (model.phone[tried] - 1).tolist()
                assert path.begins.tolist() == split_to_phones(tuple(tried.tolist()), model, reorder)
                assert path.weight == -2.5
                assert weight_in(to_lattice(linear(tried.tolist()), model, reorder=reorder), path) == 0.0
            tried = tried.copy()
            tried[rng.integers(frames)] = rng.integers(1, model.num_ids + 1)


def test_where_phones_begin_in_either_order() -> None:
    behind, front = row(2, 4, 6, 5, 8, 10, 12, 11), row(2, 4, 5, 6, 8, 10, 11, 12)
    for ids, reorder in ((behind, True), (front, False)):
        path = reference_path(ids, OWN, reorder=reorder)
        assert says(path) == ([0, 1, 2, 2, 3, 4, 5, 5], [0] * 4 + [1] * 4, [t in (0, 4) for t in range(8)])
        with pytest.raises(ValueError, match=f"pass reorder={reorder}"):
            reference_path(ids, OWN, reorder=not reorder)
    # A phone of one state: the same ids are phones in either order, which begin elsewhere.
    assert reference_path(row(2, 1, 2), SHORT).begins.tolist() == [True, False, True]
    assert reference_path(row(2, 1, 2), SHORT, reorder=False).begins.tolist() == [True, True, False]


def test_a_chain_models_loops_have_pdfs_of_their_own() -> None:
    ids = [i for i in range(1, SHORT.num_ids + 1) if SHORT.phone[i] == 4]
    loop, onward = sorted(ids, key=lambda i: not SHORT.self_loop[i])
    assert says(reference_path(row(onward, loop, onward), SHORT)) == ([4, 5, 4], [3, 3, 3], [True, False, True])


@pytest.mark.parametrize(("name", "reorder"), [("behind", True), ("front", False)])
def test_paths_of_a_decoders_lattice_have_the_weight_that_it_gives_them(name: str, reorder: bool) -> None:
    model = TransitionModel.load(GOLDEN / "mono.mdl")
    ((_, given),) = read_archive(GOLDEN / f"{name}.lat")
    lattice = to_lattice(given, model, reorder=reorder)
    weights: dict[tuple, float] = {}
    for (pdf, phone, begins, _), weight in expected(given, model, reorder).items():
        key = (pdf, phone, begins)
        weights[key] = float(np.logaddexp(weights.get(key, -math.inf), weight))
    tried = {ids for ids, *_ in kaldi_paths(given)}
    assert len(tried) > 20
    for ids in tried:
        path = reference_path(np.array(ids), model, reorder=reorder)
        key = tuple(map(tuple, says(path)))
        assert weight_in(lattice, path) == pytest.approx(weights[key], abs=2e-5)  # type: ignore[index]
        ((_, _, found),) = with_references([("u", lattice)], {"u": path})
        assert found.weight == weight_in(lattice, path)


@pytest.mark.parametrize(
    ("ids", "reorder", "said"),
    [
        (row(2, 4, 13), True, "holds 13 in frame 2; the transition model has 1 to 12"),
        (row(2, 0, 4), True, "holds 0 in frame 1"),
        (row(-1), True, "holds -1 in frame 0"),
        (row(), True, r"shape \(0,\)"),
        (np.zeros((2, 2), np.int32), True, r"shape \(2, 2\)"),
        (np.ones(2), True, "not float64"),
        (row(1, 2, 4, 6), True, "transition-id 1 in frame 0 is a self loop .*pass reorder=False"),
        (row(2, 4, 6, 5), False, "transition-id 5 in frame 3 begins a phone, but not in its first state"),
        (row(2, 1, 4, 6), False, "transition-id 1 in frame 1 is a self loop .*pass reorder=True"),
        (row(2, 6), True, "transition-id 6 in frame 1 does not follow"),
        (row(2, 4, 12), True, "transition-id 12 in frame 2 does not follow"),
        (row(4, 6), True, "transition-id 4 in frame 0 begins a phone, but not"),
        (row(2, 4, 6, 4, 6), True, "transition-id 4 in frame 3 begins a phone, but not"),
        (row(2, 4), True, "phone 1 of the last frame does not end"),
        (row(2, 4, 5), False, "phone 1 of the last frame does not end"),
    ],
)
def test_what_is_no_alignment_of_the_model_is_refused(ids: np.ndarray, reorder: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reference_path(ids, OWN, reorder=reorder)


def test_archive_and_utterance_of_a_bad_alignment_are_named(tmp_path: Path) -> None:
    (tmp_path / "ali.1").write_text("good 2 4 6 \nbad 2 4 60 \n")
    references = read_references(tmp_path / "ali.1", OWN)
    assert next(references)[0] == "good"
    with pytest.raises(ValueError, match=r"ali\.1: the alignment of bad: .*holds 60 in frame 2"):
        next(references)
    (tmp_path / "ali.1").write_text("a 2 4 5 6 \n")
    assert dict(read_references(tmp_path / "ali.1", OWN, reorder=False))["a"].pdf.tolist() == [0, 1, 2, 2]


# -------------------------------------------------------------------------------------------- lattices and references

HELD, MOVED, OTHER = row(2, 4, 6, 5), row(2, 1, 4, 6), row(8, 10, 12, 11)


def lattice_of(ids: np.ndarray, weight: float) -> Lattice:
    made = to_lattice(linear(ids.tolist()), OWN)
    return replace(made, weight=np.full(len(ids), weight / len(ids), np.float32))


def paired(missing: Any = "add", **options: Any) -> dict[str, tuple[Lattice, StatePath]]:
    lattices = [(id, lattice_of(HELD, -2.0)) for id in ("held", "moved", "other")]
    references = {
        id: reference_path(ids, OWN, weight=-9.0) for id, ids in (("held", HELD), ("moved", MOVED), ("other", OTHER))
    }
    found = with_references(lattices, references, missing=missing, **options)
    return {id: (lattice, reference) for id, lattice, reference in found}


def test_references_get_the_weight_of_their_lattice_or_of_their_phones_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = paired()
    assert {id: (reference.weight, len(lattice.pdf)) for id, (lattice, reference) in found.items()} == {
        "held": (-2.0, 4),
        "moved": (-2.0, 8),
    }
    assert all(contains(*pair) for pair in found.values())
    assert weight_in(*found["moved"]) == -2.0
    assert "1 of 3 references were not in their lattices, and were added" in caplog.text
    assert "left out utterances whose lattices do not hold their references: 1 (other)" in caplog.text


def test_other_ways_with_missing_references() -> None:
    assert {id: (reference.weight, len(lattice.pdf)) for id, (lattice, reference) in paired("skip").items()} == {
        "held": (-2.0, 4)
    }
    kept = paired("keep")
    assert {id: (reference.weight, len(lattice.pdf)) for id, (lattice, reference) in kept.items()} == {
        "held": (-2.0, 4),
        "moved": (-9.0, 4),
        "other": (-9.0, 4),
    }


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_mmi_of_what_is_added_is_never_below_zero(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = [random_kaldi_lattice(OWN, rng, frames=5, reorder=True, words=0.0) for _ in range(2)]
    if made[0] is None or made[1] is None:
        return
    lattice, (ids, *_) = to_lattice(made[0], OWN), next(kaldi_paths(made[1]))
    reference = reference_path(np.array(ids), OWN)
    phones = reference.phone[reference.begins].tolist()
    weights: dict[bool, list[float]] = {True: [], False: []}
    for (pdf, phone, begins, _), weight in expected(made[0], OWN, True).items():
        if [p for p, first in zip(phone, begins, strict=True) if first] == phones:
            weights[(list(pdf), list(phone), list(begins)) == says(reference)].append(weight)
    if not weights[True] + weights[False]:
        with pytest.raises(ValueError, match="none of 1 references"):
            list(with_references([("u", lattice)], {"u": reference}))
        return
    ((_, whole, found),) = with_references([("u", lattice)], {"u": reference})
    wanted = np.logaddexp.reduce(weights[True]) if weights[True] else max(weights[False])
    assert found.weight == pytest.approx(wanted, abs=2e-5)
    assert (whole is lattice) == bool(weights[True])
    loss = MMI(torch.full((6,), -math.log(6.0), dtype=torch.float64), scale=0.5)
    output = torch.from_numpy(rng.normal(size=(1, 5, 6)))
    assert float(loss(output, [loss.target(whole, found)])) > -1e-5


def test_what_does_not_fit_together_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    lattice, reference = lattice_of(HELD, -2.0), reference_path(HELD, OWN)
    with pytest.raises(ValueError, match="alignment of a has 3 frames, its lattice 4"):
        list(with_references([("a", lattice)], {"a": reference_path(row(2, 4, 6), OWN)}))
    with pytest.raises(ValueError, match=r'references without a lattice: 2 \(b, c\): .*unpaired="drop"'):
        list(with_references([("a", lattice)], {"b": reference, "a": reference, "c": reference}))
    with pytest.raises(ValueError, match=r'lattice of b has no reference: .*unpaired="drop"'):
        list(with_references([("a", lattice), ("b", lattice)], {"a": reference}))
    both = with_references([("b", lattice), ("a", lattice)], {"a": reference, "c": reference}, unpaired="drop")
    assert [id for id, _, _ in both] == ["a"]
    assert "lattices without a reference: 1 (b)" in caplog.text
    assert "references without a lattice: 1 (c)" in caplog.text
    with pytest.raises(ValueError, match="a twice"):
        list(with_references([("a", lattice), ("a", lattice)], {"a": reference}))
    with pytest.raises(ValueError, match="none of 1 references can be used"):
        list(with_references([("a", lattice)], {"a": reference_path(OTHER, OWN)}))
    with pytest.raises(ValueError, match="no utterance in common"):
        list(with_references([("a", lattice)], {"b": reference}, unpaired="drop"))
    for options in ({"missing": "none"}, {"unpaired": "skip"}):
        with pytest.raises(ValueError, match="must be"):
            with_references([("a", lattice)], {"a": reference}, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- the README


def test_the_example_of_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python kaldi\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    lattices, alignments = {}, {}
    for seed in range(40):
        made = random_kaldi_lattice(OWN, np.random.default_rng(seed), frames=6, reorder=True, words=0.3)
        if made is not None and len(paths := list(kaldi_paths(made))) > 1 and len(lattices) < 6:
            lattices[f"u{seed}"], alignments[f"u{seed}"] = made, np.array(paths[0][0], np.int32)
    monkeypatch.chdir(tmp_path)
    for folder in ("exp/ali", "exp/denlats", "data/lang/phones"):
        Path(folder).mkdir(parents=True)
    OWN.save("exp/ali/final.mdl")
    Path("data/lang/phones/silence.csl").write_text("1\n")
    ids = list(lattices)
    for job, (some, form) in enumerate(((ids[:2], binary), (ids[2:], text)), 1):
        Path(f"exp/ali/ali.{job}.gz").write_bytes(gzip.compress(form({id: alignments[id] for id in some})))
        write_archive("lat", [(id, lattices[id]) for id in some], compact=job == 1)
        Path(f"exp/denlats/lat.{job}.gz").write_bytes(gzip.compress(Path("lat").read_bytes()))

    network = torch.nn.Linear(3, OWN.num_pdfs).double()
    features = {id: torch.randn(6, 3, dtype=torch.float64) for id in ids}
    outputs = {id: network(features[id]).detach() for id in ids}
    names: dict[str, Any] = {"network": network, "features": features}
    before = {name: values.clone() for name, values in network.state_dict().items()}
    exec(compile(block, "README.md, Kaldi's lattices", "exec"), names)

    assert list(names["targets"]) == ids
    counts = np.bincount(np.concatenate([OWN.pdf[row] for row in alignments.values()]), minlength=OWN.num_pdfs)
    prior = np.maximum(counts / counts.sum(), 1e-5)
    log_prior = torch.from_numpy(np.log(prior / prior.sum()))
    total = 0.0
    for id, target in names["targets"].items():
        lattice = to_lattice(lattices[id], OWN)
        assert contains(lattice, target.reference)
        worth = worths(lattice, target.reference, "approximate", (0,), True)
        most = int((target.reference.phone[target.reference.begins] != 0).sum())
        total += float(risk(outputs[id], log_prior, 0.1, lattice, worth, most))
    assert float(names["value"]) == pytest.approx(total / (6 * len(ids)), abs=1e-7)
    assert any(not torch.equal(values, before[name]) for name, values in network.state_dict().items())
