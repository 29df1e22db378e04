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
"""Images of CIFAR-10's training set that are held out."""
EVALUATED = 5000
"""How many images of CIFAR-10 an evaluation is of, seen ones and validation ones each; of narrow networks 2,000."""

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
        test: measured of a model that is done; not looked at to tune.
        accuracy: whether it is judged by ``validation_accuracy``, and not by the training loss.
        schedule: of statistics and inverses, that of the authors' code.
        decay: of the weights (not of biases and norms) in each step, decoupled, times the schedule of the rates.
        penalty: times half the squared length of the parameters is added to the loss.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    batches: Callable[[torch.Generator], Iterator[Batch]]
    measure: Callable[[nn.Module], Measures]
    test: Callable[[nn.Module], Measures] = lambda model: {}
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

    def evaluate(self, model: nn.Module, loss: Loss, first: int | None = None) -> tuple[float, float]:
        """As `evaluate`, on the first ones or all."""
        images = [self.normalised(part) for part in self.images[:first].split(CHUNK)]
        return evaluate(model, loss, images, self.labels[:first].split(CHUNK))


def cifar(folder: Path, build: Callable[[], nn.Module], device: torch.device, *, evaluated: int = EVALUATED) -> Task:
    """A network on CIFAR-10: 45,000 images to train on, cropped and mirrored, 5,000 to tune by, 10,000 to test."""
    path = folder / "cifar10" / "cifar10_jpeg.npz"
    images, labels = read_cifar10(path, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[:VALIDATION], order[VALIDATION:]
    deviation, mean = (part[0].to(device) for part in torch.std_mean(images[kept].float(), (0, 2, 3), keepdim=True))

    def pictures(images: Tensor, labels: Tensor) -> Pictures:
        return Pictures(images.to(device), labels.to(device), mean, deviation)

    seen, unseen = (pictures(images[part], labels[part]) for part in (kept, held_out))
    unknown, loss, change = pictures(*read_cifar10(path, "test")), CrossEntropy(), CropFlip()

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        for places in shuffled(len(seen.labels), 128, generator):
            places = places.to(device)
            yield seen.normalised(change(seen.images[places], generator)), seen.labels[places]

    def measure(model: nn.Module) -> Measures:
        return {
            "training_loss": seen.evaluate(model, loss, evaluated)[0],
            "validation_accuracy": unseen.evaluate(model, loss, evaluated)[1],
        }

    def test(model: nn.Module) -> Measures:
        return {"test_accuracy": unknown.evaluate(model, loss)[1]}

    return Task(build, loss, batches, measure, test, True, Schedule(statistics=10, inverses=100), decay=5e-4)


def citations(path: Path, device: torch.device) -> Task:
    """A graph convolutional network on all of a citation network at once."""
    graph = read_planetoid(path).to(device)
    adjacency = normalised_adjacency(graph.edges, len(graph.labels))
    loss, features = CrossEntropy(), graph.features.to_sparse()
    training, validation, unknown = (graph.labels_of(part) for part in (graph.training, graph.validation, graph.test))

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield features, training

    def measure(model: nn.Module) -> Measures:
        return {
            "training_loss": evaluate(model, loss, [features], [training])[0],
            "validation_accuracy": evaluate(model, loss, [features], [validation])[1],
        }

    def test(model: nn.Module) -> Measures:
        return {"test_accuracy": evaluate(model, loss, [features], [unknown])[1]}

    def build() -> nn.Module:
        return GCN(adjacency, features.shape[1], graph.classes)

    return Task(build, loss, batches, measure, test, True, penalty=5e-4)


def _autoencoder(name: str) -> Callable[[Path, bool, torch.device], Task]:
    return lambda folder, narrow, device: autoencoding(SETS[name](folder).to(device), narrow=narrow)


def _cifar(
    build: Callable[[int], nn.Module], width: int, narrow_width: int
) -> Callable[[Path, bool, torch.device], Task]:
    def task(folder: Path, narrow: bool, device: torch.device) -> Task:
        own = narrow_width if narrow else width
        return cifar(folder, lambda: build(own), device, evaluated=2000 if narrow else EVALUATED)

    return task


def _citations(name: str) -> Callable[[Path, bool, torch.device], Task]:
    return lambda folder, narrow, device: citations(folder / "planetoid" / f"{name}.npz", device)


TASKS: dict[str, Callable[[Path, bool, torch.device], Task]] = {
    "mnist": _autoencoder("mnist"),
    "curves": _autoencoder("curves"),
    "faces": _autoencoder("faces"),
    "cifar": _cifar(lambda width: ResNet(width=width), 16, 8),
    "cifar_vgg": _cifar(lambda width: VGG16(width=width), 64, 16),
    "cora": _citations("cora"),
    "citeseer": _citations("citeseer"),
}
"""From the folder of the data, whether networks are narrow, and the device."""
