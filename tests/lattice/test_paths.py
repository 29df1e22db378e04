from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.generate import LatticeOptions
from quadric.lattice.lattice import Lattice, StatePath
from quadric.lattice.paths import best_weight_of_phones, contains, path_weight, weight_in, with_path
from reference.searches import graph_paths, lattice_paths, random_graph, searched_lattice

WIDE = LatticeOptions(beam=1e4, lattice_beam=2.0, max_active=10**6)


def state_path(steps: list[tuple[int, int, bool]], weight: float = -1.5) -> StatePath:
    pdf, phone, begins = zip(*steps, strict=True)
    return StatePath(np.array(pdf, np.int32), np.array(phone, np.int32), np.array([True, *begins[1:]]), weight)


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 5))
def test_the_weight_of_pdfs_sums_their_paths(seed: int, frames: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, pdfs=2, arcs=16)
    weights: dict[tuple[int, ...], float] = {}
    for steps, final in graph_paths(graph, frames):
        key = tuple(step[0] for step in steps)
        weights[key] = float(np.logaddexp(weights.get(key, -np.inf), sum(step[4] for step in steps) + final))
    for pdfs in [*weights, tuple(rng.integers(2, size=frames).tolist()), (7,) * frames]:
        assert path_weight(graph, np.array(pdfs)) == pytest.approx(weights.get(pdfs, -np.inf), abs=1e-5)


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 5))
def test_a_lattice_holds_its_paths_and_takes_others(seed: int, frames: int) -> None:
    rng = np.random.default_rng(seed)
    lattice = searched_lattice(rng, frames, WIDE)
    paths = list(lattice_paths(lattice))
    own = {tuple((pdf, phone, begins) for pdf, _, phone, begins, _ in steps) for steps, _ in paths}
    some = list(next(iter(own)))
    changed = rng.integers(frames)
    some[changed] = (some[changed][0], some[changed][1] + 5, some[changed][2])
    turned = list(next(iter(own)))
    turned[-1] = (*turned[-1][:2], not turned[-1][2])
    for steps in [*own, some, turned]:
        path = state_path(list(steps))
        there = tuple((s[0], s[1], bool(b)) for s, b in zip(steps, path.begins, strict=True)) in own
        assert contains(lattice, path) == there
        larger = with_path(lattice, path)
        if there:
            assert larger is lattice
            continue
        assert contains(larger, path)
        arcs = zip(path.pdf.tolist(), path.phone.tolist(), path.begins.tolist(), strict=True)
        new = tuple((p, 0, q, b, -1.5 if t == 0 else 0.0) for t, (p, q, b) in enumerate(arcs))
        assert sorted(lattice_paths(larger)) == sorted([*paths, (new, 0.0)])


@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 6))
def test_a_lattice_weighs_a_path_and_its_phones(seed: int, frames: int) -> None:
    rng = np.random.default_rng(seed)
    lattice = searched_lattice(rng, frames, WIDE)
    # A path of a random graph may go on with a phone that did not begin: it is no way to say phones.
    says: dict[tuple, float] = {}
    phones: dict[tuple, float] = {}
    for steps, final in lattice_paths(lattice):
        weight = sum(step[4] for step in steps) + final
        key = tuple((pdf, phone, bool(begins)) for pdf, _, phone, begins, _ in steps)
        says[key] = float(np.logaddexp(says.get(key, -np.inf), weight))
        if well_formed(key):
            spoken = tuple(phone for _, phone, begins in key if begins)
            phones[spoken] = max(phones.get(spoken, -np.inf), weight)
    for key in says:
        if not key[0][2]:
            continue
        path = state_path(list(key), weight=7.0)
        assert weight_in(lattice, path) == pytest.approx(says[key], abs=1e-9)
        other = replace(path, pdf=(path.pdf + 1).astype(np.int32))
        assert weight_in(lattice, other) == says.get(tuple((p + 1, q, b) for p, q, b in key), -np.inf)
        spoken = tuple(path.phone[path.begins].tolist())
        assert best_weight_of_phones(lattice, other) == pytest.approx(phones.get(spoken, -np.inf), abs=1e-9)
        assert best_weight_of_phones(lattice, replace(path, phone=path.phone + np.int32(9))) == -np.inf


def well_formed(steps: tuple[tuple[int, int, bool], ...]) -> bool:
    """Whether a path begins with a phone, and every frame is of the one that began last."""
    inner = (steps[t][2] or steps[t][1] == steps[t - 1][1] for t in range(1, len(steps)))
    return steps[0][2] and all(inner)


def test_the_weight_of_phones_is_that_of_the_best_alignment_of_them_all() -> None:
    # phone 1 for one frame or two, then phone 1 again or 2; and phone 2 alone
    arcs = [(0, 1, 0), (0, 2, 5), (1, 3, 0), (1, 3, 1), (2, 4, 5), (3, 5, 1), (3, 5, 2), (4, 5, 5)]
    phone, begins = [1, 2, 1, 1, 2, 1, 2, 2], [1, 1, 0, 1, 0, 0, 1, 0]
    lattice = Lattice.from_arcs(
        arcs, final={5: -0.5}, weight=[-1, -9, -2, -4, 0, -3, -7, 0], phone=phone, begins=map(bool, begins)
    )
    for phones, starts, weight in (
        ((1, 1, 1), (1, 0, 0), -1 - 2 - 3),
        ((1, 1, 1), (1, 0, 1), -1 - 4 - 3),
        ((1, 2, 2), (1, 1, 0), -1 - 2 - 7),
        ((1, 1, 2), (1, 1, 1), -1 - 4 - 7),
        ((2, 2, 2), (1, 0, 0), -9),
        ((2, 1, 1), (1, 1, 0), -np.inf),
        ((1, 1, 1), (1, 1, 1), -np.inf),
    ):
        path = state_path([(8, p, bool(b)) for p, b in zip(phones, starts, strict=True)])
        assert best_weight_of_phones(lattice, path) == weight - 0.5
        assert weight_in(lattice, path) == -np.inf


def test_misuse() -> None:
    rng = np.random.default_rng(1)
    lattice = searched_lattice(rng, 3, WIDE)
    path = state_path([(9, 9, True)] * 3)
    for long in (2, 4):
        with pytest.raises(ValueError, match=f"path has {long} frames, the lattice 3"):
            with_path(lattice, state_path([(9, 9, True)] * long))
        with pytest.raises(ValueError, match=f"path has {long} frames, the lattice 3"):
            best_weight_of_phones(lattice, state_path([(9, 9, True)] * long))
    with pytest.raises(ValueError, match="must be finite"):
        with_path(lattice, replace(path, weight=-np.inf))
    for pdfs in (np.zeros(3), np.zeros((3, 1), int), np.zeros(0, int)):
        with pytest.raises(ValueError, match="one row of integers"):
            path_weight(random_graph(rng), pdfs)
