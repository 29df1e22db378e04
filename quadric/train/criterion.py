"""The options of sequence training: the criterion, what the reference competes with, and the trainings to compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from quadric.lattice.generate import LatticeOptions
from quadric.loss.sequence import MMI, MPE, SMBR
from quadric.loss.sequence_loss import Options, SequenceLoss
from quadric.loss.sequence_target import OutputCurvature
from quadric.speech.backends import Backend
from quadric.train.method import NGHF, FirstOrder, HessianFree, Method, NaturalGradient
from quadric.train.rules import NONE_OR_POSITIVE, NOT_NEGATIVE, POSITIVE, SHARE, check, one_of

Kind = Literal["mmi", "mpe", "smbr"]
Accuracy = Literal["approximate", "exact", "frame"]
Matrix = Literal["same_frame", "printed", "surrogate", "lattice"]
Over = Literal["frame", "utterance"]
Missing = Literal["add", "skip"]


@dataclass(frozen=True)
class Criterion:
    """What is trained for.

    Attributes:
        kind: ``"mmi"`` the posterior of the reference, ``"mpe"`` the expected accuracy of phones, ``"smbr"`` that of
            states.
        scale: kappa, of the acoustic scores; None: that of decoding, one over the language-model weight.
        sharpness: times all scores of a path, acoustic and of the language model, after ``scale``: probabilities of
            paths are raised to this power. Where the network is unsure, most of the criterion is about paths that
            decoding would never choose, and grows by being surer rather than by being right; above 1 the likeliest
            paths count for more, and the criterion comes nearer to the errors of decoding.
        boost: of MMI: how much paths gain, in nats, for every wrong frame.
        accuracy: of MPE: ``"approximate"`` by overlap, ``"exact"`` by edit distance, ``"frame"`` by frame.
        one_silence_class: where frames are counted (sMBR, MPE by frame, boosted MMI): any state of silence is right for
            any other; if not, silence is never right.
        smoothing: the share of cross-entropy in the objective.
        anchor: times the divergence from the network that the training starts from is added.
        curvature: of the criterion in output space, see `quadric.loss.sequence.OutputCurvature`.
        fisher: the empirical Fisher matrix by ``"frame"`` or by ``"utterance"``.
    """

    kind: Kind = "smbr"
    scale: float | None = None
    sharpness: float = 1.0
    boost: float = 0.0
    accuracy: Accuracy = "approximate"
    one_silence_class: bool = True
    smoothing: float = 0.0
    anchor: float = 0.0
    curvature: Matrix = "same_frame"
    fisher: Over = "frame"

    def __post_init__(self) -> None:
        check(self, kind=one_of(Kind), scale=NONE_OR_POSITIVE, sharpness=POSITIVE, boost=NOT_NEGATIVE)
        check(self, accuracy=one_of(Accuracy), smoothing=SHARE, anchor=NOT_NEGATIVE)
        check(self, curvature=one_of(Matrix), fisher=one_of(Over))
        if self.smoothing == 1.0:
            raise ValueError(f"smoothing={self.smoothing}: nothing would be left of {self.kind}; give less than 1")
        if self.boost and self.kind != "mmi":
            raise ValueError(f"boost={self.boost}: only mmi is boosted; kind is {self.kind}")
        if self.accuracy != "approximate" and self.kind != "mpe":
            raise ValueError(f"accuracy={self.accuracy}: only mpe counts phones; kind is {self.kind}")
        if not self.one_silence_class and not self._counts_frames:
            raise ValueError(
                "one_silence_class=False: only where frames are counted, in smbr, mpe with accuracy=frame and mmi with "
                f"a boost; kind is {self.kind}"
            )

    @property
    def _counts_frames(self) -> bool:
        return self.kind == "smbr" or self.accuracy == "frame" or self.boost > 0

    def loss(self, log_prior: Float[Tensor, " C"], scale: float, jobs: int) -> SequenceLoss:
        """The loss over outputs whose first phone is silence, at the acoustic ``scale``; for lattices as sharp."""
        options: Options = {
            "scale": scale * self.sharpness,
            "smoothing": self.smoothing,
            "anchor": self.anchor,
            "curvature": OutputCurvature[self.curvature.upper()],
            "fisher": self.fisher,
            "jobs": jobs,
        }
        silence: Silence = {"silence_phones": (0,), "one_silence_class": self.one_silence_class}
        if self.kind == "mmi":
            return MMI(log_prior, boost=self.boost, **silence, **options)
        if self.kind == "mpe":
            return MPE(log_prior, accuracy=self.accuracy, **silence, **options)
        return SMBR(log_prior, **silence, **options)


class Silence(TypedDict):
    """How the losses take silence."""

    silence_phones: tuple[int, ...]
    one_silence_class: bool


@dataclass(frozen=True)
class Competitors:
    """What the references compete with.

    Attributes:
        lattice: how wide the lattices are.
        lm_order: of the language model of the lattices; a weak one leaves more to compete.
        missing: ``"add"`` a reference that is not in its lattice, or ``"skip"`` the utterance.
        all_speeds: use the copies of the training set at other speeds as well.
        backend: whose search makes the lattices: ``"quadric"``, or ``"kaldi"``, which is kaldi-decoder's, slower, on
            one thread, and takes no notice of ``lattice.max_active``.
    """

    lattice: LatticeOptions = field(default_factory=LatticeOptions)
    lm_order: int = 1
    missing: Missing = "add"
    all_speeds: bool = False
    backend: Backend = "quadric"

    def __post_init__(self) -> None:
        check(self, lm_order=POSITIVE, missing=one_of(Missing), backend=one_of(Backend))


@dataclass(frozen=True)
class PerUtterance(FirstOrder):
    """First-order training with an update for every utterance; the options are those of `FirstOrder`."""

    epochs: float = 4.0
    gradient_frames: int = 1
    weight_decay: float | None = 0.0
    warmup: float = 0.0


@dataclass(frozen=True)
class SGDPerUtterance(PerUtterance):
    """The same by stochastic gradient descent."""

    optimizer: type[Optimizer] = torch.optim.SGD
    lr: float = 1e-2


@dataclass(frozen=True)
class AdamPerUtterance(PerUtterance):
    """The same by Adam."""

    optimizer: type[Optimizer] = torch.optim.Adam
    lr: float = 1e-5


@dataclass(frozen=True)
class SequenceTraining:
    """Training from a network trained by cross-entropy on, by a sequence criterion.

    Attributes:
        criterion: what is trained for.
        competitors: what the references compete with.
        start: name of the training that it starts from; None: the first.
        dropout: probability of dropping a hidden unit.
        sgd, adam, hessian_free, natural_gradient, nghf: the trainings to compare, each from the same start; None: leave
            it out. A training is named by criterion and optimiser: ``smbr_nghf``.
    """

    criterion: Criterion = field(default_factory=Criterion)
    competitors: Competitors = field(default_factory=Competitors)
    start: str | None = None
    dropout: float = 0.0
    sgd: SGDPerUtterance | None = None
    adam: AdamPerUtterance | None = None
    hessian_free: HessianFree | None = None
    natural_gradient: NaturalGradient | None = None
    nghf: NGHF | None = field(default_factory=NGHF)

    def __post_init__(self) -> None:
        check(self, dropout=SHARE)
        if not self.methods:
            raise ValueError("sgd, adam, hessian_free, natural_gradient, nghf are all none: leave one in at least")
        if self.sgd is not None and self.adam is not None and self.sgd.name == self.adam.name:
            raise ValueError(f"sgd and adam both have optimizer={self.sgd.optimizer.__name__}: leave one of them out")
        for method in (self.natural_gradient, self.nghf):
            if method is not None and method.metric == "fisher":
                raise ValueError(
                    f"{method.name}.metric=fisher: a sequence criterion is no distribution to draw targets from; "
                    "choose empirical_fisher or gauss_newton"
                )

    @property
    def methods(self) -> dict[str, Method]:
        """The trainings that are not left out, by name."""
        chosen: tuple[Method | None, ...] = (
            self.sgd, self.adam, self.hessian_free, self.natural_gradient, self.nghf,
        )  # fmt: skip
        return {f"{self.criterion.kind}_{method.name}": method for method in chosen if method is not None}
