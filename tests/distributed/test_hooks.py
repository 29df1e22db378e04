"""DDP's communication hooks on real ranks, against one process that plays them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quadric.comm.compression import AdaComp, bin_lengths
from quadric.comm.hooks import ScaleComState
from reference import hooked
from reference.ranks import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
STEPS, UPDATES = 5, 60
NAMES = ["adacomp", "adacomp, the paper's bins", "scalecom", "scalecom, filtered"]
TWO: list[tuple[str, tuple[Any, ...]]] = [
    *(("gradients", (name, STEPS)) for name in [*NAMES, *hooked.COMBINED]),
    *(("trains", (name, UPDATES)) for name in (None, "adacomp", "scalecom")),
    *(("goes_on", (name,)) for name in ("adacomp", "scalecom")),
    *(("spoils", (name,)) for name in ("adacomp", "scalecom", "adasum")),
    ("misused", ()),
]
JOBS = {2: TWO, 3: TWO[: len(NAMES) + len(hooked.COMBINED)]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By their number, what all ranks leave of all jobs: processes that know DDP take seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    results = {size: run(folder, size, hooked.everything, jobs) for size, jobs in JOBS.items()}
    for result in (r for found in results.values() for r in found):
        if isinstance(result, Exception):
            raise result
    return results


def of(ranks: dict[int, list[Any]], size: int, *job: Any) -> list[Any]:
    return [result[job] for result in ranks[size]]


def tensors(found: Any) -> list[Tensor]:
    return [torch.tensor(numbers, dtype=torch.float64) for numbers in found]


def near(found: Any, expected: list[Tensor], atol: float = 1e-6) -> None:
    for a, b in zip(tensors(found), expected, strict=True):
        torch.testing.assert_close(a, b.double().flatten(), rtol=0, atol=atol)


def sent_by_all(name: str, size: int, buckets: list[list[list[int]]]) -> list[list[Tensor]]:
    """The mean of what all ranks send of each parameter, in every step, by what they have not sent yet.

    Memories are of parameters; the leader of a step chooses among all entries of a bucket.
    """
    model = hooked.network()
    parameters = list(model.parameters())
    bins = bin_lengths(parameters) if "paper" in name else [20] * len(parameters)
    workers = [[AdaComp([p.numel()], bin) for p, bin in zip(parameters, bins, strict=True)] for _ in range(size)]
    memories = [[torch.zeros(p.numel()) for p in parameters] for _ in range(size)]
    means = []
    for step in range(STEPS):
        given = [[g.flatten() for g in hooked.given(model, rank, step)] for rank in range(size)]
        if name.startswith("scalecom"):
            chosen = choose(memories[step % size], given[step % size], buckets[step])
            sent = [[(m + g) * c for m, g, c in zip(memories[r], given[r], chosen, strict=True)] for r in range(size)]
            b = 0.5 if "filtered" in name else 1.0
            for rank in range(size):
                rows = zip(memories[rank], given[rank], sent[rank], strict=True)
                memories[rank] = [(1 - b) * m + b * (m + g - s) for m, g, s in rows]
        else:
            sent = [[c.compress(g).dense() for c, g in zip(workers[r], given[r], strict=True)] for r in range(size)]
        means.append([sum(layer) / size for layer in zip(*sent, strict=True)])
    return means


def choose(memory: list[Tensor], gradient: list[Tensor], buckets: list[list[int]]) -> list[Tensor]:
    """Of every parameter, a one for each entry that is sent: a tenth of a bucket."""
    chosen = [torch.zeros_like(m) for m in memory]
    for bucket in buckets:
        entries = [(k, i, abs(float(memory[k][i] + gradient[k][i]))) for k in bucket for i in range(len(memory[k]))]
        entries.sort(key=lambda entry: -entry[2])
        for k, i, _ in entries[: max(1, round(0.1 * len(entries)))]:
            chosen[k][i] = 1
    return chosen


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_hook_leaves_the_mean_of_what_all_send(name: str, size: int, ranks: dict[int, list[Any]]) -> None:
    results = of(ranks, size, "gradients", name, STEPS)
    assert all(result[0] == results[0][0] for result in results)  # to the bit
    buckets = results[0][2]
    for found, expected in zip(results[0][0], sent_by_all(name, size, buckets), strict=True):
        near(found, expected)
    assert all(len(step) > 1 for step in buckets[1:]) and buckets[0] != buckets[1]  # DDP divides them anew
    plain = STEPS * 4 * sum(p.numel() for p in hooked.network().parameters())
    assert all(0 < sent < plain / 2 for _, _, _, sent in results)
    if name != "scalecom, filtered":  # which forgets
        model = hooked.network()
        everything = [hooked.given(model, rank, step) for rank in range(size) for step in range(STEPS)]
        total = [torch.stack(layer).double().sum(0) / size for layer in zip(*everything, strict=True)]
        sent = [sum(layer) for layer in zip(*(tensors(step) for step in results[0][0]), strict=True)]
        left = [sum(layer) / size for layer in zip(*(tensors(result[1]) for result in results), strict=True)]
        near([(a + b).tolist() for a, b in zip(sent, left, strict=True)], total)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", hooked.COMBINED)
def test_gradients_of_ranks_are_combined_layer_by_layer(name: str, size: int, ranks: dict[int, list[Any]]) -> None:
    results = of(ranks, size, "gradients", name, STEPS)
    assert all(result[0] == results[0][0] for result in results)
    model = hooked.network()
    for step, found in enumerate(results[0][0]):
        given = [[g.flatten().double() for g in hooked.given(model, rank, step)] for rank in range(size)]
        near(found, [hooked.COMBINED[name](layer) for layer in zip(*given, strict=True)])


@pytest.mark.parametrize("name", ["adacomp", "scalecom"])
def test_trainings_end_about_where_the_plain_mean_ends(name: str, ranks: dict[int, list[Any]]) -> None:
    start = hooked.held_out(hooked.network())
    (plain, bits), *_ = of(ranks, 2, "trains", None, UPDATES)
    first, second = of(ranks, 2, "trains", name, UPDATES)
    assert first == second and first[1] != bits
    assert plain < 0.6 * start
    assert start - first[0] > 0.85 * (start - plain)


@pytest.mark.parametrize("name", ["adacomp", "scalecom"])
def test_a_state_goes_on_to_the_bit(name: str, ranks: dict[int, list[Any]]) -> None:
    assert of(ranks, 2, "goes_on", name) == [True, True]


@pytest.mark.parametrize("name", ["adacomp", "scalecom", "adasum"])
def test_a_gradient_that_is_not_finite_reaches_all_and_is_over_in_the_next_step(
    name: str, ranks: dict[int, list[Any]]
) -> None:
    (first, kept), (second, also_kept) = of(ranks, 2, "spoils", name)
    assert all(kept + also_kept), "a residue has changed by a step that cannot count"
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert repr(a) == repr(b)
        spoilt = [any(math.isnan(x) for x in layer) for layer in a]
        assert any(spoilt) if step in (1, 2) else not any(spoilt)


def test_misuse_is_named(ranks: dict[int, list[Any]]) -> None:
    for unknown, other in of(ranks, 2, "misused"):
        assert "parameters of shapes [[4]" in unknown and "build the state with all parameters" in unknown
        assert other.startswith("ValueError: state: of 6 parameters, these are 5")
    with pytest.raises(ValueError, match="this process belongs to no job yet"):
        ScaleComState(hooked.network().parameters(), share=0.1)
