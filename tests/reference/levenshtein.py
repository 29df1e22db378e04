"""The edit distance by its definition: try all three ways to begin, keep the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions that turn one into the other."""
    said, heard = tuple(reference), tuple(hypothesis)

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(said) or j == len(heard):
            return (len(said) - i) + (len(heard) - j)
        return min(rest(i + 1, j) + 1, rest(i, j + 1) + 1, rest(i + 1, j + 1) + (said[i] != heard[j]))

    return rest(0, 0)
