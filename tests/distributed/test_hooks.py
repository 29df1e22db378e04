"""DDP's communication hooks on real ranks, against one process that plays them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quadric.comm.compression import AdaComp, CLTk, bin_lengths
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


def sent_by_all(name: str, size: int) -> list[list[Tensor]]:
    """The mean of what all ranks send of each parameter, in every step, by compressors in this process."""
    model = hooked.network()
    parameters = list(model.parameters())

    def build(p: nn.Parameter) -> AdaComp | CLTk:
        if name.startswith("scalecom"):
            return CLTk(0.1, memory=0.5 if "filtered" in name else 1.0)
        return AdaComp([p.numel()], bin_lengths([p]) if "paper" in name else 20)

    workers = [[build(p) for p in parameters] for _ in range(size)]
    means = []
    for step in range(STEPS):
        given = [hooked.given(model, rank, step) for rank in range(size)]
        mean = [torch.zeros(p.numel(), dtype=torch.float64) for p in parameters]
        for k, place in enumerate(mean):
            chosen = None
            for turn in range(size):
                rank = (step + turn) % size
                compressor, gradient = workers[rank][k], given[rank][k].flatten()
                if isinstance(compressor, CLTk):
                    message = compressor.compress(gradient, chosen)
                    chosen = message.indices
                    message.add_to(place, 1 / size)
                else:
                    compressor.compress(gradient).add_to(place, 1 / size)
        means.append(mean)
    return means


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_hook_leaves_the_mean_of_what_all_send(name: str, size: int, ranks: dict[int, list[Any]]) -> None:
    results = of(ranks, size, "gradients", name, STEPS)
    assert all(result[0] == results[0][0] for result in results)  # to the bit
    for found, expected in zip(results[0][0], sent_by_all(name, size), strict=True):
        near(found, expected)
    assert all(buckets > STEPS for _, _, buckets, _ in results)
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
    assert results[0][2] > STEPS


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
    first, second = of(ranks, 2, "spoils", name)
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert repr(a) == repr(b)
        spoilt = [any(math.isnan(x) for x in layer) for layer in a]
        assert all(spoilt) if step == 1 else not any(spoilt)


def test_misuse_is_named(ranks: dict[int, list[Any]]) -> None:
    for unknown, other in of(ranks, 2, "misused"):
        assert "parameters of shapes [[4]" in unknown and "build the state with all parameters" in unknown
        assert other.startswith("ValueError: state: of 6 parameters, these are 5")
    with pytest.raises(ValueError, match="this process belongs to no job yet"):
        ScaleComState(hooked.network().parameters(), share=0.1)
