from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from quadric.comm.communicator import Solo
from quadric.files import Unwritable
from reference import checkpoints
from reference.ranks import Killed, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
ALONE = Solo()


def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert run(tmp_path, 2, checkpoints.saves, folder, 1) == [None, None]
    assert checkpoints.loads(ALONE, folder) == 1
    checkpoints.saves(ALONE, folder, 2)
    assert run(tmp_path, 3, checkpoints.loads, folder) == [2, 2, 2]
    assert run(tmp_path, 3, checkpoints.saves, folder, 3) == [None] * 3
    assert run(tmp_path, 1, checkpoints.loads, folder) == [3]
    assert [path.name for path in folder.iterdir()] == ["3"]


def test_each_tensor_is_written_once(tmp_path: Path) -> None:
    checkpoints.saves(ALONE, tmp_path / "alone", 1)
    run(tmp_path, 3, checkpoints.saves, tmp_path / "three", 1)
    sizes = {name: [p.stat().st_size for p in (tmp_path / name / "1").glob("*.distcp")] for name in ("alone", "three")}
    assert len(sizes["three"]) == 3 and sum(sizes["three"]) == sum(sizes["alone"]) > max(sizes["three"])


@pytest.mark.parametrize(
    ("rank", "event", "path", "kept"),
    [
        (1, "open", "__1_0.distcp", 1),
        (0, "open", "__0_0.distcp", 1),
        (0, "open", ".metadata.tmp", 1),
        (0, "os.rename", ".tmp", 1),
        (0, "shutil.rmtree", "1", 2),
    ],
)
def test_a_rank_killed_while_saving_leaves_a_whole_checkpoint(
    rank: int, event: str, path: str, kept: int, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    results = run(tmp_path, 3, checkpoints.dies_at, folder, rank, event, path)
    assert results.pop(rank) is Killed
    for result in results:
        assert result is None if kept == 2 else "failed: another rank died" in result
    assert checkpoints.loads(ALONE, folder) == kept
    assert run(tmp_path, 2, checkpoints.saves, folder, 3) == [None, None]
    assert checkpoints.loads(ALONE, folder) == 3
    assert len(list(folder.iterdir())) == 1


def test_what_one_rank_cannot_write_all_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for result in run(tmp_path, 3, checkpoints.cannot_write, folder):
        with pytest.raises(Unwritable, match=rf"cannot write to {folder}: .*raise the limit") as error:
            raise result
        assert error.value.errno == errno.EFBIG
    assert checkpoints.loads(ALONE, folder) == 1
    assert [path.name for path in folder.iterdir()] == ["1"]
    (tmp_path / "file").touch()
    for result in run(tmp_path, 2, checkpoints.saves, tmp_path / "file" / "state", 1):
        with pytest.raises(Unwritable, match=r"a part of the path is a file"):
            raise result


def test_what_one_rank_cannot_read_all_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for result in run(tmp_path, 2, checkpoints.loads, folder):
        with pytest.raises(FileNotFoundError, match=rf"folder={folder}: no checkpoint there"):
            raise result
    checkpoints.saves(ALONE, folder, 1)
    checkpoints.flip(folder / "1" / "__0_0.distcp", torch.ones(30, 40).numpy().tobytes())
    for result in run(tmp_path, 2, checkpoints.loads, folder):
        with pytest.raises(ValueError, match=rf"folder={folder}/1 is not .*state/model/weight is not what was written"):
            raise result
    for name in ("__0_0.distcp", ".metadata"):
        (folder / "1" / name).write_bytes(b"damaged")
        for result in run(tmp_path, 2, checkpoints.loads, folder):
            with pytest.raises(ValueError, match=rf"folder={folder}/1 is not a checkpoint of this program"):
                raise result


def test_a_rank_may_have_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    assert run(tmp_path, 2, checkpoints.saves_and_loads_alone, tmp_path) == [0, 1]


@pytest.mark.parametrize("what", ["weight", "seconds"])
def test_ranks_with_other_states_are_refused(what: str, tmp_path: Path) -> None:
    for result in run(tmp_path, 2, checkpoints.saves_other_states, tmp_path / "state", what):
        with pytest.raises(ValueError, match=rf"the ranks disagree on the state to save: .*{what}"):
            raise result
    assert not (tmp_path / "state").exists()
