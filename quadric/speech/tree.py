"""A phonetic decision tree: which triphone states share an output of the network.

Young, Odell and Woodland, "Tree-based state tying for high accuracy acoustic modelling" (HLT 1994). Each state
of each phone has a tree of its own. Its triphones begin in one leaf, and the leaf whose best question about the
left or the right phone raises the likelihood of the frames the most is split, again and again; a leaf is one
diagonal Gaussian. The questions are not written by hand: they are the clusters of a bottom-up clustering of the
phones, so that any phone set will do.

    statistics = ContextStatistics.accumulate(alignments, features, mono)
    tri = grow(statistics, TreeOptions(leaves=600))
    targets = retie(alignments, mono, tri)
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, Integer

from quadric.progress import Progress, silent
from quadric.speech.cepstra import cepstra as decorrelated
from quadric.speech.topology import STATES, Tying, phone_segments

logger = logging.getLogger(__name__)

_PENDING_ROWS = 1 << 16
_TIE = 1e-9  # nats per frame: gains closer than this differ by rounding alone
_CONSTANT = 1e-10  # a feature whose variance is below this part of its mean square does not vary


@dataclass(frozen=True)
class TreeOptions:
    """How far a tree grows.

    leaves: the most pdfs, those of silence included.
    min_frames: the fewest frames on either side of a split.
    variance_floor: the least variance of a leaf, as a part of the variance of all frames, per dimension.
    cepstra: of the statistics it grows from, see :meth:`ContextStatistics.accumulate`.
    """

    leaves: int = 600
    min_frames: int = 200
    variance_floor: float = 0.01
    cepstra: int | None = 13

    def __post_init__(self) -> None:
        if self.leaves < 1:
            raise ValueError(f"leaves={self.leaves} must be at least 1, and {STATES} for each phone and silence")
        if self.min_frames < 1:
            raise ValueError(f"min_frames={self.min_frames} must be at least 1: no leaf can grow from no frames")
        if not 0.0 < self.variance_floor < 1.0:
            raise ValueError(
                f"variance_floor={self.variance_floor} must be above 0 and below 1: it is a part of the variance "
                "of all frames, often 0.01"
            )
        if self.cepstra is not None and self.cepstra < 1:
            raise ValueError(f"cepstra={self.cepstra} must be at least 1, or None for features that are cepstra")


@dataclass(frozen=True, eq=False)
class ContextStatistics:
    """The frames of every triphone state that was seen, summed: all that a tree needs to grow.

    ``contexts`` holds a row (centre, left, right, state) for each, in ascending order, the phones as indices
    into ``phones``; ``counts``, ``sums`` and ``squares`` are the number of its frames, their sum and the sum of
    their squares, over the dimensions of :func:`quadric.speech.cepstra.cepstra`.
    """

    phones: tuple[str, ...]
    contexts: Int32[np.ndarray, "N 4"]
    counts: Float[np.ndarray, " N"]
    sums: Float[np.ndarray, "N D"]
    squares: Float[np.ndarray, "N D"]

    @property
    def frames(self) -> int:
        return int(self.counts.sum())

    @classmethod
    def accumulate(
        cls,
        alignments: Mapping[str, Integer[np.ndarray, " T"]],
        features: Mapping[str, Float[np.ndarray, "T D"]],
        tying: Tying,
        *,
        cepstra: int | None = 13,
        progress: Progress = silent,
    ) -> ContextStatistics:
        """Reads every aligned utterance once, in the order of the ids.

        ``alignments`` maps an utterance to its pdfs under ``tying`` (monophones or triphones), ``features`` to
        its log-mel energies, normalised for preference; utterances with features alone are left out. ``cepstra``
        coefficients and their slopes are counted; None: the features are decorrelated already, as cepstra with
        their differences are, and are taken as they are. Raises ``ValueError`` where there is nothing to read, or
        where an utterance has no features, features that are not finite, or another number of frames or
        dimensions than expected.
        """
        missing = [id for id in alignments if id not in features]
        if missing:
            raise ValueError(f"features lacks {len(missing)} of the aligned utterances, {missing[0]!r} the first")
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        pending, dim = 0, None
        for id in progress(sorted(alignments), total=len(alignments), what="context statistics"):
            pdfs, energies = np.asarray(alignments[id]), np.asarray(features[id])
            _check_utterance(id, pdfs, energies, dim)
            if not len(pdfs):
                continue
            dim = energies.shape[1]
            key, value = _runs(_contexts(pdfs, tying), decorrelated(energies, cepstra), len(tying.phones))
            keys.append(key)
            values.append(value)
            pending += len(key)
            if pending >= _PENDING_ROWS:
                key, value = _merge(np.concatenate(keys), np.concatenate(values))
                keys, values, pending = [key], [value], 0
        if not keys:
            raise ValueError("alignments holds no frame: a tree grows from aligned utterances")
        key, value = _merge(np.concatenate(keys), np.concatenate(values))
        size = len(tying.phones)
        contexts = np.stack(np.unravel_index(key, (size, size, size, STATES)), axis=1).astype(np.int32)
        width = (value.shape[1] - 1) // 2
        return cls(tying.phones, contexts, value[:, 0], value[:, 1 : 1 + width], value[:, 1 + width :])


def questions(statistics: ContextStatistics, options: TreeOptions) -> Bool[np.ndarray, "Q P"]:
    """Sets of phones to ask about, made from the data; row ``q`` is true at the phones of question ``q``.

    The Gaussians of the phones' middle states, silence included, are merged pair by pair, each time the pair
    that loses the least likelihood (of equals the first). Every cluster on the way is a question, the largest
    steps of the clustering first, and after them every single phone. Phones without frames join no cluster.
    """
    size = len(statistics.phones)
    gaussians = _Gaussians.of(statistics, options)
    middle = statistics.contexts[:, 3] == STATES // 2
    sums = _one_hot(statistics.contexts[middle, 0], size) @ gaussians.values[middle]
    members = np.eye(size, dtype=bool)
    seen = sums[:, 0] > 0
    active = seen.copy()
    clusters: list[np.ndarray] = []
    loss = np.full((size, size), np.inf)
    own = gaussians.log_likelihood(sums)
    for phone in np.flatnonzero(active):
        _set_losses(loss, int(phone), sums, own, active, gaussians)
    for _ in range(int(seen.sum()) - 2):  # the last merge gives the cluster of all: no question
        kept, gone = (int(i) for i in np.unravel_index(loss.argmin(), loss.shape))
        members[kept] |= members[gone]
        sums[kept] += sums[gone]
        own[kept] = gaussians.log_likelihood(sums[kept])
        active[gone] = False
        loss[gone, :] = loss[:, gone] = np.inf
        _set_losses(loss, kept, sums, own, active, gaussians)
        clusters.append(members[kept].copy())
    return np.array([*clusters[::-1], *np.eye(size, dtype=bool)])


def grow(statistics: ContextStatistics, options: TreeOptions) -> Tying:
    """The tied triphones of the greedy tree.

    Splits the leaf with the largest gain until there are ``options.leaves``, or no split of enough frames gains
    anything. The states of silence stay whole, whatever is beside them. Of equal questions the first of
    :func:`questions` is asked, left before right. Triphones that were not seen fall into leaves like any other.
    Pdfs are numbered by phone, then state, then the first context of the leaf; a tree without a split numbers
    as ``monophone`` does. Raises ``ValueError`` if ``options.leaves`` cannot hold one pdf per phone and state.
    """
    size = len(statistics.phones)
    if options.leaves < size * STATES:
        raise ValueError(
            f"leaves={options.leaves} is too few: {size} phones with {STATES} states each need {size * STATES} "
            "before the first split"
        )
    gaussians = _Gaussians.of(statistics, options)
    asked = questions(statistics, options)
    leaves = dict(enumerate(_roots(statistics)))
    heap: list[tuple[float, int, _Split]] = []
    made = len(leaves)

    def consider(number: int) -> None:
        split = _best_split(leaves[number], statistics.contexts, gaussians, asked, options.min_frames)
        if split is not None:
            heapq.heappush(heap, (-split.gain, number, split))

    for number in range(made):
        consider(number)
    total = 0.0
    while heap and len(leaves) < options.leaves:
        _, number, split = heapq.heappop(heap)
        total += split.gain
        for leaf in leaves.pop(number).divide(split, asked, statistics.contexts):
            leaves[made] = leaf
            consider(made)
            made += 1
    logger.info(
        "%d leaves from %d triphone states, %d frames; gain %.3f nats a frame",
        len(leaves), len(statistics.counts), statistics.frames, total / max(statistics.frames, 1),
    )  # fmt: skip
    table = np.empty((size, size, size, STATES), np.int32)
    for pdf, leaf in enumerate(sorted(leaves.values(), key=_Leaf.place)):
        table[leaf.centre, :, :, leaf.state][np.ix_(leaf.left, leaf.right)] = pdf
    return Tying(statistics.phones, 3, table)


def retie(
    alignments: Mapping[str, Integer[np.ndarray, " T"]], mono: Tying, tri: Tying, *, progress: Progress = silent
) -> dict[str, Int32[np.ndarray, " T"]]:
    """The same alignments as pdfs of ``tri``; the context of a phone is the phones beside it in the alignment.

    A silence between two words is their context, as it is in a decoding graph; outside the utterance there is
    silence. ``mono`` is the tying the alignments were made with.
    """
    _check_same_phones(mono, tri)
    targets = {}
    for id in progress(alignments, total=len(alignments), what="tied targets"):
        centre, left, right, state = _contexts(np.asarray(alignments[id]), mono)
        if tri.context == 1:
            left = right = np.zeros_like(centre)
        targets[id] = tri.table[centre, left, right, state]
    return targets


def untie(
    alignments: Mapping[str, Integer[np.ndarray, " T"]], mono: Tying, tri: Tying
) -> dict[str, Int32[np.ndarray, " T"]]:
    """Alignments as pdfs of ``tri``, as pdfs of ``mono``: every pdf is of one phone and one state."""
    _check_same_phones(mono, tri)
    if mono.context != 1:
        raise ValueError(f"mono has context={mono.context}: pass the tying without context, made by monophone()")
    row = mono.table[tri.phone_of_pdf, 0, 0, tri.state_of_pdf]
    return {id: row[np.asarray(pdfs)] for id, pdfs in alignments.items()}


@dataclass(frozen=True, eq=False)
class _Gaussians:
    """Maximum likelihood of sums of frames: rows of ``values`` are (count, sums, squares)."""

    values: Float[np.ndarray, "N K"]
    floor: Float[np.ndarray, " D"]

    @classmethod
    def of(cls, statistics: ContextStatistics, options: TreeOptions) -> _Gaussians:
        frames = statistics.counts.sum()
        mean_square = statistics.squares.sum(0) / frames
        variance = mean_square - (statistics.sums.sum(0) / frames) ** 2
        varies = variance > _CONSTANT * mean_square
        values = np.concatenate(
            [statistics.counts[:, None], statistics.sums[:, varies], statistics.squares[:, varies]], axis=1
        )
        return cls(values, options.variance_floor * variance[varies])

    def log_likelihood(self, values: Float[np.ndarray, "*Q K"]) -> Float[np.ndarray, "*Q"]:
        """The frames under their own Gaussian, the best one with variances no less than the floor."""
        dim = len(self.floor)
        count = values[..., :1]
        some = np.maximum(count, 1.0)
        scatter = values[..., 1 + dim :] / some - (values[..., 1 : 1 + dim] / some) ** 2
        variance = np.maximum(scatter, self.floor)
        return -0.5 * count[..., 0] * (np.log(2.0 * np.pi * variance) + scatter / variance).sum(-1)


@dataclass(frozen=True)
class _Split:
    gain: float
    left: bool  # the question is about the left phone, else about the right one
    question: int


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One state of a phone between any left and any right phone of two sets; ``rows`` index the statistics."""

    centre: int
    state: int
    left: Bool[np.ndarray, " P"]
    right: Bool[np.ndarray, " P"]
    rows: Integer[np.ndarray, " N"]

    def place(self) -> tuple[int, int, int, int]:
        return self.centre, self.state, int(self.left.argmax()), int(self.right.argmax())

    def divide(
        self, split: _Split, asked: Bool[np.ndarray, "Q P"], contexts: Int32[np.ndarray, "N 4"]
    ) -> tuple[_Leaf, _Leaf]:
        """The leaf of the answer yes and the leaf of the answer no."""
        yes = asked[split.question]
        answers = yes[contexts[self.rows, 1 if split.left else 2]]
        parts = []
        for said, mask in ((answers, yes), (~answers, ~yes)):
            left, right = (self.left & mask, self.right) if split.left else (self.left, self.right & mask)
            parts.append(_Leaf(self.centre, self.state, left, right, self.rows[said]))
        return parts[0], parts[1]


def _roots(statistics: ContextStatistics) -> list[_Leaf]:
    everything = np.ones(len(statistics.phones), bool)
    root = statistics.contexts[:, 0] * STATES + statistics.contexts[:, 3]
    order = np.argsort(root, kind="stable")
    edges = np.searchsorted(root[order], np.arange(len(statistics.phones) * STATES + 1))
    return [
        _Leaf(*divmod(number, STATES), everything, everything, order[edges[number] : edges[number + 1]])
        for number in range(len(edges) - 1)
    ]


def _best_split(
    leaf: _Leaf,
    contexts: Int32[np.ndarray, "N 4"],
    gaussians: _Gaussians,
    asked: Bool[np.ndarray, "Q P"],
    min_frames: int,
) -> _Split | None:
    """The question with the largest gain, or none: silence stays whole, and so does what gains nothing."""
    values = gaussians.values[leaf.rows]
    frames = values[:, 0].sum()
    if leaf.centre == 0 or frames < 2 * min_frames:
        return None
    whole = gaussians.log_likelihood(values.sum(0))
    gains = []
    for column in (1, 2):
        by_phone = _one_hot(contexts[leaf.rows, column], asked.shape[1]) @ values
        yes, no = asked.astype(np.float64) @ by_phone, (~asked).astype(np.float64) @ by_phone
        gain = gaussians.log_likelihood(yes) + gaussians.log_likelihood(no) - whole
        gains.append(np.where(np.minimum(yes[:, 0], no[:, 0]) >= min_frames, gain, -np.inf))
    both = np.concatenate(gains)
    tie = _TIE * frames
    if both.max() <= tie:
        return None
    first = int(np.argmax(both >= both.max() - tie))
    return _Split(float(both[first]), first < len(asked), first % len(asked))


def _set_losses(
    loss: Float[np.ndarray, "P P"],
    cluster: int,
    sums: Float[np.ndarray, "P K"],
    own: Float[np.ndarray, " P"],
    active: Bool[np.ndarray, " P"],
    gaussians: _Gaussians,
) -> None:
    """What merging ``cluster`` with each other one would lose, kept above the diagonal."""
    others = np.flatnonzero(active & (np.arange(len(active)) != cluster))
    lost = own[cluster] + own[others] - gaussians.log_likelihood(sums[cluster] + sums[others])
    loss[np.minimum(cluster, others), np.maximum(cluster, others)] = lost


def _one_hot(phones: Integer[np.ndarray, " N"], size: int) -> Float[np.ndarray, "P N"]:
    return (np.arange(size)[:, None] == phones).astype(np.float64)


def _contexts(pdfs: Integer[np.ndarray, " T"], tying: Tying) -> Int32[np.ndarray, "4 T"]:
    """(centre, left, right, state) of every frame."""
    segments = np.array(phone_segments(pdfs, tying), np.int32).reshape(-1, 3)
    silence = np.zeros(1, np.int32)
    beside = np.concatenate([silence, segments[:, 0], silence])
    windows = np.stack([beside[1:-1], beside[:-2], beside[2:]])
    frames = np.repeat(windows, segments[:, 2] - segments[:, 1], axis=1)
    return np.concatenate([frames, tying.state_of_pdf[pdfs.astype(np.int64)][None]])


def _runs(
    contexts: Int32[np.ndarray, "4 T"], frames: Float[np.ndarray, "T D"], size: int
) -> tuple[Int64[np.ndarray, " N"], Float[np.ndarray, "N K"]]:
    """The sums over each run of frames of one triphone state, with its number."""
    key = np.ravel_multi_index(tuple(contexts.astype(np.int64)), (size, size, size, STATES))
    return _sum_runs(key, np.concatenate([np.ones((len(frames), 1)), frames, frames**2], axis=1))


def _merge(
    key: Int64[np.ndarray, " N"], value: Float[np.ndarray, "N K"]
) -> tuple[Int64[np.ndarray, " M"], Float[np.ndarray, "M K"]]:
    """The sums over equal keys, the keys ascending."""
    order = np.argsort(key, kind="stable")
    return _sum_runs(key[order], value[order])


def _sum_runs(
    key: Int64[np.ndarray, " N"], value: Float[np.ndarray, "N K"]
) -> tuple[Int64[np.ndarray, " M"], Float[np.ndarray, "M K"]]:
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    return key[starts], np.add.reduceat(value, starts, axis=0)


def _check_utterance(id: str, pdfs: np.ndarray, features: np.ndarray, dim: int | None) -> None:
    if features.ndim != 2 or len(features) != len(pdfs):
        raise ValueError(
            f"features[{id!r}] has shape {features.shape}, its alignment {len(pdfs)} frames: align these features"
        )
    if dim is not None and features.shape[1] != dim:
        raise ValueError(f"features[{id!r}] has {features.shape[1]} dimensions, those before it had {dim}")
    if not np.isfinite(features).all():
        raise ValueError(f"features[{id!r}] holds values that are not finite: extract them again or leave it out")


def _check_same_phones(mono: Tying, tri: Tying) -> None:
    if mono.phones != tri.phones:
        raise ValueError(
            f"tri has {len(tri.phones)} phones, mono {len(mono.phones)}, and they are not the same in order: grow "
            "the tree from alignments made with mono"
        )
