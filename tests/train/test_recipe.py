"""Options that cannot work are refused before any work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import nn

from quadric.model.acoustic import SplicedLayer
from quadric.model.recurrent import Unfolded
from quadric.recipes.digits import digits
from quadric.train.method import NGHF
from quadric.train.overrides import override
from quadric.train.recipe import PAPER_NETWORKS, Network


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
        "nghf.damping=-1",
        "nghf.candidates=some",
        "natural_gradient.metric=hessian",
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
        "network.feed_forward=[64]",  # of an RNN or LSTM alone
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
    (made,) = job.first_order.build(nn.ParameterList([nn.Parameter(torch.zeros(2))])).param_groups
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


@pytest.mark.parametrize("name", ["metric", "candidates", "sampling", "preconditioner"])
def test_a_word_that_is_none_of_the_choices_is_refused_with_them(name: str) -> None:
    """By the record itself: the command line reads its types."""
    with pytest.raises(ValueError, match=rf"^{name}=other: must be '\w+' or '\w+'"):
        NGHF(**{name: "other"})  # type: ignore[arg-type]


def test_trying_an_optimiser_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    override(digits(), ["first_order.optimizer=SGD"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_is_judged_when_all_its_options_are_given() -> None:
    job = override(digits(), ["network.sizes=[48,48]", "network.offsets=[[-1,0,1],[0]]"])
    assert job.network.build(3, 4).left_context == 1


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["network.window=[-1,5]"], r"network.window=\[-1,5\].*: window is \(-1, 5\)"),
        (["network.window=[0,0]"], "choose a DNN"),
        (["network.window=[1,2,3]"], "must be a list of 2 whole numbers"),
        (["network.feed_forward=[64,0]"], "feed_forward is"),
        (["network.sizes=[]"], "sizes is"),
        (["network.kind=gru"], "'dnn' or 'tdnn' or 'rnn' or 'lstm'"),
        (["network=paper-rnn", "network.kind=tdnn", "network.offsets=[[0],[0]]"], "has no layers but those of sizes"),
        (["network=lstm"], r"network.kind=value .*network=NAME: paper-dnn, paper-tdnn, paper-rnn, paper-lstm"),
    ],
)
def test_impossible_recurrent_networks_are_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(digits(), ["network.kind=lstm", *assignments])


def test_networks_of_the_paper_have_its_sizes() -> None:
    """Parameters counted by hand, for 80 features (40 for the TDNN) and 6000 states."""

    def dense(*widths: int) -> int:
        return sum(low * high + high for low, high in pairwise(widths))

    def counted(name: str, inputs: int) -> int:
        network = override(digits(), [f"network={name}"]).network
        with torch.device("meta"):
            return sum(p.numel() for p in network.build(inputs, 6000).parameters())

    assert counted("paper-dnn", 80) == dense(9 * 80, *[1000] * 5, 6000)
    assert counted("paper-tdnn", 40) == sum(
        dense(low, 1000) for low in (5 * 40, 2 * 1000, 2 * 1000, 2 * 1000, 1000)
    ) + dense(1000, 6000)
    cell = dense(80 + 1000, 1000) + dense(2000, 1000)
    assert counted("paper-rnn", 80) == cell + dense(1000, 1000, 6000)
    assert counted("paper-lstm", 80) == 4 * cell + dense(1000, 1000, 6000)


def test_a_named_network_is_changed_in_part_by_what_follows() -> None:
    job = override(digits(), ["network=paper-lstm", "network.sizes=[8]", "network.window=[3,1]"])
    assert job.network == Network("lstm", (8,), feed_forward=(1000,), window=(3, 1), norm="none")
    model = job.network.build(3, 4)
    assert (model.left_context, model.right_context) == (3, 1)
    again = override(digits(), ["network.sizes=[8]", "network=paper-rnn", "flat_start.network=paper-dnn"])
    assert again.network == PAPER_NETWORKS["paper-rnn"]
    assert again.flat_start.network == PAPER_NETWORKS["paper-dnn"]
    assert [PAPER_NETWORKS[f"paper-{kind}"].kind for kind in ("dnn", "tdnn", "rnn", "lstm")] == [
        "dnn",
        "tdnn",
        "rnn",
        "lstm",
    ]


@pytest.mark.parametrize("kind", ["dnn", "tdnn", "rnn", "lstm"])
def test_a_network_is_built_with_all_its_options(kind: Literal["dnn", "tdnn", "rnn", "lstm"]) -> None:
    options: dict[str, Any] = {"activation": "sigmoid", "dropout": 0.25, "norm": "layer"}
    options |= {"context": 3} if kind == "dnn" else {"offsets": ((-2, 0), (0, 1))} if kind == "tdnn" else {}
    options |= {"feed_forward": (7,), "window": (4, 2)} if kind in ("rnn", "lstm") else {}
    model = Network(kind, (6, 5), **options).build(3, 4)
    assert (model.left_context, model.right_context) == {"dnn": (3, 3), "tdnn": (2, 1)}.get(kind, (4, 2))
    top = model.hidden[-1]
    assert isinstance(top, SplicedLayer)
    assert (top.activation, top.dropout.p, type(top.norm)) == ("sigmoid", 0.25, nn.LayerNorm)
    assert top.linear.out_features == (7 if kind in ("rnn", "lstm") else 5)
    if isinstance(below := model.hidden[0], Unfolded):
        assert below.dropout.p == 0.25
        assert [layer.recurrent.in_features for layer in below.layers] == [6, 5]
        assert all(getattr(layer, "activation", "sigmoid") == "sigmoid" for layer in below.layers)
