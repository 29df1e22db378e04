"""What the tests of whole jobs share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from reference.whole_job import Finished


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny job, done once; not to be changed."""
    from reference import whole_job  # needs the speech extra, as the tests beside it do not

    return whole_job.finish(tmp_path_factory.mktemp("exp"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
