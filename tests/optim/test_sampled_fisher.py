"""Statistics of gradients at targets drawn from the model: a second pass, after which nothing else has changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import draw, padded_classes
from quadric.loss.loss import CrossEntropy, SquaredError
from quadric.objective.objective import Objective
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.tnt import tnt


def problem() -> tuple[nn.Sequential, Objective]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4))
    data = [(draw(3, 6, 3, seed=s).float(), padded_classes(6, 4, [6, 5, 2])) for s in (0, 1)]
    return model, Objective(model, CrossEntropy(), data)


def statistics(optimiser: BlockDiagonal) -> list[Tensor]:
    return [x for state in optimiser.state.values() for name, x in state.items() if name.startswith("statistics")]


def test_statistics_are_of_the_drawn_targets_and_the_step_of_the_true_ones() -> None:
    model, objective = problem()
    objective()
    true = [p.grad.clone() for p in model.parameters()]
    expected = []
    for number in (0, 1):
        objective.sampled(number)
        expected.append(model[0].weight.grad @ model[0].weight.grad.T / 3)
    optimiser = tnt(model, lr=0.0, fisher="sampled", schedule=Schedule(statistics=2))
    for _ in range(2):  # the second shows that no statistics are due
        optimiser.step(objective)
        torch.testing.assert_close(optimiser.state[model[0].weight]["statistics_0_0"][0], expected[0])
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), true, strict=True))
    optimiser.step(objective)
    torch.testing.assert_close(optimiser.state[model[0].weight]["statistics_0_0"][0], (expected[0] + expected[1]) / 2)
    momentum = optimiser.state[model[0].weight]["momentum"]
    torch.testing.assert_close(momentum, (1 + 0.9 + 0.81) * true[0])


def test_a_pass_before_the_first_step_draws_as_well() -> None:
    model, objective = problem()
    optimiser = tnt(model, lr=0.0, fisher="sampled")
    optimiser.observe(objective)
    before = [x.clone() for x in statistics(optimiser)]
    objective.sampled(0)
    torch.testing.assert_close(before[0][0], model[0].weight.grad @ model[0].weight.grad.T / 3)
    optimiser.step(objective)
    assert not torch.equal(before[0], statistics(optimiser)[0])


def test_an_empirical_pass_takes_a_closure() -> None:
    model, objective = problem()
    optimiser = tnt(model)
    optimiser.observe(objective)
    torch.testing.assert_close(statistics(optimiser)[0][0], model[0].weight.grad @ model[0].weight.grad.T / 3)


@pytest.mark.parametrize("closure", [None, lambda: torch.zeros(())])
def test_what_draws_no_targets_is_refused(closure: Any) -> None:
    model, _ = problem()
    optimiser = tnt(model, fisher="sampled")
    for call in (optimiser.step, optimiser.observe):
        with pytest.raises(ValueError, match="fisher='sampled' wants: give a quadric Objective"):
            call(closure)


def test_another_fisher_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="fisher='true': give 'empirical' or 'sampled'"):
        tnt(nn.Linear(2, 2), fisher="true")  # type: ignore[arg-type]


def test_resume_and_a_copy_draw_the_same_targets() -> None:
    model, objective = problem()
    optimiser = tnt(model, lr=1e-2, fisher="sampled", schedule=Schedule(inverses=2))
    for _ in range(3):
        optimiser.step(objective)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimiser.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twins = [copy.deepcopy((model, optimiser, objective))]
    second, its_objective = problem()
    second.load_state_dict(weights)
    resumed = tnt(second, fisher="sampled", schedule=Schedule(inverses=2))
    resumed.load_state_dict(state)
    twins.append((second, resumed, its_objective))
    values = [float(optimiser.step(objective)) for _ in range(3)]
    for other, its_optimiser, own in twins:
        assert [float(its_optimiser.step(own)) for _ in range(3)] == values
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))


class Infinite(SquaredError):
    """Its model draws targets that no gradient is finite at."""

    def sample(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full_like(output, torch.inf)


def test_drawn_gradients_that_are_not_finite_skip_the_step() -> None:
    model = nn.Linear(3, 2)
    objective = Objective(model, Infinite(), [(draw(4, 3).float(), draw(4, 2).float())])
    optimiser = tnt(model, fisher="sampled", schedule=Schedule(statistics=2))
    before = model.weight.clone()
    for _ in range(9):
        optimiser.step(objective)
    assert torch.equal(model.weight, before) and model.weight.grad.isfinite().all()
    assert optimiser.param_groups[0]["skipped"] == optimiser.param_groups[0]["skipped_in_a_row"] == 9
    assert not statistics(optimiser)
    good = Objective(model, SquaredError(), [(draw(4, 3).float(), draw(4, 2).float())])
    for call in (optimiser.observe, optimiser.step):
        with pytest.raises(FloatingPointError, match="in 10 steps in a row"):
            optimiser.step(objective)
        call(good)
        assert optimiser.param_groups[0]["skipped_in_a_row"] == 0
        optimiser.param_groups[0]["skipped_in_a_row"] = 9
