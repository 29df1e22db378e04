"""State tying frame by frame and split by split: the twin of quadric.speech.tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from quadric.speech.topology import STATES, Tying
from quadric.speech.tree import TreeOptions


class Frame(NamedTuple):
    centre: int
    left: int
    right: int
    state: int
    vector: np.ndarray


def cepstra(features: np.ndarray) -> np.ndarray:
    """Each coefficient as a sum over bins, each slope as a difference of neighbours."""
    frames, bins = features.shape
    kept = min(13, bins)
    static = np.zeros((frames, kept))
    for t in range(frames):
        for k in range(kept):
            scale = math.sqrt((1 if k == 0 else 2) / bins)
            static[t, k] = scale * sum(
                float(features[t, b]) * math.cos(math.pi * k * (b + 0.5) / bins) for b in range(bins)
            )
    slopes = [(static[min(t + 1, frames - 1)] - static[max(t - 1, 0)]) / 2 for t in range(frames)]
    return np.concatenate([static, np.array(slopes)], axis=1)


def labelled_frames(
    alignments: Mapping[str, np.ndarray], features: Mapping[str, np.ndarray], mono: Tying
) -> list[Frame]:
    """Walks along every utterance, noting the phones as they begin."""
    frames = []
    for id in sorted(alignments):
        pdfs = [int(pdf) for pdf in alignments[id]]
        phones: list[int] = []
        position = []
        for t, pdf in enumerate(pdfs):
            phone, state = pdf // STATES, pdf % STATES
            if t == 0 or phone != pdfs[t - 1] // STATES or state < pdfs[t - 1] % STATES:
                phones.append(phone)
            position.append(len(phones) - 1)
        around = [0, *phones, 0]
        for t, vector in enumerate(cepstra(features[id])):
            i = position[t]
            frames.append(Frame(phones[i], around[i], around[i + 2], pdfs[t] % STATES, vector))
    return frames


def log_likelihood(vectors: list[np.ndarray], floor: np.ndarray) -> float:
    """The sum of the log density of every vector under the Gaussian fitted to them all."""
    if not vectors:
        return 0.0
    stacked = np.array(vectors)
    mean, variance = stacked.mean(0), np.maximum(stacked.var(0), floor)
    return float(sum(np.sum(-0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)) for x in stacked))


def variance_floor(frames: list[Frame], options: TreeOptions) -> np.ndarray:
    return options.variance_floor * np.array([frame.vector for frame in frames]).var(0)


def tied_log_likelihood(frames: list[Frame], tying: Tying, floor: np.ndarray) -> float:
    """The frames under one Gaussian for each pdf."""
    by_pdf: dict[int, list[np.ndarray]] = {}
    for f in frames:
        by_pdf.setdefault(int(tying.table[f.centre, f.left, f.right, f.state]), []).append(f.vector)
    return sum(log_likelihood(vectors, floor) for vectors in by_pdf.values())


def question_sets(frames: list[Frame], phones: int, floor: np.ndarray) -> list[frozenset[int]]:
    """Merges the two clusters that lose least, comparing all pairs anew each time."""
    vectors = {p: [f.vector for f in frames if f.centre == p and f.state == 1] for p in range(phones)}
    clusters = [frozenset([p]) for p in range(phones) if vectors[p]]
    merged: list[frozenset[int]] = []

    def score(cluster: frozenset[int]) -> float:
        return log_likelihood([x for p in sorted(cluster) for x in vectors[p]], floor)

    while len(clusters) > 2:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[i + 1 :]]
        a, b = min(pairs, key=lambda pair: score(pair[0]) + score(pair[1]) - score(pair[0] | pair[1]))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
        merged.append(a | b)
    return merged[::-1] + [frozenset([p]) for p in range(phones)]


def grow(frames: list[Frame], phones: int, options: TreeOptions) -> np.ndarray:
    """The table [P, P, P, STATES] after trying every split of every leaf at every step."""
    floor = variance_floor(frames, options)
    asked = question_sets(frames, phones, floor)
    everything = [(left, right) for left in range(phones) for right in range(phones)]
    leaves = [(c, s, everything) for c in range(phones) for s in range(STATES)]
    while len(leaves) < options.leaves:
        best = None
        for leaf in leaves:
            split = _best(leaf, frames, asked, floor, options.min_frames)
            if split is not None and (best is None or split[0] > best[0]):
                best = (*split, leaf)
        if best is None:
            break
        _, yes, no, leaf = best
        leaves.remove(leaf)
        leaves += [(leaf[0], leaf[1], yes), (leaf[0], leaf[1], no)]
    table = np.full((phones, phones, phones, STATES), -1)
    for pdf, (centre, state, contexts) in enumerate(sorted(leaves, key=lambda leaf: (leaf[0], leaf[1], min(leaf[2])))):
        for left, right in contexts:
            table[centre, left, right, state] = pdf
    return table


def _best(leaf, frames, asked, floor, min_frames):  # type: ignore[no-untyped-def]
    centre, state, contexts = leaf
    if centre == 0:
        return None
    here = [f for f in frames if (f.centre, f.state) == (centre, state) and (f.left, f.right) in contexts]
    whole = log_likelihood([f.vector for f in here], floor)
    tie = 1e-9 * len(here)
    splits = []
    for side in (0, 1):
        for question in asked:
            yes = [f.vector for f in here if (f.left, f.right)[side] in question]
            no = [f.vector for f in here if (f.left, f.right)[side] not in question]
            if min(len(yes), len(no)) >= min_frames:
                gain = log_likelihood(yes, floor) + log_likelihood(no, floor) - whole
                answered = [c for c in contexts if c[side] in question]
                splits.append((gain, answered, [c for c in contexts if c[side] not in question]))
    largest = max((gain for gain, _, _ in splits), default=0.0)
    return next((s for s in splits if s[0] >= largest - tie), None) if largest > tie else None
