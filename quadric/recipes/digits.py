"""Connected digits spoken by the built-in synthesiser: minutes on two cores, no data needed."""

from __future__ import annotations

from quadric.data.augment import SpecAugment
from quadric.speech.gaussian import GaussianBootstrap
from quadric.speech.synthesis import DigitCorpus
from quadric.train.method import FirstOrder, HessianFree
from quadric.train.recipe import Decoding, FlatStart, Job, Network
from quadric.train.sources import SpokenDigits


def digits(utterances: int = 600, seed: int = 0) -> Job:
    """Connected digits spoken by the built-in synthesiser, in noise.

    Args:
        utterances: of the training set, about three seconds each; a sixth for development, a third for test.
        seed: of the corpus and of everything random.
    """
    if utterances < 1:
        raise ValueError(f"utterances={utterances}: the training set needs at least one")
    corpus = DigitCorpus(
        utterances=(utterances, max(1, utterances // 6), max(1, utterances // 3)), snr=(0.0, 15.0), seed=seed
    )
    return Job(
        name="digits",
        train=SpokenDigits("train", corpus),
        dev=SpokenDigits("dev", corpus),
        test=SpokenDigits("test", corpus),
        speeds=(0.9, 1.0, 1.1),
        flat_start=FlatStart(gaussian=GaussianBootstrap(components=(1,) * 8), rounds=3),
        network=Network(
            "tdnn", (256,) * 3, offsets=((-2, -1, 0, 1, 2), (-3, 0, 3), (-6, 0, 6)), dropout=0.1, norm="none"
        ),
        augment=SpecAugment(),
        first_order=FirstOrder(epochs=4, lr=2e-3),
        hessian_free=HessianFree(epochs=2, gradient_frames=40_000, curvature_frames=8_000, damping=0.3, max_steps=10),
        decoding=Decoding(lm_weights=(3.0, 5.0, 8.0, 12.0), word_penalties=(-1.0, 0.0, 1.0)),
        seed=seed,
    )
