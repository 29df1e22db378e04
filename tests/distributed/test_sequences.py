from __future__ import annotations

from pathlib import Path

import pytest

from reference import sequence_training
from reference.ranks import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


@pytest.mark.parametrize("name", sequence_training.JOBS)
def test_two_ranks_train_a_sequence_loss_as_one_does(name: str, tmp_path: Path) -> None:
    """Three micro-batches of utterances: one rank has two of them."""
    values, parameters = sequence_training.train(name=name)
    results = run(tmp_path, 2, sequence_training.train, name)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(values, rel=1e-9)
    assert results[0][1] == pytest.approx(parameters, rel=1e-7, abs=1e-9)
    assert values[-1] < values[0]
