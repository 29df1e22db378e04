"""A training under ``torchrun``: ``elastic_job.py FOLDER FALLS``. If FALLS is 1, rank 1 falls once, before update 5."""

from __future__ import annotations

import sys
from pathlib import Path

from quadric.comm.collective import Collective
from reference import trainings


def main(folder: Path, falls: bool) -> None:
    def fall_once() -> None:
        fallen = folder / "fallen"
        if falls and not fallen.exists():
            fallen.touch()
            trainings.kill()

    with Collective.from_environment(backend="gloo", timeout=30) as communicator:
        at = (1, 5, fall_once)
        trained = trainings.trains(communicator, folder / "training", "hessian_free", at, often=True)
        (folder / f"rank-{communicator.rank}").write_bytes(trained.parameters)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1")
