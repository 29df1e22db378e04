"""What a job is made of: frozen records that a recipe fills in and the command line may override.

A record's fields are its options; their docstrings are the manual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quadric.data.augment import SpecAugment
from quadric.model.acoustic import DNN, SHIFTS, TDNN, AcousticModel, Activation, Norm, check_layers
from quadric.model.recurrent import LSTM, RNN, UNFOLDING, check_recurrent
from quadric.speech.features import Fbank
from quadric.speech.gaussian import GaussianBootstrap
from quadric.speech.normalisation import Normalisation
from quadric.speech.tree import TreeOptions
from quadric.train.asynchronous import Asynchronous, check_methods
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.criterion import SequenceTraining
from quadric.train.method import NGHF, FirstOrder, HessianFree, Method, NaturalGradient, compared
from quadric.train.rules import ALL_FINITE, ALL_POSITIVE, NOT_NEGATIVE, POSITIVE, WINDOW, check, check_name
from quadric.train.sources import Source


@dataclass(frozen=True)
class Network:
    """The acoustic model.

    On the command line ``network=NAME`` takes one of `PAPER_NETWORKS`, whose options may then be changed.

    Attributes:
        kind: ``"dnn"`` splices a window once, ``"tdnn"`` in every layer; ``"rnn"`` and ``"lstm"`` run through a window.
        sizes: units of each hidden layer; of an RNN or LSTM, of each recurrent layer.
        context: frames on either side of a DNN's window.
        offsets: a TDNN's frame offsets, one tuple per hidden layer.
        feed_forward: units of each layer above the recurrent ones.
        window: frames before and after the scored one that an RNN or LSTM runs through; its time is that of as many
            steps for every frame.
        activation: of the hidden units; of an LSTM, of its feed-forward layers.
        dropout: probability of dropping a hidden unit while training; of a recurrent one, for the layer above alone.
        norm: ``"layer"`` normalises each frame's units before the activation, in feed-forward layers.
    """

    kind: Literal["dnn", "tdnn", "rnn", "lstm"] = "tdnn"
    sizes: tuple[int, ...] = (512, 512, 512, 512, 512)
    context: int = 10
    offsets: tuple[tuple[int, ...], ...] = SHIFTS
    feed_forward: tuple[int, ...] = ()
    window: tuple[int, int] = UNFOLDING
    activation: Activation = "relu"
    dropout: float = 0.0
    norm: Norm = "layer"

    def __post_init__(self) -> None:
        check(self, context=NOT_NEGATIVE)
        if self.kind in ("rnn", "lstm"):
            check_recurrent(self.sizes, self.feed_forward, self.window, self.activation, self.dropout, self.norm)
            return
        offsets = ((0,),) * len(self.sizes) if self.kind == "dnn" else self.offsets
        check_layers(self.sizes, offsets, self.activation, self.dropout, self.norm)
        if self.feed_forward:
            raise ValueError(
                f"feed_forward={self.feed_forward}: kind={self.kind} has no layers but those of sizes: add them there, "
                "or choose kind=rnn or kind=lstm"
            )

    def build(self, inputs: int, outputs: int) -> AcousticModel:
        """The network, initialised from torch's random numbers."""
        common: dict[str, Any] = {"activation": self.activation, "dropout": self.dropout, "norm": self.norm}
        if self.kind == "dnn":
            return DNN(inputs, outputs, self.sizes, context=self.context, **common)
        if self.kind == "tdnn":
            return TDNN(inputs, outputs, self.sizes, offsets=self.offsets, **common)
        kind = RNN if self.kind == "rnn" else LSTM
        return kind(inputs, outputs, self.sizes, feed_forward=self.feed_forward, window=self.window, **common)

    @staticmethod
    def presets() -> Mapping[str, Network]:
        """The networks that ``network=NAME`` takes."""
        return PAPER_NETWORKS


PAPER_NETWORKS: Mapping[str, Network] = {
    "paper-dnn": Network("dnn", (1000,) * 5, context=4, norm="none"),
    "paper-tdnn": Network("tdnn", (1000,) * 5, norm="none"),
    "paper-rnn": Network("rnn", (1000, 1000), feed_forward=(1000,), norm="none"),
    "paper-lstm": Network("lstm", (1000, 1000), feed_forward=(1000,), norm="none"),
}
"""The networks of the NGHF experiments (Haider and Woodland, 2018, 2021), with relu; they have sigmoid as well.

Their features are 40 log-Mel filterbanks, for all but the TDNN with first differences: ``fbank.bins=40 deltas=1``.
"""


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
        check(self, warm=POSITIVE, rounds=NOT_NEGATIVE, prior_scale=NOT_NEGATIVE, lr=POSITIVE)
        check(self, gradient_frames=POSITIVE, scale=ALL_POSITIVE)


@dataclass(frozen=True)
class Decoding:
    """Decoding and the sweep on the development set.

    Attributes:
        beam, max_active: of the search.
        lm_weights: language-model weights to try; the acoustic scale is one over it.
        word_penalties: costs per word to try, in nats.
        sweep_utterances: of the development set, evenly spaced, whose lattices the sweep scores with all weights and
            holds in memory; the result is reported on all.
    """

    beam: float = 13.0
    max_active: int = 4000
    lm_weights: tuple[float, ...] = (4.0, 6.0, 8.0, 10.0, 12.0)
    word_penalties: tuple[float, ...] = (-1.0, 0.0, 1.0, 2.0)
    sweep_utterances: int = 1000

    def __post_init__(self) -> None:
        check(self, beam=POSITIVE, max_active=POSITIVE, sweep_utterances=POSITIVE, lm_weights=ALL_POSITIVE)
        check(self, word_penalties=ALL_FINITE)


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
        first_order, block_diagonal, averaged, hessian_free, natural_gradient, nghf: the trainings to compare, each from
            the same start; None: leave it out.
        asynchronous: do these trainings by workers on a parameter server; None: in one process, or on ranks.
        sequence: trainings by a sequence criterion, from one of these on; None: leave them out.
        evaluations: of the development set over a training, besides the one before it: the lowest loss wins.
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
    block_diagonal: BlockDiagonalMethod | None = None
    averaged: AveragedSGDMethod | None = None
    hessian_free: HessianFree | None = field(default_factory=HessianFree)
    natural_gradient: NaturalGradient | None = None
    nghf: NGHF | None = None
    asynchronous: Asynchronous | None = None
    sequence: SequenceTraining | None = None
    evaluations: int = 20
    decoding: Decoding = field(default_factory=Decoding)
    autocast: bool = False
    seed: int = 0
    jobs: int = 2

    def __post_init__(self) -> None:
        check(self, jobs=POSITIVE, chunk=WINDOW, seed=NOT_NEGATIVE, deltas=NOT_NEGATIVE, lm_order=POSITIVE)
        check(self, speeds=ALL_POSITIVE, evaluations=POSITIVE)
        if 1.0 not in self.speeds or len(set(self.speeds)) < len(self.speeds):
            raise ValueError(
                f"speeds={self.speeds}: must hold 1.0, the speed alignments start from, and each speed once"
            )
        check_name(self.name)
        check_methods(self.asynchronous, self.methods)
        if self.sequence is not None and self.sequence.start not in (None, *self.methods):
            raise ValueError(
                f"sequence.start={self.sequence.start}: no such training; choose one of {', '.join(self.methods)}"
            )

    @property
    def methods(self) -> dict[str, Method]:
        """The trainings that are not left out, by name."""
        return compared(self)
