"""What a job is made of: frozen records that a recipe fills in and the command line may override.

A record's fields are its options; their docstrings are the manual.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler

from quadric.data.augment import SpecAugment
from quadric.data.stream import MICRO_FRAMES
from quadric.model.acoustic import DNN, SHIFTS, TDNN, Activation, Norm, check_layers
from quadric.optim.precondition import LBFGS, FisherDiagonal, Preconditioner, SharedCounts
from quadric.optim.second_order import hessian_free, natural_gradient, nghf
from quadric.speech.features import Fbank
from quadric.speech.gaussian import GaussianBootstrap
from quadric.speech.normalisation import Normalisation
from quadric.speech.tree import TreeOptions
from quadric.train.sources import Source


@dataclass(frozen=True)
class Network:
    """The acoustic model.

    Attributes:
        kind: ``"dnn"`` splices a window once, ``"tdnn"`` in every layer.
        sizes: units of each hidden layer.
        context: frames on either side of a DNN's window.
        offsets: a TDNN's frame offsets, one tuple per hidden layer.
        activation: of the hidden units.
        dropout: probability of dropping a hidden unit while training.
        norm: ``"layer"`` normalises each frame's units before the activation.
    """

    kind: Literal["dnn", "tdnn"] = "tdnn"
    sizes: tuple[int, ...] = (512, 512, 512, 512, 512)
    context: int = 10
    offsets: tuple[tuple[int, ...], ...] = SHIFTS
    activation: Activation = "relu"
    dropout: float = 0.0
    norm: Norm = "layer"

    def __post_init__(self) -> None:
        _check(self, context=_NOT_NEGATIVE)
        offsets = ((0,),) * len(self.sizes) if self.kind == "dnn" else self.offsets
        check_layers(self.sizes, offsets, self.activation, self.dropout, self.norm)

    def build(self, inputs: int, outputs: int) -> TDNN:
        """The network, initialised from torch's random numbers."""
        if self.kind == "dnn":
            return DNN(
                inputs,
                outputs,
                self.sizes,
                context=self.context,
                activation=self.activation,
                dropout=self.dropout,
                norm=self.norm,
            )
        return TDNN(
            inputs,
            outputs,
            self.sizes,
            offsets=self.offsets,
            activation=self.activation,
            dropout=self.dropout,
            norm=self.norm,
        )


@dataclass(frozen=True)
class Method(ABC):
    """A way to train: an optimiser and how much data it sees.

    Attributes:
        epochs: passes over the training data.
        gradient_frames: frames an update's gradient sees.
    """

    epochs: float = 8.0
    gradient_frames: int = 2048

    curvature_frames: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check(self, epochs=_POSITIVE, gradient_frames=_POSITIVE)

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the training, in lines, folders and reports."""

    @abstractmethod
    def build(self, params: Iterable[nn.Parameter]) -> Optimizer:
        """The optimiser over ``params``."""

    def schedule(self, optimizer: Optimizer, updates: int) -> LRScheduler:
        """How the learning rate goes over the run: by default it stays."""
        return ConstantLR(optimizer, factor=1.0)


@dataclass(frozen=True)
class FirstOrder(Method):
    """Training by any optimiser of torch on minibatches, with a warm-up and a cosine decay of its rate.

    An update is ``optimizer.step(objective)``: one that evaluates its closure several times, such as LBFGS, does so on
    one minibatch. The training has the name of the optimiser's class, in lower case.

    Attributes:
        epochs, gradient_frames: as in `Method`; ``gradient_frames`` is the minibatch.
        optimizer: a class such as ``torch.optim.AdamW`` or ``torch.optim.SGD``.
        lr: the highest learning rate.
        weight_decay: as the optimiser means it; None: its own default.
        arguments: whatever else it takes by name, such as ``{"momentum": 0.9}`` of SGD.
        warmup: the share of the updates over which the rate rises from zero.
        floor: the rate at the end, as a share of ``lr``.
    """

    optimizer: type[Optimizer] = torch.optim.AdamW
    lr: float = 1e-3
    weight_decay: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    warmup: float = 0.05
    floor: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, lr=_POSITIVE, weight_decay=_NONE_OR_NOT_NEGATIVE, warmup=_SHARE, floor=_SHARE)
        if self.optimizer is not torch.optim.AdamW or self.arguments:  # the first optimiser takes torch seconds to make
            self._try()

    @property
    def name(self) -> str:
        return self.optimizer.__name__.lower()

    def build(self, params: Iterable[nn.Parameter]) -> Optimizer:
        decay: dict[str, Any] = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return self.optimizer(params, lr=self.lr, **decay, **self.arguments)  # type: ignore[call-arg]

    def _try(self) -> None:
        """Refuses what the optimiser cannot be made with, and one that cannot train, by a step of a small layer."""
        weight, bias = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,)))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight.sum(0) + bias - 1).square().sum()
            loss.backward()
            return loss

        try:
            optimizer = self.build([weight, bias])
            optimizer.step(closure)  # type: ignore[arg-type]
        except Exception as error:  # an optimiser may refuse in any way it likes
            decay = "" if self.weight_decay is None else f", weight_decay={self.weight_decay}"
            raise ValueError(
                f"optimizer={self.optimizer.__name__}: cannot train with lr={self.lr}{decay}, "
                f"arguments={self.arguments} ({error}): change these, or name another optimiser before them"
            ) from error

    def schedule(self, optimizer: Optimizer, updates: int) -> LRScheduler:
        rising = max(1, round(self.warmup * updates))

        def factor(update: int) -> float:
            if update < rising:
                return (update + 1) / rising
            done = min(1.0, (update - rising) / max(1, updates - rising))
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))

        return LambdaLR(optimizer, factor)


Preconditioning = Literal["none", "lbfgs", "diagonal", "shared_counts"]

_PRECONDITIONERS: dict[Preconditioning, Preconditioner | None] = {
    "none": None,
    "lbfgs": LBFGS(),
    "diagonal": FisherDiagonal(),
    "shared_counts": SharedCounts(),
}


@dataclass(frozen=True)
class HessianFree(Method):
    """Training by Hessian-free steps on large batches (Martens, 2010).

    Attributes:
        epochs, gradient_frames: as in `Method`.
        curvature_frames: frames of the curvature products, drawn anew for every step from the whole set.
        damping: the first lambda; it adapts.
        max_steps: conjugate-gradient iterations a step at most.
        tolerance: of the relative progress that ends them.
        momentum: the share of the previous solution they start from.
        preconditioner: of the conjugate gradients: by the pairs of the previous step's (``"lbfgs"``), by the Fisher
            matrix's diagonal, or by the number of times a frame uses each parameter (``"shared_counts"``).
    """

    epochs: float = 8.0
    gradient_frames: int = 200_000
    curvature_frames: int = 20_000  # type: ignore[misc]
    damping: float = 1.0
    max_steps: int = 50
    tolerance: float = 5e-4
    momentum: float = 0.95
    preconditioner: Preconditioning = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, curvature_frames=_POSITIVE, damping=_POSITIVE, max_steps=_POSITIVE, tolerance=_NOT_NEGATIVE)
        _check(self, momentum=_SHARE)

    @property
    def name(self) -> str:
        return "hessian_free"

    def build(self, params: Iterable[nn.Parameter]) -> Optimizer:
        return hessian_free(
            params,
            damping=self.damping,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            momentum=self.momentum,
            preconditioner=_PRECONDITIONERS[self.preconditioner],
        )


@dataclass(frozen=True)
class NaturalGradient(Method):
    """Training by natural-gradient steps on large batches, with the empirical Fisher matrix (Haider, Woodland 2017).

    Attributes:
        epochs, gradient_frames: as in `Method`.
        curvature_frames: frames of the products and of the choice among the iterates, drawn anew for every step.
        iterations: of conjugate gradients.
        preconditioner: as in `HessianFree`.
    """

    epochs: float = 8.0
    gradient_frames: int = 200_000
    curvature_frames: int = 20_000  # type: ignore[misc]
    iterations: int = 8
    preconditioner: Preconditioning = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, curvature_frames=_POSITIVE, iterations=_POSITIVE)

    @property
    def name(self) -> str:
        return "natural_gradient"

    def build(self, params: Iterable[nn.Parameter]) -> Optimizer:
        preconditioner = _PRECONDITIONERS[self.preconditioner]
        return natural_gradient(params, iterations=self.iterations, preconditioner=preconditioner)


@dataclass(frozen=True)
class NGHF(NaturalGradient):
    """Training by natural gradient and Hessian-free combined (Haider et al., 2021): two runs of ``iterations`` each."""

    @property
    def name(self) -> str:
        return "nghf"

    def build(self, params: Iterable[nn.Parameter]) -> Optimizer:
        return nghf(params, iterations=self.iterations, preconditioner=_PRECONDITIONERS[self.preconditioner])


@dataclass(frozen=True)
class FlatStart:
    """Alignments from transcripts alone.

    A single-Gaussian Viterbi bootstrap gives first alignments; a small network learns them, then is trained by the
    full sum over all alignments with a state prior (Zeyer et al., 2017), which moves the boundaries to where the
    network sees them; a Viterbi alignment by that network is the result.

    Attributes:
        gaussian: the bootstrap.
        network: the small network.
        warm: passes of cross-entropy on the bootstrap's alignment.
        rounds: passes of full-sum training.
        scale: of the acoustic scores in the first and last round, linearly in between.
        prior_scale: of the state prior.
        lr: of Adam.
        gradient_frames: frames of a minibatch.
    """

    gaussian: GaussianBootstrap = field(default_factory=GaussianBootstrap)
    network: Network = field(default_factory=lambda: Network("dnn", (256, 256), context=5, norm="none"))
    warm: float = 1.0
    rounds: int = 4
    scale: tuple[float, float] = (0.5, 1.0)
    prior_scale: float = 0.7
    lr: float = 1e-3
    gradient_frames: int = 4096

    def __post_init__(self) -> None:
        _check(self, warm=_POSITIVE, rounds=_NOT_NEGATIVE, prior_scale=_NOT_NEGATIVE, lr=_POSITIVE)
        _check(self, gradient_frames=_POSITIVE, scale=_ALL_POSITIVE)


@dataclass(frozen=True)
class Decoding:
    """Decoding and the sweep on the development set.

    Attributes:
        beam, max_active: of the search.
        lm_weights: language-model weights to try; the acoustic scale is one over it.
        word_penalties: costs per word to try, in nats.
        sweep_utterances: of the development set, evenly spaced, that the sweep decodes; the result is reported on all.
    """

    beam: float = 13.0
    max_active: int = 4000
    lm_weights: tuple[float, ...] = (4.0, 6.0, 8.0, 10.0, 12.0)
    word_penalties: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0)
    sweep_utterances: int = 200

    def __post_init__(self) -> None:
        _check(self, beam=_POSITIVE, max_active=_POSITIVE, sweep_utterances=_POSITIVE, lm_weights=_ALL_POSITIVE)
        _check(self, word_penalties=_ALL_FINITE)


@dataclass(frozen=True)
class Job:
    """From recordings to word error rate.

    Attributes:
        name: of the working folder.
        train, dev, test: where each set comes from.
        lexicon: file of pronunciations; None: the English digits'.
        strip_stress: take ``AH0`` and ``AH1`` as the phone ``AH``; false where a final digit means something else, a
            tone for example.
        unknown_words: ``"error"``, or ``"drop"`` the utterances that hold one.
        on_bad_audio: ``"error"``, or ``"drop"`` the utterances whose audio is missing or damaged.
        fbank: filterbank features of audio.
        normalisation: of the features.
        deltas: orders of differences appended to the features.
        speeds: copies of the training audio at these speeds.
        lm_order: of the n-gram model estimated from the training text.
        arpa: a language model of your own instead.
        alignments: a file of alignments of the training set, instead of the Gaussian ones that the flat start begins
            with; its network is trained all the same, and aligns the development set and what the file lacks. Either
            times of phones or of words (``FILE.ctm``), or a Kaldi archive of one pdf a frame, numbered as `monophone`
            does: state s (0, 1 or 2) of phone p is pdf 3 p + s, where phone 0 is silence and those of the lexicon
            follow in order of their names. Kaldi numbers the pdfs of its own models in another way: from there, give
            a CTM of phones (``ali-to-phones --ctm-output``) or of words.
        flat_start: how alignments are found.
        realign: a training of the network whose alignments replace the flat start's; None: leave it out.
        tree: tied triphone states; None: monophone states.
        network: the acoustic model.
        augment: masks on the features while training.
        chunk: frames of the windows that minibatches are made of.
        first_order, hessian_free, natural_gradient, nghf: the trainings to compare, each from the same start; None:
            leave it out.
        decoding: of dev and test.
        autocast: compute matrix products in bfloat16.
        seed: of everything random.
        jobs: processes.
    """

    name: str
    train: Source
    dev: Source
    test: Source
    lexicon: Path | None = None
    strip_stress: bool = True
    unknown_words: Literal["error", "drop"] = "error"
    on_bad_audio: Literal["error", "drop"] = "error"
    fbank: Fbank = field(default_factory=Fbank)
    normalisation: Normalisation = field(default_factory=Normalisation)
    deltas: int = 0
    speeds: tuple[float, ...] = (1.0,)
    lm_order: int = 2
    arpa: Path | None = None
    alignments: Path | None = None
    flat_start: FlatStart = field(default_factory=FlatStart)
    realign: FirstOrder | None = None
    tree: TreeOptions | None = None
    network: Network = field(default_factory=Network)
    augment: SpecAugment | None = None
    chunk: int = 50
    first_order: FirstOrder | None = field(default_factory=FirstOrder)
    hessian_free: HessianFree | None = field(default_factory=HessianFree)
    natural_gradient: NaturalGradient | None = None
    nghf: NGHF | None = None
    decoding: Decoding = field(default_factory=Decoding)
    autocast: bool = False
    seed: int = 0
    jobs: int = 2

    def __post_init__(self) -> None:
        _check(self, jobs=_POSITIVE, chunk=_WINDOW, seed=_NOT_NEGATIVE, deltas=_NOT_NEGATIVE, lm_order=_POSITIVE)
        _check(self, speeds=_ALL_POSITIVE)
        if 1.0 not in self.speeds or len(set(self.speeds)) < len(self.speeds):
            raise ValueError(
                f"speeds={self.speeds}: must hold 1.0, the speed alignments start from, and each speed once"
            )
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r}: must be the plain name of a folder")
        if not self.methods:
            raise ValueError("first_order, hessian_free, natural_gradient, nghf are all none: leave one in at least")

    @property
    def methods(self) -> dict[str, Method]:
        """The trainings that are not left out, by name."""
        chosen: tuple[Method | None, ...] = (self.first_order, self.hessian_free, self.natural_gradient, self.nghf)
        return {method.name: method for method in chosen if method is not None}


_Rule = tuple[Callable[[Any], bool], str]
_POSITIVE: _Rule = (lambda value: 0 < value < math.inf, "must be positive")
_NOT_NEGATIVE: _Rule = (lambda value: 0 <= value < math.inf, "must not be negative")
_NONE_OR_NOT_NEGATIVE: _Rule = (lambda value: value is None or 0 <= value < math.inf, "must not be negative")
_SHARE: _Rule = (lambda value: 0 <= value <= 1, "must be between 0 and 1")
_WINDOW: _Rule = (
    lambda value: 1 <= value <= MICRO_FRAMES,
    f"must be between 1 and {MICRO_FRAMES}, the frames of a micro-batch",
)
_ALL_POSITIVE: _Rule = (
    lambda values: len(values) > 0 and all(0 < v < math.inf for v in values),
    "needs positive values",
)
_ALL_FINITE: _Rule = (lambda values: len(values) > 0 and all(map(math.isfinite, values)), "needs finite values")


def _check(record: object, **rules: _Rule) -> None:
    """Raises ``ValueError`` for the first option that breaks its rule: before any work, not in the middle of it."""
    for name, (holds, demand) in rules.items():
        if not holds(getattr(record, name)):
            raise ValueError(f"{name}={getattr(record, name)}: {demand}")
