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
