"""How fast statistics are summed over lattices, beside plain kernels and OpenFst.

    python benchmarks/lattice.py [--pdfs 200 800] [--threads 1 2] [--rounds 25] [--processor-time]
        [--device cpu] [--json FILE]

Random lattices of 8 utterances of 500 frames, with 18 states and 54 arcs a frame and pdfs drawn evenly; scores are in
float32, sums in float64. Three works: ``log Z`` alone; posteriors of pdfs, as for MMI; and with them the derivative of
an expected accuracy, as for MPE. The methods, taken in turns:

* quadric, its results written over those of the round before; in new memory; and by logarithms, which it turns to for
  a frame whose scores are spread out a thousandfold
* quadric's product with the Hessian of the expected accuracy
* logarithms in a plain loop over arcs, compiled by numba
* logarithms in PyTorch, the arcs of a frame of all utterances at a time, on ``--device``
* OpenFst's shortest distances in the log semiring, from the start and from the end, where pynini is installed: log Z
  and what posteriors need, without making those, nor the graphs

Each in frames and arcs a second, of the best round. The ratio is to quadric's rate for the same work on as many
threads, or on the fewest. The results of all methods are compared with quadric's. The last lines tell how many bytes a
frame has at the least, every array of an utterance being read or written once, at what rate they pass, and how fast
this machine copies arrays of that size altogether. Where others use the machine, ``--threads 1 --processor-time``
counts the seconds that the work itself had.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from common import Table, now
from quadric.lattice.expectation import Item, PathSums, mean_curvature, path_sums_batch
from quadric.lattice.lattice import Lattice

UTTERANCES, FRAMES, STATES, ARCS = 8, 500, 18, 54
COLUMNS = ["pdfs", "work", "method", "threads", "frames/s", "arcs/s", "ratio", "difference"]


def random_lattice(rng: np.random.Generator, pdfs: int) -> Lattice:
    """Every state is entered and left by an arc at least; the rest of the arcs are drawn evenly."""
    sources, targets, first, before = [], [], 0, 1
    for _ in range(FRAMES):
        source = np.concatenate([np.arange(before), rng.integers(before, size=ARCS - before)])
        target = rng.permutation(np.concatenate([np.arange(STATES), rng.integers(STATES, size=ARCS - STATES)]))
        sources.append(first + np.sort(source))
        targets.append(first + before + target)
        first, before = first + before, STATES
    count = FRAMES * ARCS
    return Lattice(
        source=np.concatenate(sources).astype(np.int32),
        target=np.concatenate(targets).astype(np.int32),
        pdf=rng.integers(pdfs, size=count, dtype=np.int32),
        weight=rng.normal(size=count).astype(np.float32),
        word=np.zeros(count, np.int32),
        phone=np.zeros(count, np.int32),
        begins=np.zeros(count, np.bool_),
        frames=np.arange(0, count + 1, ARCS),
        final=rng.normal(size=STATES),
    )


def random_items(pdfs: int, seed: int = 0) -> list[Item]:
    """Lattices, scores and accuracies between 0 and 1."""
    rng = np.random.default_rng(seed)
    lattices = [random_lattice(rng, pdfs) for _ in range(UTTERANCES)]
    return [
        (lattice, 2 * rng.standard_normal((FRAMES, pdfs), dtype=np.float32), rng.random(lattice.num_arcs))
        for lattice in lattices
    ]


@numba.njit(nogil=True)
def log_add(x: float, y: float) -> float:
    """log(exp(x) + exp(y)) of finite numbers."""
    return max(x, y) + math.log1p(math.exp(-abs(x - y)))


@numba.njit(nogil=True)
def plain_sums(  # type: ignore[no-untyped-def]
    source, target, pdf, weight, frames, final, scores, value, occupancy, derivative
):
    """log Z, the mean, and both derivatives, arc by arc: forward, backward, posteriors."""
    num_states = int(target.max()) + 1
    score = np.empty(len(source))
    alpha, beta = np.full(num_states, -np.inf), np.full(num_states, -np.inf)
    so_far, to_come = np.zeros(num_states), np.zeros(num_states)
    alpha[0], beta[num_states - len(final) :] = 0.0, final
    for t in range(len(scores)):
        for a in range(frames[t], frames[t + 1]):
            score[a] = weight[a] + scores[t, pdf[a]]
            x, s, d = alpha[source[a]] + score[a], source[a], target[a]
            if alpha[d] == -np.inf:
                alpha[d], so_far[d] = x, so_far[s] + value[a]
                continue
            total = log_add(x, alpha[d])
            share = math.exp(x - total)
            so_far[d] = share * (so_far[s] + value[a]) + (1 - share) * so_far[d]
            alpha[d] = total
    for a in range(len(source) - 1, -1, -1):
        x, s, d = beta[target[a]] + score[a], source[a], target[a]
        if beta[s] == -np.inf:
            beta[s], to_come[s] = x, to_come[d] + value[a]
            continue
        total = log_add(x, beta[s])
        share = math.exp(x - total)
        to_come[s] = share * (to_come[d] + value[a]) + (1 - share) * to_come[s]
        beta[s] = total
    log_z, mean = beta[0], to_come[0]
    for t in range(len(scores)):
        occupancy[t], derivative[t] = 0.0, 0.0
        for a in range(frames[t], frames[t + 1]):
            s, d = source[a], target[a]
            gamma = math.exp(alpha[s] + score[a] + beta[d] - log_z)
            occupancy[t, pdf[a]] += gamma
            derivative[t, pdf[a]] += gamma * (so_far[s] + value[a] + to_come[d] - mean)
    return log_z, mean


def plain_batch(items: Sequence[Item], out: Sequence[PathSums], threads: int) -> list[PathSums]:
    """:func:`plain_sums` of every utterance, on threads."""

    def one(n: int) -> PathSums:
        lattice, scores, value = items[n]
        arrays = (lattice.source, lattice.target, lattice.pdf, lattice.weight, lattice.frames, lattice.final)
        occupancy, derivative = out[n].occupancy, out[n].derivative
        log_z, mean = plain_sums(*arrays, scores, value, occupancy, derivative)
        return PathSums(log_z, mean, occupancy, derivative)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(len(items))))


class Levels:
    """The same sums in PyTorch: the arcs of a frame, of all utterances, in one operation.

    The states of a frame are numbered through all utterances; what does not depend on the scores is made before.
    """

    def __init__(self, items: Sequence[Item], device: str) -> None:
        lattices, self.pdfs = [lattice for lattice, _, _ in items], items[0][1].shape[1]

        def of_frame(t: int, field: Callable[[Lattice, slice, int], np.ndarray]) -> Tensor:
            parts = [field(one, slice(one.frames[t], one.frames[t + 1]), n) for n, one in enumerate(lattices)]
            return torch.as_tensor(np.concatenate(parts), device=device)

        def state(which: str, later: int, t: int) -> Callable[[Lattice, slice, int], np.ndarray]:
            size = 1 if t + later == 0 else STATES
            return lambda one, arcs, n: getattr(one, which)[arcs].astype(np.int64) - one.levels[t + later] + n * size

        def cell(t: int) -> Callable[[Lattice, slice, int], np.ndarray]:
            return lambda one, arcs, n: (n * FRAMES + t) * self.pdfs + one.pdf[arcs]

        times = range(FRAMES)
        self.source = [of_frame(t, state("source", 0, t)) for t in times]
        self.target = [of_frame(t, state("target", 1, t)) for t in times]
        weight = torch.cat([of_frame(t, lambda one, arcs, n: one.weight[arcs].astype(np.float64)) for t in times])
        self.cell = torch.cat([of_frame(t, cell(t)) for t in times])
        self.value = [of_frame(t, lambda one, arcs, n: items[n][2][arcs]) for t in times]  # type: ignore[index]
        self.utterance = torch.cat([of_frame(t, lambda one, arcs, n: np.full(ARCS, n)) for t in times])
        self.final = torch.as_tensor(np.concatenate([one.final for one in lattices]), device=device)
        self.weight, self.device = weight, device

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log Z [U], the mean [U], occupancy and derivative [U, T, C] for scores [U, T, C]."""
        score = (self.weight + scores.reshape(-1)[self.cell]).split(UTTERANCES * ARCS)
        alpha, so_far = [scores.new_zeros(UTTERANCES, dtype=torch.float64)], [self.weight.new_zeros(UTTERANCES)]
        for t in range(FRAMES):
            s, d = self.source[t], self.target[t]
            total, share = self._sum(alpha[t][s] + score[t], d, UTTERANCES * STATES)
            alpha.append(total)
            so_far.append(torch.zeros_like(total).index_add_(0, d, share * (so_far[t][s] + self.value[t])))
        beta, to_come = [self.final], [torch.zeros_like(self.final)]
        for t in range(FRAMES - 1, -1, -1):
            s, d = self.source[t], self.target[t]
            total, share = self._sum(beta[-1][d] + score[t], s, len(alpha[t]))
            to_come.append(torch.zeros_like(total).index_add_(0, s, share * (to_come[-1][d] + self.value[t])))
            beta.append(total)
        log_z, mean = beta[-1], to_come[-1]
        beta, to_come = beta[-2::-1], to_come[-2::-1]

        def of_arcs(at_source: list[Tensor], at_target: list[Tensor], own: Sequence[Tensor]) -> Tensor:
            return torch.cat(
                [x[s] + a + y[d] for x, y, a, s, d in zip(at_source, at_target, own, self.source, self.target)]  # noqa: B905
            )

        gamma = (of_arcs(alpha, beta, score) - log_z[self.utterance]).exp()
        above = gamma * (of_arcs(so_far, to_come, self.value) - mean[self.utterance])
        dense = [torch.zeros(scores.numel(), dtype=torch.float64, device=self.device) for _ in range(2)]
        occupancy, derivative = (x.index_add_(0, self.cell, y) for x, y in zip(dense, (gamma, above), strict=True))
        return log_z, mean, occupancy.to(scores.dtype), derivative.to(scores.dtype)

    @staticmethod
    def _sum(x: Tensor, state: Tensor, states: int) -> tuple[Tensor, Tensor]:
        """Of arcs, the log sum in every state, and every arc's share of it."""
        top = x.new_full((states,), -torch.inf).scatter_reduce_(0, state, x, "amax")
        share = (x - top[state]).exp()
        total = torch.zeros_like(top).index_add_(0, state, share)
        return top + total.log(), share / total[state]


def openfst(items: Sequence[Item]) -> Callable[[], list[PathSums]] | None:
    """log Z of every utterance by shortest distances from both ends; None without pynini."""
    try:
        import pynini
    except ImportError:
        return None
    graphs = []
    for lattice, scores, _ in items:
        fst = pynini.Fst(arc_type="log64")
        fst.add_states(lattice.num_states)
        fst.set_start(0)
        costs = -(lattice.weight.astype(np.float64) + scores[lattice.frame, lattice.pdf])
        for source, target, cost in zip(lattice.source.tolist(), lattice.target.tolist(), costs.tolist(), strict=True):
            fst.add_arc(source, pynini.Arc(1, 1, pynini.Weight("log64", cost), target))
        for n, weight in enumerate(lattice.final.tolist()):
            fst.set_final(lattice.num_states - STATES + n, pynini.Weight("log64", -weight))
        graphs.append(fst)

    def run() -> list[PathSums]:
        found = []
        for fst in graphs:
            pynini.shortestdistance(fst)
            log_z = -float(str(pynini.shortestdistance(fst, reverse=True)[0]))
            found.append(PathSums(log_z, 0.0, None, None))
        return found

    return run


def difference(found: Sequence[PathSums], expected: Sequence[PathSums]) -> float:
    """The greatest of any number; of log Z relative to its size."""
    parts = [0.0]
    for one, other in zip(found, expected, strict=True):
        parts.append(abs(one.log_z / other.log_z - 1))
        for x, y in zip(one[2:], other[2:], strict=True):
            if x is not None and y is not None:
                parts.append(float(np.abs(np.subtract(x, y)).max()))
    return max(parts)


@dataclass
class Row:
    """A method at some work: what is timed, the results that it should have, and the seconds of its rounds."""

    work: str
    method: str
    threads: int
    run: Callable[[], Sequence[PathSums]]
    expected: Sequence[PathSums]
    seconds: list[float] = field(default_factory=list)
    difference: float = math.nan


def quadric_rows(items: list[Item], threads: int) -> list[Row]:
    """The library's."""
    expected, room = path_sums_batch(items), path_sums_batch(items)
    without: list[Item] = [(lattice, scores, None) for lattice, scores, _ in items]
    spread = [(lattice, scores.copy(), value) for lattice, scores, value in items]
    for _, scores, _ in spread:
        scores[FRAMES // 2] *= 1000

    def sums(given: Sequence[Item], backward: bool = True, out: Sequence[PathSums] | None = room) -> Any:
        return lambda: path_sums_batch(given, backward=backward, jobs=threads, out=out)

    return [
        Row("log Z", "quadric", threads, sums(without, backward=False), expected),
        Row("MMI", "quadric", threads, sums(without), expected),
        Row("MPE", "quadric", threads, sums(items), expected),
        Row("MPE", "quadric, new memory", threads, sums(items, out=None), expected),
        Row("MPE", "quadric, logarithms", threads, sums(spread), path_sums_batch(spread)),
    ]


def other_rows(items: list[Item], threads: Sequence[int], device: str) -> list[Row]:
    """The product, and the peers."""
    expected, room = path_sums_batch(items), path_sums_batch(items)
    products = [np.empty_like(scores) for _, scores, _ in items]

    def curved() -> list[PathSums]:
        for (lattice, scores, value), product in zip(items, products, strict=True):
            mean_curvature(lattice, scores, value, scores, out=product)  # type: ignore[arg-type]
        return []

    levels = Levels(items, device)
    stacked = torch.as_tensor(np.stack([scores for _, scores, _ in items]), device=device)

    def by_levels() -> list[PathSums]:
        log_z, mean, *dense = levels(stacked)
        occupancy, derivative = (x.view(stacked.shape).cpu().numpy() for x in dense)
        return [PathSums(*x) for x in zip(log_z.tolist(), mean.tolist(), occupancy, derivative, strict=True)]

    plain = [
        Row("MPE", "numba, logarithms", n, lambda n=n: plain_batch(items, room, n), expected)  # type: ignore[misc]
        for n in threads
    ]
    distances = openfst(items)
    return [
        Row("MPE Hessian", "quadric", 1, curved, []),
        *plain,
        Row("MPE", f"PyTorch, logarithms, {device}", 1, by_levels, expected),
        *([Row("log Z", "OpenFst, both directions", 1, distances, expected)] if distances else []),
    ]


def take_times(rows: Sequence[Row], rounds: int, clock: Callable[[], float]) -> None:
    """All methods in turns, after one round that does not count; those that take half a second are run twice."""
    for row in rows:
        found = row.run()
        row.difference = difference(found, row.expected) if found else math.nan
    for _ in range(rounds):
        for row in rows:
            if len(row.seconds) < 2 or max(row.seconds) < 0.5:
                start = clock()
                row.run()
                row.seconds.append(clock() - start)


def copy_rate(size: int) -> float:
    """Bytes a second, of reading and of writing, in copies of an array within ``size`` bytes."""
    one, other = np.ones((2, size // 16))
    times = []
    for _ in range(9):
        start = now()
        np.copyto(other, one)
        times.append(now() - start)
    return 2 * one.nbytes / min(times)


def main() -> None:
    """Prints the tables, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pdfs", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table, frames, notes = Table(COLUMNS, chosen.json), UTTERANCES * FRAMES, []
    fewest = min(chosen.threads)
    for pdfs in chosen.pdfs:
        items = random_items(pdfs)
        rows = [row for n in chosen.threads for row in quadric_rows(items, n)]
        rows += other_rows(items, chosen.threads, chosen.device)
        take_times(rows, chosen.rounds, time.process_time if chosen.processor_time else now)
        ours = {("MPE Hessian", fewest): math.nan} | {
            (row.work, row.threads): min(row.seconds) for row in rows if row.method == "quadric"
        }
        for row in rows:
            best = min(row.seconds)
            found = {
                "pdfs": pdfs, "work": row.work, "method": row.method, "threads": row.threads,
                "frames_per_second": frames / best, "arcs_per_second": frames * ARCS / best,
                "median_frames_per_second": frames / statistics.median(row.seconds),
                "ratio": ours.get((row.work, row.threads), ours.get((row.work, fewest), math.nan)) / best,
                "difference": row.difference,
            }  # fmt: skip
            rates = f"{frames / best:,.0f}", f"{frames * ARCS / best:,.0f}"
            cells = str(pdfs), row.work, row.method, str(row.threads), *rates
            table.add(found, [*cells, f"{found['ratio']:.3f}", f"{row.difference:.0e}"])
        size = ARCS * (4 * 4 + 8) + pdfs * 3 * 4
        whole = size * frames
        rate = whole / ours["MPE", fewest] / 1e9
        notes.append(
            f"{pdfs} pdfs, MPE, threads: {fewest}: {size:,} bytes a frame pass at {rate:.1f} GB/s; "
            f"within {whole / 2**20:.0f} MiB, as all come to, copies go at {copy_rate(whole) / 1e9:.1f} GB/s"
        )
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
