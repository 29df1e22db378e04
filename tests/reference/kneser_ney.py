"""Interpolated modified Kneser-Ney by the formulas of Chen and Goodman (1999), counted anew for every probability."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = tuple[str, ...]


def probability(
    text: Sequence[Words], vocabulary: Sequence[str], order: int, word: str, history: Words, *, highest: bool = True
) -> float:
    """p(word | history), where history has order - 1 words, or fewer at the beginning of a sentence."""
    outcomes = [*vocabulary, "</s>"]
    counts = {ngram: count for ngram, count in kept(text, order, highest).items() if ngram[:-1] == history}
    if order == 1:
        lower = 1.0 / len(outcomes)
    else:
        lower = probability(text, vocabulary, order - 1, word, history[1:], highest=False)
    total = sum(counts.values())
    if not total:
        return lower
    d = discounts(kept(text, order, highest))
    gamma = sum(d[min(count, 3)] for count in counts.values()) / total
    count = counts.get((*history, word), 0)
    return (count - (d[min(count, 3)] if count else 0.0)) / total + gamma * lower


def kept(text: Sequence[Words], order: int, highest: bool) -> dict[Words, int]:
    """Counts of the highest order; below, numbers of different words in front, save behind the sentence's beginning."""
    raw = ngrams(text, order)
    if highest:
        return raw
    fronts = {longer[1:]: set() for longer in ngrams(text, order + 1)}
    for longer in ngrams(text, order + 1):
        fronts[longer[1:]].add(longer[0])
    return {ngram: raw[ngram] if ngram[0] == "<s>" else len(fronts[ngram]) for ngram in raw}


def ngrams(text: Sequence[Words], order: int) -> Counter[Words]:
    padded = [("<s>", *sentence, "</s>") for sentence in text]
    found = [s[i : i + order] for s in padded for i in range(len(s) - order + 1)]
    return Counter(ngram for ngram in found if ngram != ("<s>",))


def discounts(counts: dict[Words, int]) -> dict[int, float]:
    n1, n2, n3, n4 = (sum(1 for count in counts.values() if count == k) for k in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        d = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
        if 0 < d[1] <= 1 and 0 < d[2] <= 2 and 0 < d[3] <= 3:
            return d
    return {1: 0.5, 2: 1.0, 3: 1.5}


def perplexity(text: Sequence[Words], vocabulary: Sequence[str], order: int, held_out: Sequence[Words]) -> float:
    logs = []
    for sentence in held_out:
        padded = ("<s>", *sentence, "</s>")
        for i in range(1, len(padded)):
            history = padded[max(0, i - order + 1) : i]
            at_order = len(history) + 1
            p = probability(text, vocabulary, at_order, padded[i], history, highest=at_order == order)
            logs.append(math.log(p))
    return math.exp(-sum(logs) / len(logs))
