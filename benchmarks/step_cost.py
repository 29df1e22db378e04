"""What a step of the block-diagonal family costs over one of Adam's, side by side in one run.

    python benchmarks/step_cost.py [--tasks mlp vgg] [--methods ...] [--threads 2] [--device cpu] [--json FILE]

Two tasks: ``mlp``, the autoencoder 784-1000-500-250-30-250-500-1000-784 on 1,000 images a step; ``vgg``, six
convolutions with batch normalisation (32-32-64-64-128-128) and two fully connected layers on 128 images of 3 x 32 x 32.
Every step, from ``zero_grad()`` on, is followed by one of Adam's on a copy of the model, and the row is the ratio of
their sums over a cycle of ``t2`` steps, in which inverses are made once and statistics every ``t1``. Of a cycle of 100
steps a fifth is timed, that with the inverses, and another fifth, which stands for the rest.

The peers are left out where they cannot be imported: SOAP and Shampoo of `pytorch_optimizer`, torch's Muon (on
matrices, Adam on the rest), `distributed_shampoo` of torch-shampoo, and `kfac` of kfac-pytorch. The last column is the
memory of the optimiser's state over that of the parameters.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import Table, now
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.kbfgs import kbfgs, kbfgs_l
from quadric.optim.kfac import kfac
from quadric.optim.mini_block import mini_block_fisher
from quadric.optim.shampoo import shampoo
from quadric.optim.tnt import tnt

WINDOW = 20
"""Steps that are timed in a row."""
RATE = 1e-5

Step = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss."""

    build: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]


def mlp() -> Task:
    """The autoencoder on MNIST's sizes; the logistic loss is summed over pixels."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i in range(8):
            layers += [nn.Linear(sizes[i], sizes[i + 1])] + ([] if i in (3, 7) else [nn.ReLU()])
        return nn.Sequential(*layers)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)

    images = torch.rand(1000, 784)
    return Task(build, images, images, loss)


def vgg() -> Task:
    """A small network in the style of VGG on CIFAR-10's sizes."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 32, 0, 64, 64, 0, 128, 128, 0):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 10))

    return Task(build, torch.randn(128, 3, 32, 32), torch.randint(10, (128,)), functional.cross_entropy)


TASKS: dict[str, Callable[[], Task]] = {"mlp": mlp, "vgg": vgg}


class Stepper:
    """A model and its optimisers at work, on the same batch again and again."""

    def __init__(self, task: Task, device: torch.device, build: Callable[[nn.Module], Any]) -> None:
        torch.manual_seed(0)
        self.task, self.model = task, task.build().to(device)
        self.inputs, self.targets = task.inputs.to(device), task.targets.to(device)
        built = build(self.model)
        self.optimizers = list(built) if isinstance(built, tuple) else [built]

    def __call__(self) -> None:
        first = self.optimizers[0]
        if isinstance(first, BlockDiagonal) and first.wants_closure:
            first.step(self._pass)
            return
        self._pass()
        for optimizer in self.optimizers:
            optimizer.step()

    def _pass(self) -> Tensor:
        self.optimizers[-1].zero_grad()
        self.model.zero_grad()
        loss = self.task.loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    @property
    def memory(self) -> float:
        """Numbers in the state over numbers in the parameters."""
        kept = sum(_numbers(optimizer.state_dict()) for optimizer in self.optimizers)
        return kept / sum(p.numel() for p in self.model.parameters())


def _numbers(held: Any) -> int:
    if isinstance(held, Tensor):
        return held.numel()
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return sum(_numbers(part) for part in parts)


@dataclass(frozen=True)
class Method:
    """An optimiser and its cycle."""

    name: str
    t1: int
    t2: int
    build: Callable[[nn.Module], Any]


OURS = {
    "mini-block Fisher": mini_block_fisher,
    "KFAC": kfac,
    "K-BFGS": kbfgs,
    "K-BFGS(L)": kbfgs_l,
    "Shampoo": shampoo,
    "TNT": tnt,
}


def _ours() -> list[Method]:
    methods = []
    for name, build in OURS.items():
        for t1, t2 in ((1, 20), (10, 100)):
            schedule = Schedule(statistics=t1, inverses=t2)
            methods.append(Method(name, t1, t2, lambda m, b=build, s=schedule: b(m, lr=RATE, schedule=s)))
    return methods


def _muon(model: nn.Module) -> tuple[Any, Any]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.Muon(matrices, lr=RATE), torch.optim.Adam(rest, lr=RATE)


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(model.parameters(), lr=RATE, **options)

    return build


def _torch_shampoo(model: nn.Module) -> Any:
    import distributed_shampoo

    return distributed_shampoo.DistributedShampoo(
        model.parameters(),
        lr=RATE,
        epsilon=1e-8,
        max_preconditioner_dim=1024,
        precondition_frequency=20,
        start_preconditioning_step=20,
        grafting_config=distributed_shampoo.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    )


def _kfac_pytorch(model: nn.Module) -> tuple[Any, Any]:
    from kfac.preconditioner import KFACPreconditioner

    return (
        KFACPreconditioner(model, factor_update_steps=1, inv_update_steps=20, lr=RATE, compute_method="inverse"),
        torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9),
    )


PEERS = [
    Method("torch Muon", 1, 20, _muon),
    Method("pytorch_optimizer SOAP", 10, 10, _pytorch_optimizer("SOAP", max_precondition_dim=1024)),
    Method("pytorch_optimizer Shampoo", 1, 20, _pytorch_optimizer("Shampoo", preconditioning_compute_steps=20)),
    Method("torch-shampoo", 1, 20, _torch_shampoo),
    Method("kfac-pytorch", 1, 20, _kfac_pytorch),
]


def ratio(method: Method, task: Task, device: torch.device) -> tuple[float, Stepper]:
    """Seconds of a cycle of the method's steps over those of as many of Adam's, one after the other."""
    adam = Stepper(task, device, lambda m: torch.optim.Adam(m.parameters(), lr=RATE, fused=device.type == "cuda"))
    stepper = Stepper(task, device, method.build)
    for _ in range(3):
        stepper()
        adam()
    optimizer, long = stepper.optimizers[0], method.t2 > WINDOW
    if isinstance(optimizer, BlockDiagonal):
        optimizer.param_groups[0]["step"] = method.t2  # the next one makes inverses
    first = _timed(stepper, adam, min(WINDOW, method.t2) if isinstance(optimizer, BlockDiagonal) else WINDOW)
    if not long:
        return first[0] / first[1], stepper
    rest = _timed(stepper, adam, WINDOW)
    times = method.t2 / WINDOW - 1
    return (first[0] + times * rest[0]) / (first[1] + times * rest[1]), stepper


def _timed(one: Step, other: Step, steps: int) -> tuple[float, float]:
    totals = [0.0, 0.0]
    for _ in range(steps):
        for k, step in enumerate((one, other)):
            start = now()
            step()
            totals[k] += now() - start
    return totals[0], totals[1]


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [*_ours(), *PEERS]
    names = list(dict.fromkeys(method.name for method in methods))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore")
    table = Table(("task", "method", "t1", "t2", "steps of Adam", "state over parameters"), chosen.json)
    for name in chosen.tasks:
        torch.manual_seed(0)
        task = TASKS[name]()
        for method in methods:
            if method.name not in chosen.methods:
                continue
            try:
                found, stepper = ratio(method, task, torch.device(chosen.device))
            except (ImportError, AttributeError) as missing:
                print(f"{method.name} is left out: {missing}", file=sys.stderr, flush=True)
                continue
            row = {"task": name, "method": method.name, "t1": method.t1, "t2": method.t2}
            row |= {"ratio_to_adam": found, "state": stepper.memory}
            table.add(row, [name, method.name, str(method.t1), str(method.t2), f"{found:.2f}", f"{stepper.memory:.1f}"])


if __name__ == "__main__":
    main()
