"""Checkpoints of a job of one; `tests/distributed` has several ranks."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from quadric.comm.checkpoint import load, save
from quadric.comm.communicator import Solo
from quadric.files import Unwritable
from reference.checkpoints import flip, same, state

ALONE = Solo()


def test_round_trip(tmp_path: Path) -> None:
    save(state(1), tmp_path / "deep" / "state", ALONE)
    assert same(load(tmp_path / "deep" / "state", ALONE), state(1))


def test_the_last_one_stays_alone(tmp_path: Path) -> None:
    for step in range(1, 12):  # ten is after nine, though not in the alphabet
        save(state(step), tmp_path, ALONE)
        assert load(tmp_path, ALONE)["step"] == step
        assert len(list(tmp_path.iterdir())) == 1


def test_ten_is_newer_than_nine(tmp_path: Path) -> None:
    for number in (9, 10):
        save(state(number), tmp_path / "one", ALONE)
        (tmp_path / "state").mkdir(exist_ok=True)
        (tmp_path / "one" / "1").rename(tmp_path / "state" / str(number))
    assert load(tmp_path / "state", ALONE)["step"] == 10
    save(state(11), tmp_path / "state", ALONE)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["11"]


@pytest.mark.parametrize("name", ["9", "²"])
def test_a_stray_folder_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    save(state(1), tmp_path, ALONE)
    (tmp_path / name).mkdir()
    assert load(tmp_path, ALONE)["step"] == 1
    for step in (2, 3):
        save(state(step), tmp_path, ALONE)
        assert load(tmp_path, ALONE)["step"] == step


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("64k") / "state"
    save(state(1), disk, ALONE)
    with pytest.raises(Unwritable, match=rf"cannot write to {disk}: the disk is full: free some") as error:
        save({**state(2), "large": torch.zeros(100_000)}, disk, ALONE)
    assert error.value.errno == errno.ENOSPC
    assert load(disk, ALONE)["step"] == 1
    assert [path.name for path in disk.iterdir()] == ["1"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unwritable, match=r"a part of the path is a file"):
        save(state(1), tmp_path / "file" / "state", ALONE)


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), {1, 2}, object(), print])
def test_what_is_no_data_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"state/a/1 is a {type(value).__name__}: a checkpoint holds tensors, numb"):
        save({"a": [0, value]}, tmp_path / "state", ALONE)
    with pytest.raises(ValueError, match=r"state/a has the key None: name it by a string or a whole number"):
        save({"a": {None: 1}}, tmp_path / "state", ALONE)
    assert not (tmp_path / "state").exists()


def test_nothing_there(tmp_path: Path) -> None:
    for name in ("²", "٣", "007", "1.old"):
        (tmp_path / name).mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=rf"folder={folder}: no checkpoint there"):
            load(folder, ALONE)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, overwrite, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damage_is_told_with_the_folder(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    save(state(1), tmp_path, ALONE)
    damage(tmp_path / "1" / name)
    with pytest.raises(ValueError, match=rf"folder={tmp_path}/1 is not a checkpoint of this program") as error:
        load(tmp_path, ALONE)
    assert str(error.value).count("is not a checkpoint") == 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.linspace(0, 1, 50),
        torch.linspace(0, 1, 50).bfloat16(),
        torch.linspace(0, 1, 60).view(6, 10).T,
        torch.tensor(torch.pi, dtype=torch.float64),
        torch.arange(70) % 3 == 0,
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
    ],
    ids=["float32", "bfloat16", "not contiguous", "0-d", "bool", "conjugate"],
)
def test_one_flipped_byte_of_a_tensor_is_told(tensor: torch.Tensor, tmp_path: Path) -> None:
    save({"a": [tensor]}, tmp_path, ALONE)
    flip(tmp_path / "1" / "__0_0.distcp", bytes(tensor.untyped_storage().tolist()))
    with pytest.raises(ValueError, match=rf"folder={tmp_path}/1 is not a checkpoint .*state/a/0 is not what was wri"):
        load(tmp_path, ALONE)


def test_one_flipped_byte_of_what_is_no_tensor_is_told(tmp_path: Path) -> None:
    save({"lr": 0.125}, tmp_path, ALONE)
    flip(tmp_path / "1" / "__0_0.distcp", b"0.125")
    with pytest.raises(ValueError, match=rf"folder={tmp_path}/1 is not a checkpoint .*structure is not what was wri"):
        load(tmp_path, ALONE)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    save(state(1), tmp_path / "state", ALONE)
    (tmp_path / "state" / "1" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"is not data"):
        load(tmp_path / "state", ALONE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_files_are_those_of_torch(tmp_path: Path) -> None:
    """Its own tools read them: a checkpoint can be turned into one file, or read by another program."""
    save(state(1), tmp_path, ALONE)
    weight = {"state/model/weight": torch.empty(30, 40)}
    torch.distributed.checkpoint.load(weight, checkpoint_id=tmp_path / "1")
    assert torch.equal(weight["state/model/weight"], torch.ones(30, 40))
