"""Options that cannot work are refused before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quadric.recipes.digits import digits
from quadric.train.overrides import override


@pytest.mark.parametrize(
    "assignment",
    [
        "decoding.beam=-1",
        "decoding.lm_weights=[]",
        "decoding.word_penalties=[]",
        "decoding.sweep_utterances=0",
        "hessian_free.max_steps=0",
        "hessian_free.damping=-1",
        "hessian_free.momentum=2",
        "hessian_free.curvature_frames=-5",
        "first_order.epochs=Infinity",
        "first_order.lr=-1",
        "first_order.warmup=-1",
        "first_order.weight_decay=-1",
        "first_order.optimizer=SparseAdam",  # steps from sparse gradients only
        "first_order.optimizer=Muon",  # matrices only
        'first_order.arguments={"momentum":0.9}',  # AdamW has none
        'first_order.arguments={"betas":[0.9,1.5]}',
        'first_order.arguments={"betas":0.9}',
        'first_order.arguments={"lr":0.1}',
        "first_order.arguments=[1]",
        "flat_start.warm=0",
        "flat_start.rounds=-1",
        "flat_start.scale=[0,0]",
        "flat_start.prior_scale=NaN",
        "flat_start.lr=-1",
        "lm_order=0",
        "speeds=[1.1]",
        "speeds=[]",
        "speeds=[1.0,1.0]",
        "chunk=0",
        "chunk=10001",
        "network.sizes=[48,48]",
        "network.sizes=[]",
        "network.offsets=[[0],[0],[1],[0],[0]]",
        "network.dropout=1",
        "network.context=-1",
        "flat_start.network.sizes=[0]",
        "jobs=0",
        "name=../escape",
    ],
)
def test_impossible_options_are_refused_by_name(assignment: str) -> None:
    option, value = assignment.split("=")
    with pytest.raises(ValueError, match=option.split(".")[-1] + "=") as refused:
        override(digits(), [assignment])
    assert value[0] in str(refused.value)


@pytest.mark.parametrize(
    ("assignments", "group"),
    [
        ((), {"lr": 2e-3, "weight_decay": 0.01, "betas": (0.9, 0.999)}),
        (("optimizer=SGD", 'arguments={"momentum": 0.9, "nesterov": true}'), {"momentum": 0.9, "weight_decay": 0.0}),
        (("optimizer=SGD", "weight_decay=0.5"), {"momentum": 0.0, "weight_decay": 0.5}),
        (("optimizer=Adam", 'arguments={"betas": [0.8, 0.99]}'), {"betas": (0.8, 0.99), "weight_decay": 0}),
        (("optimizer=LBFGS", "lr=0.5", 'arguments={"max_iter": 4}'), {"lr": 0.5, "max_iter": 4}),
    ],
)
def test_any_optimiser_of_torch_is_made_as_the_command_line_says(
    assignments: tuple[str, ...], group: dict[str, object]
) -> None:
    job = override(digits(), [f"first_order.{assignment}" for assignment in assignments])
    assert job.first_order is not None
    (made,) = job.first_order.build([nn.Parameter(torch.zeros(2))]).param_groups
    made["betas"] = tuple(made.get("betas", ()))
    assert {key: made[key] for key in group} == group


def test_a_weight_decay_that_the_optimiser_lacks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optimizer=LBFGS: cannot train with lr=0\.002, weight_decay=0\.1, .*: change"
    ):
        override(digits(), ["first_order.optimizer=LBFGS", "first_order.weight_decay=0.1"])


def test_a_training_has_the_name_of_its_optimiser() -> None:
    assert list(digits().methods) == ["adamw", "hessian_free"]
    assert list(override(digits(), ["first_order.optimizer=SGD", "hessian_free=none"]).methods) == ["sgd"]


def test_trying_an_optimiser_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    override(digits(), ["first_order.optimizer=SGD"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_is_judged_when_all_its_options_are_given() -> None:
    job = override(digits(), ["network.sizes=[48,48]", "network.offsets=[[-1,0,1],[0]]"])
    assert job.network.build(3, 4).left_context == 1
