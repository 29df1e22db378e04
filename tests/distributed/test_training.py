from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quadric.comm.communicator import Solo
from quadric.data.batch import Batch
from reference import training
from reference.ranks import Killed, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def vector(found: bytes, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.frombuffer(bytearray(found), dtype=dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_does(size: int, tmp_path: Path) -> None:
    values, parameters = training.train()
    results = run(tmp_path, size, training.train)
    assert all(result == results[0] for result in results)  # to the bit
    assert results[0][0] == pytest.approx(values, rel=1e-6)
    assert values[-1] < 0.6 * values[0]
    torch.testing.assert_close(
        vector(results[0][1], torch.float32), vector(parameters, torch.float32), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_and_one_differ_by_rounding_alone(size: int, tmp_path: Path) -> None:
    """Ten frames are one item or two, which leaves ranks without a share."""
    runs = [
        {"method": "hessian_free", "steps": 3},
        {"method": "L-BFGS", "steps": 3},
        {"method": "hessian_free", "steps": 2, "frames": 10},
    ]
    runs = [{**run, "dtype": torch.float64} for run in runs]
    results = run(tmp_path, size, training.trainings, *runs)
    assert all(result == results[0] for result in results)
    for found, expected in zip(results[0], training.trainings(Solo(), *runs), strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-11)
        torch.testing.assert_close(vector(found[1]), vector(expected[1]), rtol=0, atol=1e-11)


def test_ranks_stay_the_same_to_the_bit_when_each_draws_its_own(tmp_path: Path) -> None:
    """Dropout, and for the Fisher matrix targets, are other random numbers on each rank."""
    runs = [{"method": method, "steps": 2, "dropout": 0.3} for method in training.METHODS]
    results = run(tmp_path, 3, training.trainings, *runs)
    assert all(result == results[0] for result in results)


def test_one_sum_per_gradient_and_per_product(tmp_path: Path) -> None:
    for size, gradient, products in run(tmp_path, 2, training.counts):
        assert (gradient, products) == (size + 8 + 40, 3 * size)  # with the value, then five numbers of the noise


@pytest.mark.parametrize(
    ("shares", "anchor"), [((2, 3, 1), ()), ((0, 6, 0), ()), ((6, 0, 0), ()), ((0, 1, 5), ()), ((0, 2, 4), (0.3,))]
)
def test_all_an_objective_says_is_of_the_joint_data(
    shares: tuple[int, ...], anchor: tuple[float, ...], tmp_path: Path
) -> None:
    """An anchor is no data: it counts once."""
    batches = training.speech().draw(330)
    assert len(batches) == 6
    split = [batches[sum(shares[:r]) : sum(shares[: r + 1])] for r in range(3)]
    small = [[], [batches[1]], [batches[4]]]
    expected = training.everything(Solo(), [batches], [[batches[1], batches[4]]], 0.0, anchor)
    results = run(tmp_path, 3, training.everything, split, small, 0.0, 3 * anchor)
    for value, again, gradient, closed, grads, product in results:
        assert (gradient, product) == (results[0][2], results[0][5])
        assert value == again == results[0][0] == pytest.approx(expected[0], rel=1e-13)
        assert closed == results[0][3] == pytest.approx(expected[3], rel=1e-13)
        torch.testing.assert_close(vector(gradient), vector(expected[2]), rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(vector(product), vector(expected[5]), rtol=1e-11, atol=1e-15)
        assert [g is None for g in grads] == [g is None for g in expected[4]]
        held = int(not anchor)  # without an anchor, "idle" has none
        assert all(g is None for g in grads[:held]) and not any(g is None for g in grads[held:])
        for own, first, joint in zip(grads[held:], results[0][4][held:], expected[4][held:], strict=True):
            assert torch.equal(own, first)
            torch.testing.assert_close(own, joint, rtol=1e-11, atol=1e-15)


def test_each_rank_drops_out_units_of_its_own(tmp_path: Path) -> None:
    """Two ranks with the same data would otherwise see the same network."""
    batches = training.speech().draw(60)[:1]
    alone = training.everything(Solo(), [batches], [batches], 0.5)
    both = run(tmp_path, 2, training.everything, [batches, batches], [batches, batches], 0.5)
    assert both[0][0] == both[1][0] != pytest.approx(alone[0], rel=1e-6)


def test_a_rank_killed_within_a_product_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    results = run(tmp_path, 3, training.dies_within_a_product)
    assert results[1] is Killed
    for rank in (0, 2):
        message, same_parameters, same_state = results[rank]
        assert message.startswith(f"a sum on rank {rank} of 3 failed: another rank died")
        assert same_parameters and same_state


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([{}, {"width": 17}, {}], r"ranks 0 and 2 have '1\.weight \[16, 8\].*rank 1 has '1\.weight \[17, 8\]"),
        ([{}, {}, {"seed": 4}], r"ranks 0 and 1 have .*bits [0-9a-f]{16}', rank 2 has .*bits [0-9a-f]{16}'"),
    ],
    ids=["shapes", "values"],
)
def test_ranks_with_other_models_are_refused(kinds: list[dict[str, int]], message: str, tmp_path: Path) -> None:
    batches = list(training.speech().draw(60))
    for result in run(tmp_path, 3, training.builds, kinds, batches):
        with pytest.raises(ValueError, match=f"the ranks disagree on the model: {message}"):
            raise result


def test_ranks_with_other_anchors_are_refused(tmp_path: Path) -> None:
    batches = list(training.speech().draw(60))
    for result in run(tmp_path, 2, training.everything, [batches] * 2, [batches] * 2, 0.0, (0.3, 0.4)):
        with pytest.raises(ValueError, match=r"disagree on the model: .*anchor of weight 0\.3.*anchor of weight 0\.4"):
            raise result


def test_no_frame_anywhere_is_an_error_everywhere(tmp_path: Path) -> None:
    nothing: list[Any] = [Batch(torch.zeros(1, 2, 8), torch.full((1, 2), -1), 0)]
    for result in run(tmp_path, 2, training.builds, [{}, {}], nothing):
        with pytest.raises(ValueError, match=r"gradient holds 1 micro-batches and no frame .*nor has any other rank"):
            raise result
