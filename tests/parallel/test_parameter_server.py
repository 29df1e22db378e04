"""What shards of a parameter server are started from."""

from __future__ import annotations

import zlib

from torch import nn

import engine  # noqa: F401 (skips where there is no Ray)


def test_a_part_travels_without_its_numbers() -> None:
    """Of any size, and of many layers: Ray would leave more than 100 kB with the driver."""
    from quadric.parallel.engine import cloudpickle
    from quadric.parallel.parameter_server import packed

    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(500)), nn.Linear(500, 2000))
    sent = packed(deep)
    assert len(sent) < 100_000
    arrived = cloudpickle.loads(zlib.decompress(sent))
    assert {name: p.shape for name, p in arrived.named_parameters()} == {n: p.shape for n, p in deep.named_parameters()}
    assert not any(bool(p.any()) for p in arrived.parameters())
