"""Jobs that are not speech: a model on images or a graph, trained in several ways from the same start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from quadric.data import image_sets
from quadric.data.augment import CropFlip
from quadric.data.examples import ExampleStream, Stream, WholeStream
from quadric.data.graphs import read_planetoid
from quadric.data.image_sets import Images
from quadric.data.images import read_cifar10, read_idx
from quadric.loss.loss import Bernoulli, CrossEntropy, Loss, SquaredError
from quadric.model import vision
from quadric.model.graph import GCN, normalised_adjacency
from quadric.model.vision import VGG16, ResNet, autoencoder
from quadric.train.asynchronous import Asynchronous, check_methods
from quadric.train.averaged_method import AveragedSGDMethod
from quadric.train.block_method import BlockDiagonalMethod
from quadric.train.method import NGHF, FirstOrder, HessianFree, Method, NaturalGradient, compared
from quadric.train.rules import NOT_NEGATIVE, POSITIVE, SHARE, check, check_name, one_of

VALIDATION = 5000
"""Images of CIFAR-10's training set that are held out."""
SEEN = 10_000
"""Images of a training set of which the training loss is told."""


class Material(NamedTuple):
    """What is trained, on what.

    Attributes:
        build: the model, as it starts, from torch's random numbers.
        loss: of its output.
        train: what it is trained on.
        seen: a part of it, unchanged, of which the training loss is told at the end.
        dev, test: ``test`` is None where there is no such set.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    train: Stream
    seen: Stream
    dev: Stream
    test: Stream | None


class Task(ABC):
    """A model and the data it is for, yet to be read."""

    @abstractmethod
    def load(self, device: torch.device, *, seed: int, shard: tuple[int, int]) -> Material:
        """Reads the data; of ``train``, a rank is given its ``shard``."""


@dataclass(frozen=True)
class Autoencoding(Task):
    """An autoencoder of rectified linear units (Hinton and Salakhutdinov, 2006); the loss is summed over pixels.

    Attributes:
        images: ``"mnist"``, ``"faces"`` (patches of the ORL faces), or ``"curves"``, which are drawn.
        data: the folder of ``train-images-idx3-ubyte.gz``, where it is there with ``t10k-images-idx3-ubyte.gz`` to
            test, or of ``orl_faces.npz``; curves need none.
        divide: the hidden layers' units by this.
    """

    images: Literal["mnist", "curves", "faces"] = "mnist"
    data: Path | None = None
    divide: int = 1

    def __post_init__(self) -> None:
        check(self, images=one_of(Literal["mnist", "curves", "faces"]), divide=POSITIVE)
        if self.data is None and self.images != "curves":
            raise ValueError(f"data=none: the images of {self.images} are read from files; give their folder")

    def load(self, device: torch.device, *, seed: int, shard: tuple[int, int]) -> Material:
        images = self._read().to(device)
        sizes = {"mnist": vision.MNIST, "curves": vision.CURVES, "faces": vision.FACES}[self.images]
        unknown = None if self.data is None else self.data / "t10k-images-idx3-ubyte.gz"
        test = None
        if self.images == "mnist" and unknown is not None and unknown.is_file():
            test = ExampleStream(read_idx(unknown).flatten(1).float().to(device) / 255)
        return Material(
            lambda: autoencoder(sizes, divide=self.divide),
            Bernoulli() if images.logistic else SquaredError(),
            ExampleStream(images.training, seed=seed, shard=shard),
            ExampleStream(images.training[:SEEN]),
            ExampleStream(images.held_out),
            test,
        )

    def _read(self) -> Images:
        if self.data is None:
            return image_sets.curves()
        return image_sets.mnist(self.data) if self.images == "mnist" else image_sets.faces(self.data)


@dataclass(frozen=True)
class Cifar10(Task):
    """CIFAR-10: 45,000 images to train on, moved and mirrored, 5,000 held out, 10,000 to test.

    Attributes:
        data: the folder of ``cifar10_jpeg.npz``.
        network: ``"resnet32"`` or ``"vgg16"``, with batch normalisation.
        width: channels of its first convolution: 16 and 64 in the papers.
        augment: whether images are moved and mirrored.
    """

    data: Path
    network: Literal["resnet32", "vgg16"] = "resnet32"
    width: int = 16
    augment: bool = True

    def __post_init__(self) -> None:
        check(self, network=one_of(Literal["resnet32", "vgg16"]), width=POSITIVE)

    def load(self, device: torch.device, *, seed: int, shard: tuple[int, int]) -> Material:
        path = self.data / "cifar10_jpeg.npz"
        images, labels = read_cifar10(path, "train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held_out, kept = order[:VALIDATION], order[VALIDATION:]
        deviation, mean = (part[0].to(device) for part in torch.std_mean(images[kept].float(), (0, 2, 3), keepdim=True))

        def normalised(images: Tensor) -> Tensor:
            return (images.float() - mean) / deviation

        def stream(images: Tensor, labels: Tensor) -> ExampleStream:
            return ExampleStream(images.to(device), labels.to(device), prepare=normalised)

        training = ExampleStream(
            images[kept].to(device),
            labels[kept].to(device),
            prepare=normalised,
            change=CropFlip() if self.augment else None,
            seed=seed,
            shard=shard,
        )
        network = ResNet if self.network == "resnet32" else VGG16
        seen, held = (stream(images[part], labels[part]) for part in (kept[:SEEN], held_out))
        test = stream(*read_cifar10(path, "test"))
        return Material(lambda: network(width=self.width), CrossEntropy(), training, seen, held, test)


@dataclass(frozen=True)
class Citations(Task):
    """A graph convolutional network on all of a citation network (Kipf and Welling, 2017).

    Attributes:
        data: the folder of ``cora.npz`` and ``citeseer.npz``.
        graph: ``"cora"`` or ``"citeseer"``.
        hidden: units.
        dropout: probability of dropping an input of a layer while training.
    """

    data: Path
    graph: Literal["cora", "citeseer"] = "cora"
    hidden: int = 16
    dropout: float = 0.5

    def __post_init__(self) -> None:
        check(self, graph=one_of(Literal["cora", "citeseer"]), hidden=POSITIVE, dropout=SHARE)

    def load(self, device: torch.device, *, seed: int, shard: tuple[int, int]) -> Material:
        if shard[1] > 1:
            raise ValueError(f"{shard[1]} ranks: a graph is one piece and cannot be shared out; train it on one")
        graph = read_planetoid(self.data / f"{self.graph}.npz").to(device)
        adjacency, features = normalised_adjacency(graph.edges, len(graph.labels)), graph.features.to_sparse()
        sets = (graph.training, graph.validation, graph.test)
        train, dev, test = (WholeStream(features, graph.labels_of(nodes), len(nodes)) for nodes in sets)

        def build() -> nn.Module:
            return GCN(adjacency, features.shape[1], graph.classes, hidden=self.hidden, dropout=self.dropout)

        return Material(build, CrossEntropy(), train, train, dev, test)


@dataclass(frozen=True)
class TaskJob:
    """A model and its data, and the ways to train it that are compared.

    Attributes:
        name: of the working folder.
        task: what is trained, on what.
        first_order, block_diagonal, averaged, hessian_free, natural_gradient, nghf: the trainings to compare, each from
            the same start; None: leave it out. Their frames are images, or the labelled nodes of a graph.
        asynchronous: do the trainings by workers on a parameter server; None: one after the other, or on ranks.
        evaluations: of the held-out data over a training, besides the one before it.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU where there is one.
        autocast: compute matrix products in bfloat16.
        seed: of everything random.
    """

    name: str
    task: Task
    first_order: FirstOrder | None = field(default_factory=FirstOrder)
    block_diagonal: BlockDiagonalMethod | None = field(default_factory=BlockDiagonalMethod)
    averaged: AveragedSGDMethod | None = None
    hessian_free: HessianFree | None = None
    natural_gradient: NaturalGradient | None = None
    nghf: NGHF | None = None
    asynchronous: Asynchronous | None = None
    evaluations: int = 20
    device: str = "auto"
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, seed=NOT_NEGATIVE, evaluations=POSITIVE)
        check_name(self.name)
        check_methods(self.asynchronous, self.methods)
        if self.device != "auto":
            try:
                kind = torch.device(self.device).type
            except RuntimeError:
                kind = ""
            if kind not in ("cpu", "cuda"):
                raise ValueError(f"device={self.device}: give cpu, cuda, cuda:1 and the like, or auto")
            if kind == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"device={self.device}: torch finds no GPU here; give cpu, or auto")

    @property
    def methods(self) -> dict[str, Method]:
        """The trainings that are not left out, by name."""
        return compared(self)

    @property
    def place(self) -> torch.device:
        """The device."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)
