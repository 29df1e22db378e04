from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference import family_training
from reference.ranks import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def test_ranks_step_as_one_does_and_share_the_inverses(tmp_path: Path) -> None:
    first, second = run(tmp_path, 2, family_training.trainings)
    for key, (expected, alone) in family_training.trainings().items():
        assert first[key][0] == second[key][0], key  # to the bit
        found, whole = (torch.frombuffer(bytearray(made), dtype=torch.float64) for made in (first[key][0], expected))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
        assert first[key][1] + second[key][1] == alone and first[key][1] and second[key][1]


def test_statistics_of_calls_are_of_one_size_on_any_number_of_ranks(tmp_path: Path) -> None:
    """By an objective over parts of any size, at targets of the data or drawn, and by DistributedDataParallel."""
    first, second = run(tmp_path, 2, family_training.natural_trainings)
    for key, expected in family_training.natural_trainings().items():
        assert first[key] == second[key], key  # to the bit
        for found, whole in zip(first[key], expected, strict=True):
            found, whole = (torch.frombuffer(bytearray(made), dtype=torch.float64) for made in (found, whole))
            torch.testing.assert_close(found, whole, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


def test_refusals_on_ranks(tmp_path: Path) -> None:
    for ranks, shards in run(tmp_path, 2, family_training.refusals):
        assert ranks.startswith("communicator: the optimiser knows of 1 ranks, its Objective of 2: give both the same")
        assert shards.startswith("0.weight is sharded over devices: blocks are of whole layers; use DistributedData")
    (alone,) = run(tmp_path, 1, family_training.refused_shards)
    assert alone == shards
