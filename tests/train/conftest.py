"""What the tests of whole jobs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reference.whole_job import Finished, finish


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny job, done once; not to be changed."""
    return finish(tmp_path_factory.mktemp("exp"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
