"""Queues in closed form, one queue by plain loops, and training along an order of shards' events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def repairman(n: int, compute: float, service: float) -> tuple[float, float]:
    """M/M/1//N: pushes a second, and how many are at the shard on average, where both times are exponential.

    p_k ~ n! / (n - k)! (service / compute)^k of k at the shard.
    """
    weights = [math.perm(n, k) * (service / compute) ** k for k in range(n + 1)]
    p = np.array(weights) / sum(weights)
    return (1 - p[0]) / service, float(p @ np.arange(n + 1))


def mean_values(n: int, think: float, demands: Sequence[float]) -> float:
    """Cycles a second of n in a closed network of queues (exact mean value analysis; Reiser and Lavenberg, 1980).

    ``think`` seconds are spent alone, ``demands`` at queues one after the other: shared processors with any times, or
    lines with exponential ones.
    """
    lengths, rate = [0.0] * len(demands), 0.0
    for k in range(1, n + 1):
        waits = [d * (1 + q) for d, q in zip(demands, lengths, strict=True)]
        rate = k / (think + sum(waits))
        lengths = [rate * w for w in waits]
    return rate


def one_line(
    n: int, pushes: int, compute: Callable[[int], float], service: float, latency: float
) -> list[tuple[int, int, float]]:
    """Worker, staleness and time of each application by one shard; every worker has a core, links take no time."""
    arrivals = [compute(worker) + latency for worker in range(n)]
    pulled, free, found = [0] * n, 0.0, []
    for clock in range(pushes):
        worker = min(range(n), key=lambda w: arrivals[w])
        free = max(free, arrivals[worker]) + service
        found.append((worker, clock - pulled[worker], free))
        pulled[worker] = clock + 1
        arrivals[worker] = free + latency + compute(worker) + latency
    return found


def in_shards(
    theta: np.ndarray,
    slices: Sequence[slice],
    events: Sequence[tuple[int, int]],
    gradient: Callable[[np.ndarray, int], np.ndarray],
    lr: float,
) -> np.ndarray:
    """SGD by events (shard, worker), each shard with its own order; a worker goes on when it has been to all."""
    start, theta, units = theta, theta.copy(), 0
    has: dict[int, np.ndarray] = {}
    under_way: dict[int, tuple[np.ndarray, np.ndarray, set[int]]] = {}
    for shard, worker in events:
        if worker not in under_way:
            under_way[worker] = gradient(has.get(worker, start), units), np.empty_like(theta), set()
            units += 1
        g, back, seen = under_way[worker]
        part = slices[shard]
        theta[part] -= lr * g[part]
        back[part] = theta[part]
        seen.add(shard)
        if len(seen) == len(slices):
            has[worker] = back
            del under_way[worker]
    return theta
