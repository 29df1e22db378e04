"""The smallest job that still does everything: a few seconds on one core."""

from __future__ import annotations

TINY = (
    "speeds=[1.0]",
    "flat_start.gaussian.components=[1,1,1,1,1,1,1,1]",
    "flat_start.network.sizes=[64]",
    "flat_start.network.norm=layer",
    "flat_start.warm=4",
    "flat_start.rounds=3",
    "flat_start.lr=3e-3",
    "flat_start.gradient_frames=500",
    "network.sizes=[48,48]",
    "network.offsets=[[-2,-1,0,1,2],[-3,0,3]]",
    "augment=none",
    "first_order.epochs=15",
    "first_order.lr=5e-3",
    "first_order.gradient_frames=400",
    "hessian_free.epochs=8",
    "hessian_free.gradient_frames=3000",
    "hessian_free.curvature_frames=1000",
    "hessian_free.max_steps=8",
    "hessian_free.damping=0.1",
    "decoding.lm_weights=[3,6,60]",
    "decoding.word_penalties=[0]",
    "jobs=1",
)
"""Options of any recipe."""

CLEAN_DIGITS = tuple(
    f"{split}.corpus.{option}"
    for split in ("train", "dev", "test")
    for option in (
        "utterances=[48,12,12]",
        'voices=[["Alex","m1","f1","belinda"],["m4"],["m6"]]',
        "words=[2,4]",
        "snr=[30,40]",
    )
)
"""Options of the recipe ``digits``: clean speech of few voices."""
