"""Features as a network wants them: normalised over speaker or utterance, with their differences in time.

Both are mappings over another mapping, computed when an utterance is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64

from quadric.progress import Progress, silent
from quadric.speech.corpus import Corpus
from quadric.speech.tables import few

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalisation:
    """Subtracts the mean over time and, with ``variance``, divides by the standard deviation.

    ``over`` names whose frames count together. Statistics of fewer than ``least_frames`` frames are completed to that
    many by the average frame of the corpus, so that a speaker with one short utterance is not wiped out.
    """

    over: Literal["speaker", "utterance", "none"] = "speaker"
    variance: bool = True
    least_frames: int = 100

    def __post_init__(self) -> None:
        if self.over not in ("speaker", "utterance", "none"):
            raise ValueError(f'Normalisation: over={self.over!r} must be "speaker", "utterance" or "none"')
        if self.least_frames < 0:
            raise ValueError(f"Normalisation: least_frames={self.least_frames} must not be negative")


class _Mapped(Mapping[str, np.ndarray]):
    """``ids`` of ``features``, each changed by ``change(id, features)`` when it is asked for."""

    def __init__(
        self, features: Mapping[str, np.ndarray], ids: Iterable[str], change: Callable[[str, np.ndarray], np.ndarray]
    ) -> None:
        self._features, self._ids, self._change = features, dict.fromkeys(ids), change

    def __getitem__(self, id: str) -> Float32[np.ndarray, "T D"]:
        if id not in self._ids:
            raise KeyError(id)
        return self._change(id, self._features[id])

    def __contains__(self, id: object) -> bool:
        return id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def normalise(
    features: Mapping[str, np.ndarray],
    corpus: Corpus,
    normalisation: Normalisation,
    *,
    progress: Progress = silent,
) -> Mapping[str, np.ndarray]:
    """The features of the utterances of ``corpus``, normalised when they are read; statistics are taken here, once.

    Utterances of the corpus that have no features are left out with a warning. Dimensions that do not vary become 0.

    Raises:
        ValueError: no utterance has features, their dimensions differ, or values are not finite.
    """
    ids = [utterance.id for utterance in corpus if utterance.id in features]
    if not ids:
        raise ValueError(f"no utterance of {corpus.name} has features: check that the ids are the same")
    if len(ids) < len(corpus):
        lost = [utterance.id for utterance in corpus if utterance.id not in features]
        logger.warning("%s: utterances without features: %s", corpus.name, few(lost))
    if normalisation.over == "none":
        return _Mapped(features, ids, _unchanged)
    by_speaker = normalisation.over == "speaker"
    groups = {id: corpus.by_id[id].speaker if by_speaker else id for id in ids}
    moments = _moments(features, groups, progress)
    whole = np.sum(list(moments.values()), axis=0)
    scales = {group: _shift_and_scale(sums, whole, normalisation) for group, sums in moments.items()}
    return _Mapped(features, ids, partial(_normalised, groups, scales))


def _moments(
    features: Mapping[str, np.ndarray], groups: Mapping[str, str], progress: Progress
) -> dict[str, Float64[np.ndarray, "3 D"]]:
    """Per group the number of frames, their sum and the sum of their squares."""
    moments: dict[str, np.ndarray] = {}
    for id, group in progress(groups.items(), total=len(groups), what="statistics"):
        x = features[id].astype(np.float64)
        sums = np.stack([np.full(x.shape[1], float(len(x))), x.sum(0), (x * x).sum(0)])
        if not np.isfinite(sums).all():
            raise ValueError(f"the features of {id} hold values that are not finite: correct or remove them")
        known = moments.setdefault(group, np.zeros_like(sums))
        if known.shape != sums.shape or next(iter(moments.values())).shape != sums.shape:
            dimension = next(iter(moments.values())).shape[1]
            raise ValueError(f"the features of {id} have dimension {x.shape[1]}, others {dimension}: extract all alike")
        known += sums
    return moments


def _shift_and_scale(
    sums: np.ndarray, whole: np.ndarray, normalisation: Normalisation
) -> tuple[np.ndarray, np.ndarray]:
    count, total = sums[0, 0], whole[0, 0]
    if count < normalisation.least_frames and total > 0:
        sums = sums + (normalisation.least_frames - count) / total * whole
    if sums[0, 0] == 0:
        return np.zeros(sums.shape[1]), np.ones(sums.shape[1])
    mean = sums[1] / sums[0]
    if not normalisation.variance:
        return mean, np.ones_like(mean)
    variance = sums[2] / sums[0] - mean**2
    return mean, 1.0 / np.sqrt(np.maximum(variance, 1e-6))


def _unchanged(id: str, x: np.ndarray) -> np.ndarray:
    return x


def _normalised(
    groups: Mapping[str, str], scales: Mapping[str, tuple[np.ndarray, np.ndarray]], id: str, x: np.ndarray
) -> np.ndarray:
    mean, scale = scales[groups[id]]
    return ((x - mean) * scale).astype(np.float32)


def deltas(x: Float[np.ndarray, "T D"], order: int = 2, window: int = 2) -> Float[np.ndarray, "T D_all"]:
    """``x`` followed by its differences in time up to ``order``, as Kaldi's ``add-deltas``; D_all = D (order + 1).

    The first difference is the slope of the regression line through 2 ``window`` + 1 frames; the kernel of the next
    one is convolved with that slope again. Frames outside are the first and the last one repeated.

    >>> deltas(np.arange(6, dtype=np.float32)[:, None], order=1)[2:4].tolist()
    [[2.0, 1.0], [3.0, 1.0]]
    """
    if order < 0 or window < 1:
        raise ValueError(f"order={order} must not be negative, and window={window} at least 1")
    if len(x) == 0:
        return np.zeros((0, x.shape[1] * (order + 1)), np.result_type(x, np.float32))
    slope = np.arange(-window, window + 1) / sum(n * n for n in range(-window, window + 1))
    kernel, parts = np.ones(1), [x]
    for _ in range(order):
        kernel = np.convolve(kernel, slope)
        reach = len(kernel) // 2
        padded = np.pad(x.astype(np.float64), ((reach, reach), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=0)
        parts.append((windows @ kernel).astype(np.result_type(x, np.float32)))
    return np.concatenate(parts, axis=1)


def add_deltas(features: Mapping[str, np.ndarray], order: int = 2, window: int = 2) -> Mapping[str, np.ndarray]:
    """``features`` with their ``deltas``, computed when they are read."""
    deltas(np.zeros((1, 1), np.float32), order, window)  # complains about the arguments now, not at the first read
    return _Mapped(features, features, partial(_with_deltas, order, window))


def _with_deltas(order: int, window: int, id: str, x: np.ndarray) -> np.ndarray:
    return deltas(x, order, window)
