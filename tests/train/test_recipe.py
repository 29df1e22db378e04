"""Options that cannot work are refused before any work."""

from __future__ import annotations

import pytest

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
        "adam.epochs=Infinity",
        "adam.lr=-1",
        "adam.warmup=-1",
        "adam.optimizer=LBFGS",
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
        "jobs=0",
        "name=../escape",
    ],
)
def test_impossible_options_are_refused_by_name(assignment: str) -> None:
    option, value = assignment.split("=")
    with pytest.raises(ValueError, match=option.split(".")[-1] + "=") as refused:
        override(digits(), [assignment])
    assert value[0] in str(refused.value)
