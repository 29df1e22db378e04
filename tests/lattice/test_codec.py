from __future__ import annotations

import zlib
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.codec import decode, encode
from quadric.lattice.generate import Generator, LatticeOptions, NoPath
from quadric.lattice.lattice import Lattice
from reference.searches import random_graph


def check_same(one: Lattice, other: Lattice) -> None:
    for field in fields(Lattice):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a.dtype == b.dtype, field.name
        np.testing.assert_array_equal(a, b)


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 30))
def test_a_lattice_comes_back_whole(seed: int, frames: int) -> None:
    rng = np.random.default_rng(seed)
    try:
        lattice = Generator(random_graph(rng, 30, 110), LatticeOptions(30.0, 5.0))(rng.normal(size=(frames, 4)))
    except NoPath:
        reject()
    check_same(lattice, decode(encode(lattice)))


def test_large_numbers_and_wide_frames_come_back() -> None:
    """More than 256 states a frame, more than 65536 kinds of arcs, labels that need four bytes."""
    wide = 300
    arcs = [(0, 1 + s, s) for s in range(wide)]
    arcs += [(1 + s, 1 + wide + t, 2**31 - 1 - s * t) for s in range(wide) for t in range(wide)]
    count = len(arcs)
    lattice = Lattice.from_arcs(
        arcs,
        final={1 + wide + t: -float(t) for t in range(wide)},
        weight=np.arange(count) * -0.25,
        word=np.arange(count) % 70_000,
        phone=np.arange(count) % 7,
        begins=np.arange(count) % 2,
    )
    check_same(lattice, decode(encode(lattice)))


def test_what_repeats_costs_little() -> None:
    """A loop of ten states for a thousand frames."""
    arcs = [(0, 1 + s, s) for s in range(10)]
    arcs += [(1 + 10 * t + s, 11 + 10 * t + s, s) for t in range(999) for s in range(10)]
    lattice = Lattice.from_arcs(arcs, final={1 + 9990 + s: 0.0 for s in range(10)})
    assert len(encode(lattice)) < 0.1 * lattice.num_arcs


def test_other_bytes_are_refused() -> None:
    content = encode(Lattice.from_arcs([(0, 1, 2), (1, 2, 0)], final={2: 0.0}))
    other = zlib.compress(zlib.decompress(content)[:-20])
    for wrong in (b"", b"text", content[:-5], other, zlib.compress(b"text")):
        with pytest.raises(ValueError, match="not those of a lattice"):
            decode(wrong)
