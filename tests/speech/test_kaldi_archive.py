from __future__ import annotations

import gzip
import struct
from pathlib import Path

import kaldifst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadric.speech import kaldi_stream
from quadric.speech.kaldi_archive import read_archive, write_archive
from quadric.speech.kaldi_lattice import KaldiLattice
from quadric.speech.topology import monophone
from quadric.speech.transitions import TransitionModel
from reference.kaldi_paths import kaldi_paths, random_kaldi_lattice

GOLDEN = Path(__file__).parents[1] / "golden" / "kaldi"
MODEL = TransitionModel.of(monophone(("AH",)))
FORMS = [(True, True), (True, False), (False, True), (False, False)]


def lattice(seed: int) -> KaldiLattice:
    made = random_kaldi_lattice(MODEL, np.random.default_rng(seed), frames=3 + seed % 3, reorder=True)
    assert made is not None
    return made


def paths(given: KaldiLattice) -> list[tuple]:
    return sorted(
        (ids, words, round(graph, 4), round(acoustic, 4)) for ids, words, graph, acoustic in kaldi_paths(given)
    )


def same(first: KaldiLattice, second: KaldiLattice) -> None:
    """Whether they have the same paths, with the same costs in float32."""
    for one, other in zip(paths(first), paths(second), strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=2e-4)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ----------------------------------------------------------------------------------------------------------- reading

COMPACT = """a-1 
0 1 12 1.5,-2.25,2_4_4
0 2 7 0.5,1,2
1 3 0 0,0,
2 3 9
3 0.25,0.5,6_5

b-2 
0 1 5
1

"""  # fmt: skip


def test_a_compact_lattice_in_text_gets_an_arc_for_every_transition_id(tmp_path: Path) -> None:
    (first, one), (second, two) = read_archive(write(tmp_path / "lat.txt", COMPACT))
    assert (first, second) == ("a-1", "b-2")
    assert paths(one) == [((2, 4, 4, 6, 5), (12,), 1.75, -1.75), ((2, 6, 5), (7, 9), 0.75, 1.5)]
    first_frame = one.word == 12
    assert one.transition[first_frame].tolist() == [2]
    assert (one.graph[first_frame], one.acoustic[first_frame]) == (1.5, -2.25)
    assert paths(two) == [((), (5,), 0.0, 0.0)]


def test_a_plain_lattice_in_text_is_read(tmp_path: Path) -> None:
    text = "u \n2 1 3 12 1.5,-2e-1\n2\t0\t0\t7\n0 1 5 0 0.5,0\n1 0.25,0.5\n0 Infinity,Infinity\n\n"
    ((_, one),) = read_archive(write(tmp_path / "lat.txt", text))
    assert (one.start, one.num_states) == (2, 3)
    assert paths(one) == [((3,), (12,), 1.75, 0.3), ((5,), (7,), 0.75, 0.5)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_bytes_are_read_as_openfst_lays_them_out(compact: bool, double: bool, tmp_path: Path) -> None:
    kind = ("compactlattice" + ("84" if double else "44")) if compact else "lattice8" if double else "lattice4"
    costs = "<dd" if double else "<ff"
    inf, string = struct.pack(costs, np.inf, np.inf), lambda *ids: struct.pack(f"<{len(ids) + 1}i", len(ids), *ids)
    empty = string() if compact else b""
    arc = struct.pack("<ii", 7, 7) + struct.pack(costs, 0.5, 1.5) + string(2, 4) if compact else b""
    arc = arc or struct.pack("<ii", 2, 7) + struct.pack(costs, 0.5, 1.5)
    end = struct.pack(costs, 0.25, 0.125) + (string(6) if compact else b"")
    body = inf + empty + struct.pack("<q", 1) + arc + struct.pack("<i", 1) + end + struct.pack("<q", 0)
    header = struct.pack("<ii6si", 2125659606, 6, b"vector", len(kind)) + kind.encode()
    (tmp_path / "lat").write_bytes(b"u " + header + struct.pack("<iiQqqq", 2, 0, 3, 0, 2, 0) + body)
    ((_, one),) = read_archive(tmp_path / "lat")
    assert paths(one) == [((2, 4, 6) if compact else (2,), (7,), 0.75, 1.625)]


def test_a_lattice_that_openfst_wrote_is_read(tmp_path: Path) -> None:
    ((_, one),) = read_archive(GOLDEN / "behind.lat")
    (tmp_path / "fst").write_bytes((GOLDEN / "behind.lat").read_bytes()[4:])
    fst = kaldifst.Lattice.read(str(tmp_path / "fst"))
    assert (one.num_states, one.start, len(one.source)) == (
        fst.num_states, fst.start, sum(fst.num_arcs(s) for s in range(fst.num_states))
    )  # fmt: skip
    # The text of kaldifst: source, target, labels, and weights that are neither infinite nor nothing.
    rows = [line.split() for line in fst.to_str(show_weight_one=True).splitlines()]
    arcs = sorted(tuple(map(int, row[:4])) for row in rows if len(row) > 2)
    assert arcs == sorted(zip(one.source, one.target, one.transition, one.word, strict=True))


# ----------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(("compact", "text"), FORMS)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_every_form_comes_back(compact: bool, text: bool, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("forms") / "lat"
    given = {"a": lattice(seed), "b": lattice(seed + 1)}
    write_archive(path, given.items(), compact=compact, text=text)
    back = dict(read_archive(path))
    assert list(back) == ["a", "b"]
    for id, one in given.items():
        same(back[id], one)
        if not compact:
            np.testing.assert_array_equal(np.sort(back[id].graph.astype(np.float32)), np.sort(one.graph))


def test_openfst_reads_what_is_written(tmp_path: Path) -> None:
    one = lattice(3)
    write_archive(tmp_path / "lat", [("u", one)], compact=False)
    (tmp_path / "fst").write_bytes((tmp_path / "lat").read_bytes()[2:])
    fst = kaldifst.Lattice.read(str(tmp_path / "fst"))
    fst.write(str(tmp_path / "again"))
    (tmp_path / "lat2").write_bytes(b"u " + (tmp_path / "again").read_bytes())
    ((_, back),) = read_archive(tmp_path / "lat2")
    assert (fst.num_states, fst.start) == (one.num_states, one.start)
    assert paths(back) == paths(one)


def test_chains_become_strings_and_words_begin_them(tmp_path: Path) -> None:
    given = KaldiLattice(
        source=np.arange(5, dtype=np.int32),
        target=np.arange(1, 6, dtype=np.int32),
        transition=np.array([2, 4, 0, 6, 8], np.int32),
        word=np.array([9, 0, 0, 7, 0], np.int32),
        graph=np.array([1.0, 0.5, 0.25, 0.125, 0.0]),
        acoustic=np.array([-1.0, 0.0, 0.0, 2.0, 0.0]),
        final=np.array([5], np.int32),
        final_graph=np.array([0.1]),
        final_acoustic=np.zeros(1),
        num_states=6,
    )
    write_archive(tmp_path / "lat", [("u", given)], text=True)
    assert (tmp_path / "lat").read_text() == "u \n0\t1\t9\t1.75,-1.0,2_4\n1\t2\t7\t0.125,2.0,6_8\n2\t0.1,0.0,\n\n"
    write_archive(tmp_path / "lat", [("u", given)], text=True, compact=False)
    assert (tmp_path / "lat").read_text().splitlines()[1:3] == ["0\t1\t2\t9\t1.0,-1.0", "1\t2\t4\t0\t0.5,0.0"]


def test_ends_and_starts_within_a_chain_stay_states(tmp_path: Path) -> None:
    one = {"word": np.zeros(2, np.int32), "graph": np.zeros(2), "acoustic": np.zeros(2)}
    given = KaldiLattice(
        source=np.array([0, 1], np.int32),
        target=np.array([1, 2], np.int32),
        transition=np.array([2, 0], np.int32),
        final=np.array([1, 2], np.int32),
        final_graph=np.array([0.5, 0.25]),
        final_acoustic=np.zeros(2),
        num_states=3,
        **one,
    )
    loop = KaldiLattice(**{**given.__dict__, "target": np.array([1, 0], np.int32), "num_states": 3})
    write_archive(tmp_path / "lat", [("u", given), ("v", loop)], text=True)
    ends = "1\t0.5,0.0,\n2\t0.25,0.0,\n\n"
    assert (tmp_path / "lat").read_text() == (
        f"u \n0\t1\t0\t0.0,0.0,2\n1\t2\t0\t0.0,0.0,\n{ends}v \n0\t1\t0\t0.0,0.0,2\n1\t0\t0\t0.0,0.0,\n{ends}"
    )


@pytest.mark.parametrize(("compact", "text"), FORMS)
def test_a_table_leads_to_every_lattice(compact: bool, text: bool, tmp_path: Path) -> None:
    given = {f"u{n}": lattice(n) for n in range(4)}
    write_archive(tmp_path / "lat.ark", given.items(), compact=compact, text=text, scp=tmp_path / "lat.scp")
    lines = (tmp_path / "lat.scp").read_text().splitlines()
    # Kaldi starts behind the blank, where text has the end of the line and bytes have OpenFst's number.
    starts = [(tmp_path / "lat.ark").read_bytes()[int(line.split(":")[-1]) :][:1] for line in lines]
    assert starts == [b"\n" if text else b"\xd6"] * 4
    lines = [lines[n].replace(f"{tmp_path}/", "") for n in (2, 0, 3)]
    (tmp_path / "some.scp").write_text("\n".join(lines) + "\n")
    back = dict(read_archive(tmp_path / "some.scp"))
    assert list(back) == ["u2", "u0", "u3"]
    for id, one in back.items():
        same(one, given[id])


def test_an_id_with_a_blank_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the id 'a b' must not"):
        write_archive(tmp_path / "lat", [("a", lattice(0)), ("a b", lattice(0))], scp=tmp_path / "lat.scp")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- packed, and damage


@pytest.mark.parametrize("text", [True, False])
def test_a_packed_archive_is_read_in_pieces(text: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kaldi_stream, "_CHUNK", 16)
    given = {f"utterance-{n}": lattice(n) for n in range(5)}
    write_archive(tmp_path / "lat", given.items(), text=text)
    (tmp_path / "lat.1.gz").write_bytes(gzip.compress((tmp_path / "lat").read_bytes()))
    for name in ("lat", "lat.1.gz"):
        back = dict(read_archive(tmp_path / name))
        assert list(back) == list(given)
        for id, one in given.items():
            same(back[id], one)


@pytest.mark.parametrize(("compact", "text"), FORMS)
def test_an_archive_that_ends_early_names_utterance_and_byte(compact: bool, text: bool, tmp_path: Path) -> None:
    write_archive(tmp_path / "lat", [("one", lattice(0)), ("two", lattice(1))], compact=compact, text=text)
    whole = (tmp_path / "lat").read_bytes()
    second = whole.rindex(b"two ")
    for length in range(second + 4, len(whole), 5):
        (tmp_path / "cut").write_bytes(whole[:length])
        read = read_archive(tmp_path / "cut")
        assert next(read)[0] == "one"
        with pytest.raises(ValueError, match=f"cut: the lattice of two, from byte {second + 3}.* at byte {length}:"):
            next(read)


def test_a_packed_archive_that_ends_early_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress((GOLDEN / "behind.lat").read_bytes())
    for length in (len(packed) // 2, len(packed) - 4):
        (tmp_path / "lat.gz").write_bytes(packed[:length])
        with pytest.raises(ValueError, match=r"lat\.gz: packed by gzip and damaged"):
            list(read_archive(tmp_path / "lat.gz"))


@pytest.mark.parametrize(("compact", "text"), FORMS)
def test_damage_is_told_as_such(compact: bool, text: bool, tmp_path: Path) -> None:
    write_archive(tmp_path / "lat", [("one", lattice(0)), ("two", lattice(1))], compact=compact, text=text)
    whole, rng, told = (tmp_path / "lat").read_bytes(), np.random.default_rng(0), 0
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path / "bad").write_bytes(damaged)
        try:
            list(read_archive(tmp_path / "bad"))
        except ValueError as error:
            assert str(tmp_path / "bad") in str(error)
            told += 1
    assert told > 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("u \n0 1 word 0.5,1,2\n1\n\n", "line 1 behind its id, '0 1 word 0.5,1,2', is neither"),
        ("u \n0 1 3 2 0.5,1\n0 1 3\n1\n\n", "line 2 behind its id"),
        ("u \n0 1 3 2 0.5,1,2\n1\n\n", "line 1 behind its id"),
        ("u \n0 1 3 2 0.5,1\n0 1 3 2 0.5,1 9\n1\n\n", "line 2 behind its id"),
        ("u \n0 1 3 0.5\n1\n\n", "line 1 behind its id"),
        ("u \n0 1 3 nan,1,2\n1\n\n", "graph must hold finite costs"),
        ("u \n0 1 3 0.5,1,2\n1 0.5,1,2 7\n\n", "line 2 behind its id"),
        ("u \n0 1 3 0.5,1,1_000\n1 0,0,1__2\n\n", "line 2 behind its id"),
        ("u \n\n", "the lattice of u, from byte 1, is damaged: it is empty"),
        ("u [ 1 2 3 ]\n", "neither a line of its own nor OpenFst's number"),
        ("u \n0 1 3 0.5,1,2\n1\n", "the file ends within it"),
        ("nothing", "no utterance id at byte 0"),
    ],
)
def test_text_that_is_no_lattice_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        list(read_archive(write(tmp_path / "lat", text)))


def test_other_automata_of_openfst_are_refused(tmp_path: Path) -> None:
    fst = kaldifst.StdVectorFst()
    fst.start = fst.add_state()
    fst.write(str(tmp_path / "fst"))
    (tmp_path / "lat").write_bytes(b"u " + (tmp_path / "fst").read_bytes())
    with pytest.raises(ValueError, match="an automaton 'vector' of 'standard', no lattice"):
        list(read_archive(tmp_path / "lat"))
    kaldifst.Lattice().write(str(tmp_path / "fst"))
    (tmp_path / "lat").write_bytes(b"u " + (tmp_path / "fst").read_bytes())
    with pytest.raises(ValueError, match="has no states: leave it out"):
        list(read_archive(tmp_path / "lat"))


def test_tables_with_commands_or_missing_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"commands in .*line 1.*lattice-copy"):
        list(read_archive(write(tmp_path / "lat.scp", "u gunzip -c lat.1.gz |\n")))
    with pytest.raises(FileNotFoundError, match=r"lat\.ark"):
        list(read_archive(write(tmp_path / "lat.scp", "u lat.ark:7\n")))
    with pytest.raises(FileNotFoundError, match="no archive of lattices"):
        list(read_archive(tmp_path / "lat.1.gz"))
    write(tmp_path / "lat.ark", COMPACT)
    with pytest.raises(ValueError, match="the lattice of u, from byte 700: the file ends within it"):
        list(read_archive(write(tmp_path / "lat.scp", "u lat.ark:700\n")))


def test_arrays_that_are_no_lattice_are_refused() -> None:
    good = dict(lattice(0).__dict__)
    for change, said in [
        ({"target": good["target"][:-1]}, "target must have one entry for each"),
        ({"final_graph": np.zeros(2)}, "final_graph must have one entry"),
        (
            {name: np.repeat(good[name], 2) for name in ("final", "final_graph", "final_acoustic")},
            "final holds a state",
        ),
        ({"num_states": 1}, "source holds states from 0 to"),
        ({"start": 99}, "start=99 is none of"),
        ({"transition": -good["transition"]}, "transition holds -"),
        ({"acoustic": good["acoustic"] + np.inf}, "acoustic must hold finite costs"),
    ]:
        with pytest.raises(ValueError, match=said):
            KaldiLattice(**{**good, **change})
