from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", reason="needs the lattice extra")

from quadric.lattice.automaton import Automaton
from quadric.loss.full_sum import FullSum, FullSumTarget
from reference.paths import log_z_by_recursion


def chain(pdfs: list[int]) -> Automaton:
    """The pdfs in order, each for one frame or more."""
    half = float(np.log(0.5))
    arcs = [(s, s + step, pdf, half) for s, pdf in enumerate(pdfs) for step in (0, 1)]
    return Automaton.from_arcs(arcs, final={len(pdfs): 0.0})


TARGET = [FullSumTarget(chain([0, 2, 1]), 7), FullSumTarget(chain([3, 0]), 4)]
PRIOR = torch.log_softmax(torch.tensor([0.3, -1.0, 0.2, 1.5], dtype=torch.float64), 0)


def loss_by_recursion(loss: FullSum, output: Tensor, target: list[FullSumTarget]) -> Tensor:
    scores = loss.scale * (torch.log_softmax(output, -1) - loss.prior_scale * loss.log_prior)
    totals = [log_z_by_recursion(u.automaton, x[: len(u)]) for u, x in zip(target, scores, strict=True)]
    return -torch.stack(totals).sum() / loss.scale


@pytest.mark.parametrize(("scale", "prior_scale"), [(1.0, 0.0), (0.3, 0.7), (2.0, 1.0)])
def test_value_and_gradient_are_those_of_the_plain_recursion(scale: float, prior_scale: float) -> None:
    loss = FullSum(PRIOR, scale=scale, prior_scale=prior_scale)
    output = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    value, expected = loss(output, TARGET), loss_by_recursion(loss, output, TARGET)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (wanted,) = (torch.autograd.grad(x, output) for x in (value, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    loss = FullSum(PRIOR, scale=0.6, prior_scale=0.5)
    output = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, TARGET), (output,))


def test_upstream_gradient_and_a_second_backward_are_respected() -> None:
    output = torch.randn(2, 7, 4, requires_grad=True)
    value = FullSum(PRIOR)(output, TARGET)
    (once,) = torch.autograd.grad(value, output, retain_graph=True)
    (thrice,) = torch.autograd.grad(3.0 * value, output)
    torch.testing.assert_close(thrice, 3.0 * once)


def test_padding_has_no_say_and_no_gradient() -> None:
    output = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    changed = output.detach().clone()
    changed[0, 7:], changed[1, 4:] = 50.0, -50.0
    loss = FullSum(PRIOR)
    value = loss(output, TARGET)
    assert value.item() == loss(changed, TARGET).item()
    (gradient,) = torch.autograd.grad(value, output)
    assert not gradient[0, 7:].any() and not gradient[1, 4:].any()
    assert gradient[0, :7].any() and gradient[1, :4].any()


def test_a_single_path_is_cross_entropy() -> None:
    path = Automaton.from_arcs([(0, 1, 2, 0.0), (1, 2, 0, 0.0), (2, 3, 1, 0.0)], final={3: 0.0})
    output = torch.randn(1, 3, 4, dtype=torch.float64)
    wanted = torch.nn.functional.cross_entropy(output[0], torch.tensor([2, 0, 1]), reduction="sum")
    for scale in (0.5, 1.0):
        value = FullSum(PRIOR, scale=scale)(output, [FullSumTarget(path, 3)])
        torch.testing.assert_close(value, wanted)


def test_jobs_change_nothing() -> None:
    output = torch.randn(2, 7, 4)
    assert FullSum(PRIOR, jobs=2)(output, TARGET).item() == FullSum(PRIOR)(output, TARGET).item()


def test_half_precision_output_is_summed_in_single() -> None:
    output = torch.randn(2, 7, 4, dtype=torch.bfloat16, requires_grad=True)
    value = FullSum(PRIOR)(output, TARGET)
    assert value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, output)
    assert gradient.dtype == torch.bfloat16


def test_numerical_failure_gives_nan_not_an_exception() -> None:
    output = torch.zeros(2, 7, 4)
    output[0, 3, 1] = torch.nan
    assert FullSum(PRIOR)(output, TARGET).isnan()


def test_weight_is_the_frames_and_the_prior_is_saved() -> None:
    loss = FullSum(PRIOR)
    assert int(loss.weight(TARGET)) == 11
    assert torch.equal(loss.state_dict()["log_prior"], PRIOR)


def test_its_options_are_told() -> None:
    """By them a training compares its ranks; ``scale`` may follow a schedule."""
    loss = FullSum(PRIOR, scale=0.3, prior_scale=0.7)
    assert repr(loss) == "FullSum(outputs=4, scale=0.3, prior_scale=0.7)"
    loss.scale = 0.5
    assert "scale=0.5, " in repr(loss)


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((2, 7, 5), TARGET, r"output must be \[B, T, 4\]"),
        ((1, 7, 4), TARGET, "target has 2 utterances, output has 1"),
        ((2, 6, 4), TARGET, "an utterance of 7 frames, output only 6"),
    ],
)
def test_misuse_is_explained(shape: tuple[int, ...], target: list[FullSumTarget], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullSum(PRIOR)(torch.zeros(shape), target)


def test_impossible_targets_and_bad_settings_are_refused_early() -> None:
    with pytest.raises(ValueError, match="frames=2 is too short: the words take at least 3"):
        FullSumTarget(chain([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="1 entries not finite: floor the prior"):
        FullSum(torch.tensor([0.0, -torch.inf]))
    with pytest.raises(ValueError, match=r"scale=0\.0"):
        FullSum(PRIOR, scale=0.0)
