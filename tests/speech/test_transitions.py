from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quadric.speech.topology import Tying, monophone
from quadric.speech.transitions import NO_PDF, HmmState, Topology, TransitionModel

GOLDEN = Path(__file__).parents[1] / "golden" / "kaldi"


def same(first: TransitionModel, second: TransitionModel) -> None:
    assert first.topologies == second.topologies
    np.testing.assert_array_equal(first.states, second.states)
    np.testing.assert_allclose(first.log_probs, second.log_probs, rtol=1e-5)


def test_a_transition_model_of_kaldi_is_read() -> None:
    model = TransitionModel.load(GOLDEN / "mono.txt.mdl")
    # What Kaldi's code says of the same model: five states of silence, two phones of three.
    assert (model.num_ids, model.num_pdfs) == (30, 11)
    assert model.pdf[1:].tolist() == [p for p, n in enumerate([4] * 4 + [2] * 7) for _ in range(n)]
    assert model.phone[1:].tolist() == [1] * 18 + [2] * 6 + [3] * 6
    starts = [id for id in range(1, 31) if model.hmm_state[id] == 0]
    assert starts == [1, 2, 3, 4, 19, 20, 25, 26]
    assert np.flatnonzero(model.self_loop).tolist() == [1, 5, 10, 15, 17, 19, 21, 23, 25, 27, 29]
    assert np.flatnonzero(model.ends).tolist() == [18, 24, 30]
    assert np.exp(model.log_probs[17:19]) == pytest.approx([0.75, 0.25], rel=1e-4)


@pytest.mark.parametrize("name", ["mono", "chain"])
def test_text_and_bytes_say_the_same(name: str) -> None:
    same(TransitionModel.load(GOLDEN / f"{name}.txt.mdl"), TransitionModel.load(GOLDEN / f"{name}.mdl"))


def test_a_chain_model_has_pdfs_of_its_self_loops() -> None:
    model = TransitionModel.load(GOLDEN / "chain.mdl")
    assert model.pdf[1:].tolist() == [1, 0, 3, 2, 3, 4, 6, 5]
    assert model.num_pdfs == 7


@pytest.mark.parametrize("name", ["mono", "chain"])
def test_the_text_is_that_of_kaldi(name: str, tmp_path: Path) -> None:
    given = GOLDEN / f"{name}.txt.mdl"
    TransitionModel.load(given).save(tmp_path / "0.mdl")
    assert (tmp_path / "0.mdl").read_text().split() == given.read_text().split()
    assert (tmp_path / "0.mdl").read_text().rstrip() == given.read_text().rstrip()


def test_ours_come_back_from_kaldi() -> None:
    same(TransitionModel.of(monophone(("AH", "T"))), TransitionModel.load(GOLDEN / "own.mdl"))


def test_transition_ids_of_a_tying_go_by_phone_state_and_pdf() -> None:
    table = np.zeros((2, 2, 2, 3), np.int32)
    table[0], table[1] = [7, 1, 2], [0, 4, 5]
    table[1, 0, 1, 1], table[1, 1, 1, 0] = 6, 3
    tying = Tying(("SIL", "AH"), 3, table)
    model = TransitionModel.of(tying, self_loop=0.9)
    assert model.states[:, :3].tolist() == [
        [1, 0, 7], [1, 1, 1], [1, 2, 2], [2, 0, 0], [2, 0, 3], [2, 1, 4], [2, 1, 6], [2, 2, 5]
    ]  # fmt: skip
    assert model.self_loop[1:].tolist() == [True, False] * 8
    assert np.exp(model.log_probs[1:3]) == pytest.approx([0.9, 0.1])
    assert model.ends[[6, 16]].tolist() == [True, True]
    with pytest.raises(ValueError, match="self_loop=1"):
        TransitionModel.of(tying, self_loop=1.0)


@pytest.mark.parametrize("name", ["mono.mdl", "mono.txt.mdl", "chain.mdl", "chain.txt.mdl"])
def test_what_follows_the_transition_model_is_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "final.mdl").write_bytes((GOLDEN / name).read_bytes() + b"\n<Nnet3> \xff\xfe\0 7")
    same(TransitionModel.load(tmp_path / "final.mdl"), TransitionModel.load(GOLDEN / name))


@pytest.mark.parametrize("name", ["mono.mdl", "mono.txt.mdl", "chain.mdl", "chain.txt.mdl"])
def test_a_file_that_ends_early_is_refused(name: str, tmp_path: Path) -> None:
    whole = (GOLDEN / name).read_bytes().rstrip()
    for length in range(0, len(whole) - 1, 17):
        (tmp_path / "final.mdl").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="does not begin with a transition model"):
            TransitionModel.load(tmp_path / "final.mdl")


def test_damage_is_told_not_read(tmp_path: Path) -> None:
    whole = (GOLDEN / "mono.mdl").read_bytes()
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path / "final.mdl").write_bytes(damaged)
        try:
            TransitionModel.load(tmp_path / "final.mdl")
        except ValueError:
            told += 1
    assert told > 25  # of the bits of probabilities and pdfs, most mean something else


def test_numbers_of_another_size_are_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "mono.mdl").read_bytes()
    place = whole.index(b"<Triples> ") + 10
    for damaged in (whole[:place] + b"\x08" + whole[place + 1 :], whole[:31] + b"\x08" + whole[32:]):
        (tmp_path / "final.mdl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"number of 4 bytes expected|vector of 4-byte integers expected"):
            TransitionModel.load(tmp_path / "final.mdl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of a transition model"):
        TransitionModel.load(tmp_path / "final.mdl")


def test_a_model_that_does_not_fit_together_is_refused() -> None:
    one = HmmState(0, 0, ((0, 0.5), (1, 0.5)))
    end = HmmState(NO_PDF, NO_PDF, ())
    logs = np.zeros(3, np.float32)
    rows = np.array([[1, 0, 0, 0]], np.int32)
    good = Topology((1,), (one, end))
    TransitionModel((good,), rows, logs)
    for topologies, states, log_probs, said in [
        ((good, good._replace(states=(one, one, end))), rows, logs, "phone 1 must .* have one topology"),
        ((Topology((1,), (one,)),), rows, logs, "last state"),
        ((Topology((1,), (one._replace(transitions=((2, 1.0),)), end)),), rows, logs, "state 2 of 2"),
        ((good,), rows + 1, logs, "phone 2 has no topology"),
        ((good,), np.array([[1, 1, 0, 0]], np.int32), logs, "no emitting state 1"),
        ((good,), np.array([[1, 0, -1, 0]], np.int32), logs, "pdf -1"),
        ((good,), rows.astype(np.int64), logs, "int32"),
        ((good,), rows, logs[:2], "each of the 2 transition-ids"),
    ]:
        with pytest.raises(ValueError, match=said):
            TransitionModel(topologies, states, log_probs)


def test_pdfs_beyond_a_model_are_refused() -> None:
    model = TransitionModel.load(GOLDEN / "mono.mdl")
    model.check_pdfs(11)
    with pytest.raises(ValueError, match="num_pdfs=10: the transition model uses pdf 10"):
        model.check_pdfs(10)
