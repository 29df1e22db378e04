"""First alignments from nothing but features and words: Viterbi training of Gaussian mixtures.

Every utterance is first cut evenly into the states of its words, after leading and trailing frames of low energy
are set aside as silence. Then the mixture of each pdf is estimated on its frames and all utterances are aligned
anew, again and again, with more components in later rounds. L. R. Rabiner, J. G. Wilpon, B.-H. Juang, "A segmental
k-means training procedure for connected word recognition", AT&T Technical Journal 65(3), 1986.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, Int32

from quadric.progress import Progress, silent
from quadric.speech.alignment import Aligner, Alignments, ForcedAlignment, min_frames
from quadric.speech.cepstra import cepstra
from quadric.speech.ctm import spread
from quadric.speech.lexicon import Lexicon
from quadric.speech.topology import Segment, Tying

logger = logging.getLogger(__name__)

_SPLIT = 0.3  # standard deviations that the two halves of a component are moved apart
_INNER = 2  # EM steps on a mixture between two alignments
_MARGIN = 5  # frames of low energy left at both ends of the speech


@dataclass(frozen=True)
class GaussianBootstrap:
    """How the mixtures are trained.

    Attributes:
        components: components a pdf has in each round; may double from one round to the next.
        cepstra: cepstral coefficients, the zeroth included; first and second differences are added. None: the features
            are decorrelated already, as cepstra with their differences are; they are taken as they are, the first
            dimension for the energy.
        least_frames: a pdf with fewer frames for each component keeps the broad distribution of all frames.
        variance_floor: smallest variance, as a share of the variance of all frames.
    """

    components: tuple[int, ...] = (1,) * 12
    cepstra: int | None = 13
    least_frames: int = 5
    variance_floor: float = 0.05

    def __post_init__(self) -> None:
        pairs = zip((1, *self.components), self.components, strict=False)
        if not self.components or any(after not in (before, 2 * before) for before, after in pairs):
            raise ValueError(f"components={self.components} must begin with 1 or 2 and stay or double in each round")
        too_few = self.cepstra is not None and self.cepstra < 1
        if too_few or self.least_frames < 1 or self.variance_floor <= 0.0:
            raise ValueError(
                f"cepstra={self.cepstra}, least_frames={self.least_frames} and variance_floor={self.variance_floor} "
                "must be positive"
            )


def bootstrap(
    features: Mapping[str, Float32[np.ndarray, "T D"]],
    transcripts: Mapping[str, Sequence[str]],
    lexicon: Lexicon,
    tying: Tying,
    *,
    options: GaussianBootstrap | None = None,
    alignment: ForcedAlignment | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Alignments:
    """Alignments of features with their words, starting from nothing: log filter banks, unless ``options`` say cepstra.

    Utterances without features are left out. Raises ``ValueError`` as :class:`Aligner` does, and when no utterance
    is long enough for its words.
    """
    options = options or GaussianBootstrap()
    known = {id: words for id, words in transcripts.items() if id in features}
    with Aligner(known, lexicon, tying, options=alignment, jobs=jobs) as aligner:
        targets = {
            id: row
            for id in known
            if (row := uniform_start(features[id], known[id], lexicon, tying, cepstra=options.cepstra is None))
            is not None
        }
        if not targets:
            raise ValueError("transcripts and features have no utterance in common that is long enough for its words")
        observed = _observed(features, known, options)
        mixtures = _Mixtures.broad(tying.num_pdfs, next(iter(observed.values())).shape[1])
        result, too_short = Alignments({}), None
        for number, components in enumerate(options.components, start=1):
            mixtures = mixtures.refit(observed, targets, components, options)
            ids = [id for id in known if id in targets or too_short is None]
            what = f"alignment {number} of {len(options.components)}"
            result = aligner(_scored(mixtures, observed, ids), progress=progress, total=len(ids), what=what)
            too_short = result.too_short if too_short is None else too_short
            logger.info("%s: %.3f a frame", what, result.score / max(result.frames, 1))
            targets |= result.pdfs
    return replace(result, too_short=too_short or ())


def uniform_start(
    features: Float32[np.ndarray, "T D"],
    words: Sequence[str],
    lexicon: Lexicon,
    tying: Tying,
    *,
    cepstra: bool = False,
) -> Int32[np.ndarray, " T"] | None:
    """The words' shortest pronunciations spread evenly over the frames between leading and trailing silence.

    Silence has little energy: the mean of the log filter banks, or the first of the cepstra. ``None`` if the utterance
    is too short for its words.
    """
    frames, needed = len(features), max(min_frames(words, lexicon), 1)
    if frames < needed:
        return None
    start, end = _speech(features[:, 0] if cepstra else features.mean(1))
    if end - start < needed:
        start, end = 0, frames
    index = {phone: number for number, phone in enumerate(tying.phones)}
    phones = [index[phone] for word in words for phone in min(lexicon.pronunciations(word), key=len)]
    edges = [start + (end - start) * k // max(len(phones), 1) for k in range(len(phones) + 1)]
    segments = [Segment(p, a, b) for p, a, b in zip(phones, edges[:-1], edges[1:], strict=True)]
    if not segments:
        return spread([Segment(0, 0, frames)], tying)
    around = [Segment(0, 0, start), *segments, Segment(0, end, frames)]
    return spread([segment for segment in around if segment.end > segment.start], tying)


def _speech(energy: Float[np.ndarray, " T"]) -> tuple[int, int]:
    """The first frame of speech and the first behind it, by the smoothed energy."""
    padded = np.pad(energy, _MARGIN, mode="edge")
    smooth = np.convolve(padded, np.full(2 * _MARGIN + 1, 1.0 / (2 * _MARGIN + 1)), mode="valid")
    low, high = np.percentile(smooth, (5, 97))
    loud = np.flatnonzero(smooth >= low + 0.35 * (high - low))
    return max(0, int(loud[0]) - _MARGIN), min(len(energy), int(loud[-1]) + 1 + _MARGIN)


def _observed(
    features: Mapping[str, np.ndarray], ids: Mapping[str, object], options: GaussianBootstrap
) -> dict[str, Float32[np.ndarray, "T D"]]:
    """Cepstra with differences, each dimension of mean 0 and variance 1.

    The normalisation is over each utterance: levels and noise differ between the utterances of a speaker, and while
    the mixtures are broad such differences would pass for those between phones and silence.
    """
    bins = features[next(iter(ids))].shape[1]
    if options.cepstra is not None and options.cepstra > bins:
        raise ValueError(f"cepstra={options.cepstra} exceeds the {bins} filter banks of the features")
    return {id: _standardised(cepstra(features[id], options.cepstra, order=2, window=2)) for id in ids}


def _standardised(x: Float64[np.ndarray, "T D"]) -> Float32[np.ndarray, "T D"]:
    if len(x):
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-3)
    return x.astype(np.float32)


@dataclass(frozen=True)
class _Mixtures:
    """A mixture of Gaussians with diagonal covariance for each pdf: C pdfs, M components, D dimensions."""

    log_weight: Float64[np.ndarray, "C M"]
    mean: Float64[np.ndarray, "C M D"]
    variance: Float64[np.ndarray, "C M D"]

    @classmethod
    def broad(cls, pdfs: int, dimensions: int) -> _Mixtures:
        """The distribution of all frames, which are normalised."""
        shape = (pdfs, 1, dimensions)
        return cls(np.zeros((pdfs, 1)), np.zeros(shape), np.ones(shape))

    def split(self) -> _Mixtures:
        """Each component as two, a little apart."""
        shift = _SPLIT * np.sqrt(self.variance)
        return _Mixtures(
            np.tile(self.log_weight - math.log(2.0), (1, 2)),
            np.concatenate([self.mean + shift, self.mean - shift], 1),
            np.tile(self.variance, (1, 2, 1)),
        )

    def log_densities(self, x: Float[np.ndarray, "N D"], pdfs: slice = slice(None)) -> Float64[np.ndarray, "N C M"]:
        """log(weight density) of each component."""
        mean, precision = self.mean[pdfs], 1.0 / self.variance[pdfs]
        log_norm = -0.5 * (np.log(2.0 * math.pi * self.variance[pdfs]) + mean**2 * precision).sum(-1)
        rows, x = (-1, x.shape[1]), x.astype(np.float64)
        products = x @ (mean * precision).reshape(rows).T - 0.5 * np.square(x) @ precision.reshape(rows).T
        return products.reshape(len(x), *log_norm.shape) + (self.log_weight[pdfs] + log_norm)

    def log_likelihoods(self, x: Float[np.ndarray, "T D"]) -> Float32[np.ndarray, "T C"]:
        return np.logaddexp.reduce(self.log_densities(x), axis=-1).astype(np.float32)

    def refit(
        self,
        observed: Mapping[str, Float32[np.ndarray, "T D"]],
        targets: Mapping[str, Int32[np.ndarray, " T"]],
        components: int,
        options: GaussianBootstrap,
    ) -> _Mixtures:
        """The mixtures of the frames that ``targets`` gives to each pdf, with ``components`` components."""
        start = self.split() if components > self.mean.shape[1] else self
        x = np.concatenate([observed[id] for id in targets])
        labels = np.concatenate(list(targets.values()))
        order = np.argsort(labels, kind="stable")
        edges = np.searchsorted(labels[order], np.arange(len(self.mean) + 1))
        fitted = _Mixtures(start.log_weight.copy(), start.mean.copy(), start.variance.copy())
        for pdf, (first, last) in enumerate(itertools.pairwise(edges)):
            if last - first >= options.least_frames * components:
                fitted._fit(pdf, x[order[first:last]].astype(np.float64), options.variance_floor)
        return fitted

    def _fit(self, pdf: int, x: Float64[np.ndarray, "N D"], variance_floor: float) -> None:
        one = slice(pdf, pdf + 1)
        components = self.mean.shape[1]
        for _ in range(1 if components == 1 else _INNER):
            joint = self.log_densities(x, one)[:, 0]
            shares = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
            counts = shares.sum(0) + 1e-3
            mean = shares.T @ x / counts[:, None]
            self.mean[pdf] = mean
            self.variance[pdf] = np.maximum(shares.T @ np.square(x) / counts[:, None] - mean**2, variance_floor)
            self.log_weight[pdf] = np.log(counts / counts.sum())


def _scored(
    mixtures: _Mixtures, observed: Mapping[str, np.ndarray], ids: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    for id in ids:
        yield id, mixtures.log_likelihoods(observed[id])
