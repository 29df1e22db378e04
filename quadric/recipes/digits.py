"""Connected digits spoken by the built-in synthesiser: minutes on two cores, no data needed."""

from __future__ import annotations

from quadric.speech.synthesis import DigitCorpus
from quadric.train.recipe import FirstOrder, HessianFree, Job, Network
from quadric.train.sources import SpokenDigits


def digits(utterances: int = 600, seed: int = 0) -> Job:
    """Connected digits spoken by the built-in synthesiser, in noise.

    Args:
        utterances: of the training set, about three seconds each; a sixth for development, a third for test.
        seed: of the corpus and of everything random.
    """
    corpus = DigitCorpus(utterances=(utterances, max(1, utterances // 6), max(1, utterances // 3)), seed=seed)
    return Job(
        name="digits",
        train=SpokenDigits("train", corpus),
        dev=SpokenDigits("dev", corpus),
        test=SpokenDigits("test", corpus),
        network=Network("tdnn", (256, 256, 256), offsets=((-2, -1, 0, 1, 2), (-3, 0, 3), (-6, 0, 6)), norm="none"),
        adam=FirstOrder(epochs=8, gradient_frames=1000, lr=2e-3),
        hessian_free=HessianFree(epochs=12, gradient_frames=100_000, curvature_frames=10_000, max_steps=30),
        seed=seed,
    )
