"""The tasks of `block_tasks.py`: models, the data they are trained on, and what is measured of them.

No benchmark by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from images import SETS, Images
from quadric.data.augment import CropFlip
from quadric.data.graphs import read_planetoid
from quadric.data.images import read_cifar10
from quadric.loss.loss import Bernoulli, CrossEntropy, Loss, SquaredError
from quadric.model.graph import GCN, normalised_adjacency
from quadric.model.vision import VGG16, ResNet, autoencoder
from quadric.optim.block_diagonal import Schedule

CHUNK = 1000
"""Images in a pass of an evaluation."""
VALIDATION = 5000
"""Images of CIFAR-10's training set that are held out to tune by."""

Batch = tuple[Tensor, Tensor]
Measures = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how it is judged.

    Attributes:
        build: the model, as it starts.
        loss: summed over frames; its mean is minimised.
        batches: without end, drawn by a generator.
        measure: of a model, which it leaves in evaluation mode; always a ``training_loss``.
        accuracy: whether it is judged by ``validation_accuracy``, and not by the training loss.
        schedule: of statistics and inverses, that of the authors' code.
        decay: of the weights (not of biases and norms) in each step, decoupled, times the schedule of the rates.
        penalty: times half the squared length of the parameters is added to the loss.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    batches: Callable[[torch.Generator], Iterator[Batch]]
    measure: Callable[[nn.Module], Measures]
    accuracy: bool = False
    schedule: Schedule = Schedule(statistics=1, inverses=20)
    decay: float = 0.0
    penalty: float = 0.0

    def rank(self, measures: Mapping[str, float]) -> tuple[float, ...]:
        """Better ones come first."""
        lost = measures["training_loss"]
        return (-measures["validation_accuracy"], lost) if self.accuracy else (lost,)


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of minibatches, pass after pass, each place once; what is left over in a pass is left out."""
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)


def autoencoding(images: Images, *, narrow: bool, batch: int = 1000, evaluated: int = 10_000) -> Task:
    """An autoencoder; the loss of an image is the sum over its pixels."""
    loss = Bernoulli() if images.logistic else SquaredError()
    data = images.training

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for places in shuffled(len(data), batch, generator):
            x = data[places.to(data.device)]
            yield x, x

    def measure(model: nn.Module) -> Measures:
        seen, unseen = data[:evaluated], images.held_out
        return {
            "training_loss": evaluate(model, loss, seen.split(CHUNK), seen.split(CHUNK))[0],
            "held_out_loss": evaluate(model, loss, unseen.split(CHUNK), unseen.split(CHUNK))[0],
        }

    divide = images.narrower if narrow else 1
    return Task(lambda: autoencoder(images.sizes, divide=divide), loss, batches, measure)


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[float, float]:
    """The mean loss, and the percentage of targets that the model has right where a loss knows such a thing."""
    model.eval()
    total = frames = right = 0.0
    for x, target in zip(inputs, targets, strict=True):
        output = model(x)
        total += float(loss(output, target))
        frames += float(loss.weight(target))
        found = loss.correct(output, target)
        right += found[0] if found else 0.0
    return total / frames, 100 * right / frames


@dataclass(frozen=True)
class Pictures:
    """Colour images of bytes, their classes, and what normalises them.

    Attributes:
        mean, deviation: of each channel, [3, 1, 1], of the training set.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    deviation: Tensor

    def normalised(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.deviation

    def evaluated(self, model: nn.Module, loss: Loss, first: int | None = None) -> tuple[float, float]:
        images = [self.normalised(part) for part in self.images[:first].split(CHUNK)]
        return evaluate(model, loss, images, self.labels[:first].split(CHUNK))


def cifar(
    folder: Path, build: Callable[[], nn.Module], device: torch.device, *, batch: int = 128, evaluated: int = VALIDATION
) -> Task:
    """A network on CIFAR-10: 45,000 images to train on, cropped and mirrored, 5,000 to tune by, 10,000 to test."""
    path = folder / "cifar10" / "cifar10_jpeg.npz"
    images, labels = read_cifar10(path, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    deviation, mean = torch.std_mean(images[VALIDATION:].float(), (0, 2, 3), keepdim=True)

    def pictures(images: Tensor, labels: Tensor) -> Pictures:
        return Pictures(images.to(device), labels.to(device), mean[0].to(device), deviation[0].to(device))

    seen, unseen = (
        pictures(images[VALIDATION:], labels[VALIDATION:]),
        pictures(images[:VALIDATION], labels[:VALIDATION]),
    )
    test, loss, change = pictures(*read_cifar10(path, "test")), CrossEntropy(), CropFlip()

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for places in shuffled(len(seen.labels), batch, generator):
            places = places.to(device)
            yield seen.normalised(change(seen.images[places], generator)), seen.labels[places]

    def measure(model: nn.Module) -> Measures:
        return {
            "training_loss": seen.evaluated(model, loss, evaluated)[0],
            "validation_accuracy": unseen.evaluated(model, loss)[1],
            "test_accuracy": test.evaluated(model, loss)[1],
        }

    return Task(build, loss, batches, measure, True, Schedule(statistics=10, inverses=100), decay=5e-4)


def citations(path: Path, device: torch.device) -> Task:
    """A graph convolutional network on all of a citation network at once."""
    graph = read_planetoid(path).to(device)
    adjacency = normalised_adjacency(graph.edges, len(graph.labels))
    loss, features = CrossEntropy(), graph.features.to_sparse()
    training, validation, test = (graph.labels_of(part) for part in (graph.training, graph.validation, graph.test))

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield features, training

    def measure(model: nn.Module) -> Measures:
        lost, _ = evaluate(model, loss, [features], [training])
        accuracies = [evaluate(model, loss, [features], [part])[1] for part in (validation, test)]
        return {"training_loss": lost, "validation_accuracy": accuracies[0], "test_accuracy": accuracies[1]}

    def build() -> nn.Module:
        return GCN(adjacency, features.shape[1], graph.classes)

    return Task(build, loss, batches, measure, True, penalty=5e-4)


def _autoencoder(name: str) -> Callable[[Path, bool, torch.device], Task]:
    return lambda folder, narrow, device: autoencoding(SETS[name](folder).to(device), narrow=narrow)


TASKS: dict[str, Callable[[Path, bool, torch.device], Task]] = {
    "mnist": _autoencoder("mnist"),
    "curves": _autoencoder("curves"),
    "faces": _autoencoder("faces"),
    "cifar": lambda folder, narrow, device: cifar(folder, lambda: ResNet(width=8 if narrow else 16), device),
    "cifar_vgg": lambda folder, narrow, device: cifar(folder, lambda: VGG16(width=16 if narrow else 64), device),
    "cora": lambda folder, narrow, device: citations(folder / "planetoid" / "cora.npz", device),
    "citeseer": lambda folder, narrow, device: citations(folder / "planetoid" / "citeseer.npz", device),
}
"""From the folder of the data, whether networks are narrow, and the device."""
