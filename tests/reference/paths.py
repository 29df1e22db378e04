"""Every path of an automaton, one by one: the twin of the recursions in quadric.lattice.semiring."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from quadric.lattice.automaton import Automaton


def paths(automaton: Automaton, frames: int) -> Iterator[tuple[int, ...]]:
    """All sequences of ``frames`` arcs from the start to a final state."""

    def extend(state: int, arcs: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(arcs) == frames:
            if automaton.final[state] > -np.inf:
                yield arcs
            return
        for arc in np.flatnonzero(automaton.source == state):
            yield from extend(int(automaton.target[arc]), (*arcs, int(arc)))

    yield from extend(automaton.start, ())


def path_score(automaton: Automaton, arcs: tuple[int, ...], scores: np.ndarray) -> float:
    """The log score of one path, its final weight included."""
    end = int(automaton.target[arcs[-1]]) if arcs else automaton.start
    emitted = sum(automaton.weight[arc] + scores[t, automaton.pdf[arc]] for t, arc in enumerate(arcs))
    return float(emitted + automaton.final[end])


def enumerate_paths(automaton: Automaton, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """``log Z`` and posteriors [T, C] by listing the paths; exponential in the number of frames."""
    listed = list(paths(automaton, len(scores)))
    totals = np.array([path_score(automaton, arcs, scores) for arcs in listed])
    posteriors = np.zeros(scores.shape)
    if not np.any(totals > -np.inf):
        return -np.inf, posteriors
    log_z = float(np.logaddexp.reduce(totals))
    for arcs, total in zip(listed, totals, strict=True):
        for t, arc in enumerate(arcs):
            posteriors[t, automaton.pdf[arc]] += np.exp(total - log_z)
    return log_z, posteriors


def log_z_by_recursion(automaton: Automaton, scores: torch.Tensor) -> torch.Tensor:
    """``log Z`` as a plain forward recursion that autograd differentiates."""
    source, target, pdf = (torch.as_tensor(x).long() for x in (automaton.source, automaton.target, automaton.pdf))
    weight = torch.as_tensor(automaton.weight, dtype=scores.dtype)
    log_final = torch.as_tensor(automaton.final, dtype=scores.dtype)
    alpha = {automaton.start: scores.new_zeros(())}
    for t in range(len(scores)):
        into: dict[int, list[torch.Tensor]] = {}
        for a in range(automaton.num_arcs):
            if int(source[a]) in alpha:
                into.setdefault(int(target[a]), []).append(alpha[int(source[a])] + weight[a] + scores[t, pdf[a]])
        alpha = {state: torch.logsumexp(torch.stack(terms), 0) for state, terms in into.items()}
    ends = [alpha[s] + log_final[s] for s in alpha if log_final[s] > -torch.inf]
    return torch.logsumexp(torch.stack(ends), 0) if ends else scores.new_full((), -torch.inf)
