"""Normalisation over speakers and utterances, and differences in time."""

from __future__ import annotations

import numpy as np
import pytest

from quadric.speech.corpus import Corpus, Utterance
from quadric.speech.normalisation import Normalisation, add_deltas, deltas, normalise


def talk(frames: dict[str, list[int]], seed: int = 0) -> tuple[Corpus, dict[str, np.ndarray]]:
    """Speakers with utterances of so many frames, each speaker at another level."""
    rng = np.random.default_rng(seed)
    utterances, features = [], {}
    for level, (speaker, lengths) in enumerate(frames.items()):
        for i, length in enumerate(lengths):
            utterances.append(Utterance(f"{speaker}-{i}", speaker, ()))
            features[f"{speaker}-{i}"] = rng.normal(10.0 * level, 1 + level, (length, 4)).astype(np.float32)
    return Corpus("talk", tuple(utterances)), features


@pytest.mark.parametrize("over", ["speaker", "utterance"])
@pytest.mark.parametrize("variance", [True, False])
def test_normalised_groups_have_mean_zero_and_variance_one(over: str, variance: bool) -> None:
    corpus, features = talk({"a": [150, 200], "b": [120, 300]})
    normal = normalise(features, corpus, Normalisation(over, variance))  # type: ignore[arg-type]
    groups = [["a-0", "a-1"], ["b-0", "b-1"]] if over == "speaker" else [[id] for id in features]
    for group in groups:
        x = np.concatenate([normal[id] for id in group])
        raw = np.concatenate([features[id] for id in group]).astype(np.float64)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-6)
        np.testing.assert_allclose(x.std(0), 1.0 if variance else raw.std(0), rtol=1e-5)


def test_sums_are_exact_far_from_zero() -> None:
    corpus, features = talk({"a": [1000]})
    features = {id: (x + 3000).astype(np.float32) for id, x in features.items()}
    x = features["a-0"].astype(np.float64)
    expected = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(normalise(features, corpus, Normalisation())["a-0"], expected, atol=1e-5)


def test_a_short_speaker_is_completed_by_the_corpus() -> None:
    corpus, features = talk({"a": [500], "b": [1]})
    every = np.concatenate(list(features.values())).astype(np.float64)
    normal = normalise(features, corpus, Normalisation())
    mean = 0.01 * features["b-0"][0] + 0.99 * every.mean(0)
    square = 0.01 * features["b-0"][0].astype(np.float64) ** 2 + 0.99 * (every**2).mean(0)
    np.testing.assert_allclose(normal["b-0"][0], (features["b-0"][0] - mean) / np.sqrt(square - mean**2), rtol=1e-4)
    assert np.abs(normal["b-0"]).min() > 0.5  # not wiped out
    assert not normalise(features, corpus, Normalisation(least_frames=0))["b-0"].any()


def test_constant_dimensions_become_zero() -> None:
    corpus, features = talk({"a": [200]})
    features["a-0"][:, 2] = -15.942385
    x = normalise(features, corpus, Normalisation())["a-0"]
    np.testing.assert_allclose(x[:, 2], 0.0, atol=1e-4)
    assert np.isfinite(x).all()


def test_normalising_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    corpus, features = talk({"a": [150, 200], "b": [120]})
    unchanged = normalise(features, corpus, Normalisation("none"))
    np.testing.assert_array_equal(unchanged["a-1"], features["a-1"])
    del features["a-1"]
    normal = normalise({**features, "other": features["a-0"]}, corpus, Normalisation())
    assert list(normal) == ["a-0", "b-0"] and len(normal) == 2 and "other" not in normal
    assert "utterances without features: 1 (a-1)" in caplog.text
    with pytest.raises(KeyError):
        normal["other"]
    with pytest.raises(ValueError, match="no utterance of talk has features"):
        normalise({}, corpus, Normalisation())
    with pytest.raises(ValueError, match="features of b-0 hold values that are not finite"):
        normalise({**features, "b-0": np.full((3, 4), np.nan)}, corpus, Normalisation())
    with pytest.raises(ValueError, match="b-0 have dimension 3, others 4"):
        normalise({**features, "b-0": np.ones((3, 3))}, corpus, Normalisation())
    with pytest.raises(ValueError, match="over='file'"):
        Normalisation("file")  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_differences_are_their_definition(window: int, length: int) -> None:
    x = np.random.default_rng(4).normal(size=(length, 3)).astype(np.float32)
    norm = 2 * sum(n * n for n in range(1, window + 1))

    def slope(y: dict[int, np.ndarray], t: int) -> np.ndarray:
        return np.asarray(sum(n * (y[t + n] - y[t - n]) for n in range(1, window + 1)) / norm)

    far = range(-4 * window, length + 4 * window)
    zeroth = {t: x[min(max(t, 0), length - 1)].astype(np.float64) for t in far}
    first = {t: slope(zeroth, t) for t in far[window:-window]}
    expected = [np.concatenate([zeroth[t], first[t], slope(first, t)]) for t in range(length)]
    np.testing.assert_allclose(deltas(x, 2, window), expected, atol=1e-6)


def test_differences_over_a_mapping() -> None:
    _, features = talk({"a": [150, 0]})
    wide = add_deltas(features, 2)
    assert wide["a-0"].shape == (150, 12) and wide["a-1"].shape == (0, 12) and wide["a-0"].dtype == np.float32
    np.testing.assert_array_equal(wide["a-0"][:, :4], features["a-0"])
    for wrong in ({"order": -1}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            add_deltas(features, **wrong)
