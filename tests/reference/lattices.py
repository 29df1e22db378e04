"""Lattices at random, small enough to list their paths."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from quadric.lattice.lattice import Lattice


def random_lattice(
    rng: np.random.Generator,
    *,
    frames: int = 5,
    width: int = 3,
    pdfs: int = 4,
    phones: int = 3,
    words: int = 3,
    density: float = 2.0,
    spread: float = 1.0,
) -> Lattice:
    """A lattice with parallel arcs and paths that part and meet.

    The arcs into a state are all of one phone, so that a phone is a chain along every path: an arc that does not begin
    a phone continues that of the arcs before it. The first arcs begin one. A word may begin where a phone does.

    Args:
        frames: T, at least 1.
        width: most states between two frames.
        pdfs, phones, words: how many to draw from; the words' labels are 1 to ``words``, and 0 where none begins.
        density: arcs drawn for every state, before those that lead nowhere are left out.
        spread: standard deviation of the weights, of arcs and of ends, in nats.
    """
    counts = [1, *rng.integers(1, width + 1, size=frames).tolist()]
    edges = np.cumsum([0, *counts])
    rows = []
    spine = 0
    for t in range(frames):
        # One path from start to end first, so that something is left after pruning.
        step = int(rng.integers(edges[t + 1], edges[t + 2]))
        rows.append((spine, step))
        spine = step
        for _ in range(rng.poisson(density * counts[t])):
            rows.append((int(rng.integers(edges[t], edges[t + 1])), int(rng.integers(edges[t + 1], edges[t + 2]))))
    rows = _connected(rows, last=range(edges[-2], edges[-1]))
    states = sorted({state for row in rows for state in row})
    number = {state: n for n, state in enumerate(states)}
    state_phone = rng.integers(phones, size=len(states))
    arcs, phone, begins, word = [], [], [], []
    for old_source, old_target in rows:
        source, target = number[old_source], number[old_target]
        arcs.append((source, target, int(rng.integers(pdfs))))
        phone.append(int(state_phone[target]))
        begins.append(bool(source == 0 or state_phone[source] != state_phone[target] or rng.random() < 0.3))
        word.append(int(rng.integers(words + 1)) if begins[-1] else 0)
    return Lattice.from_arcs(
        arcs,
        final={number[s]: float(rng.normal(scale=spread)) for s in states if s >= edges[-2]},
        weight=rng.normal(scale=spread, size=len(arcs)).tolist(),
        word=word,
        phone=phone,
        begins=begins,
    )


def _connected(rows: list[tuple[int, int]], last: range) -> list[tuple[int, int]]:
    """The arcs on a path from state 0 to one of the last; states are numbered frame by frame."""
    rows = sorted(rows)
    reached = {0}
    for source, target in rows:
        if source in reached:
            reached.add(target)
    leads = set(last)
    for source, target in reversed(rows):
        if target in leads:
            leads.add(source)
    return [(s, t) for s, t in rows if s in reached and t in leads]


@st.composite
def lattices(draw: st.DrawFn, *, frames: int = 6, width: int = 4, pdfs: int = 4) -> Lattice:
    """Random lattices up to these sizes; hypothesis shrinks the sizes."""
    chosen = [draw(st.integers(1, most)) for most in (frames, width, pdfs)]
    density, seed = draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.integers(0, 100_000))
    return random_lattice(
        np.random.default_rng(seed), frames=chosen[0], width=chosen[1], pdfs=chosen[2], density=density
    )


def random_scores(
    rng: np.random.Generator, lattice: Lattice, *, pdfs: int | None = None, spread: float = 3.0
) -> np.ndarray:
    """Scores [T, C] with as many columns as the lattice needs, or more."""
    return rng.normal(scale=spread, size=(lattice.num_frames, pdfs or lattice.num_pdfs))
