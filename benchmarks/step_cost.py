"""What a step of the block-diagonal family costs over one of Adam's, side by side in one run.

    python benchmarks/step_cost.py [--tasks mlp vgg] [--methods ...] [--threads 2] [--device cpu] [--json FILE]

Two tasks: ``mlp``, the autoencoder 784-1000-500-250-30-250-500-1000-784 on 1,000 images a step; ``vgg``, six
convolutions with batch normalisation (32-32-64-64-128-128) and two fully connected layers on 128 images of 3 x 32 x 32.
Every step, from ``zero_grad()`` on, is followed by one of Adam's on a copy of the model.

The family's steps are of three kinds: those that make inverses, those that make statistics alone, and the others. Each
kind is timed ``--repeats`` times (inverses half as often), by turns, and a cycle of T2 steps put together from the
medians: one of the first kind, T2 / T1 - 1 of the second and the rest of the third. The row is its seconds over those
of as many median steps of Adam. The kinds of a peer's steps are not known from outside: the row is the sum of 20 steps
as they come, a cycle or two (of Muon, whose steps are all alike, 4), over as many median steps of Adam. What other work
of the machine adds to single steps is thus in the sums of peers, but not in the medians of the family: compare the two
on a machine that is otherwise idle.

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
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import Table, check_machine, now
from quadric.optim.block_diagonal import BlockDiagonal, Schedule
from quadric.optim.kbfgs import kbfgs, kbfgs_l
from quadric.optim.kfac import kfac
from quadric.optim.mini_block import mini_block_fisher
from quadric.optim.shampoo import shampoo
from quadric.optim.tnt import tnt

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
    """An optimiser, and the cycles that it is judged by.

    Attributes:
        cycles: pairs of T1 and T2.
        steps: of a peer, that are timed: a cycle, or fewer where all are alike.
    """

    name: str
    build: Callable[[nn.Module], Any]
    cycles: tuple[tuple[int, int], ...] = ((1, 20),)
    steps: int = 20


T1, T2 = 10, 100
"""The schedule under which kinds of steps are timed: by their number."""
CYCLES = ((1, 20), (10, 100))


def _ours(name: str, build: Callable[..., BlockDiagonal]) -> Method:
    schedule = Schedule(statistics=T1, inverses=T2)
    return Method(name, lambda model: build(model, lr=RATE, schedule=schedule), CYCLES)


OURS = [
    _ours("mini-block Fisher", mini_block_fisher),
    _ours("KFAC", kfac),
    _ours("K-BFGS", kbfgs),
    _ours("K-BFGS(L)", kbfgs_l),
    _ours("Shampoo", shampoo),
    _ours("TNT", tnt),
]


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
    Method("torch Muon", _muon, steps=4),
    Method("pytorch_optimizer SOAP", _pytorch_optimizer("SOAP", max_precondition_dim=1024), ((10, 10),)),
    Method("pytorch_optimizer Shampoo", _pytorch_optimizer("Shampoo", preconditioning_compute_steps=20)),
    Method("torch-shampoo", _torch_shampoo),
    Method("kfac-pytorch", _kfac_pytorch),
]


class Race:
    """A method and Adam on copies of a model, step by step."""

    def __init__(self, method: Method, task: Task, device: torch.device) -> None:
        self.method = method
        self.adam = Stepper(
            task, device, lambda m: torch.optim.Adam(m.parameters(), lr=RATE, fused=device.type == "cuda")
        )
        self.ours = Stepper(task, device, method.build)

    def ratios(self, repeats: int) -> dict[tuple[int, int], float]:
        """Seconds of a cycle of the method's steps over those of as many median steps of Adam's."""
        if isinstance(self.ours.optimizers[0], BlockDiagonal):
            return self._by_kinds(self.ours.optimizers[0], repeats)
        for _ in range(3):
            self._timed()
        pairs = [self._timed() for _ in range(self.method.steps)]
        ours, adam = sum(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
        return {self.method.cycles[0]: ours / (len(pairs) * adam)}

    def _by_kinds(self, optimizer: BlockDiagonal, repeats: int) -> dict[tuple[int, int], float]:
        numbers = {"inverses": T2, "statistics": T2 + T1, "rest": T2 + 1}
        found: dict[str, list[float]] = {kind: [] for kind in (*numbers, "adam")}
        for turn in range(-1, repeats):  # the first is to warm up
            for kind, number in numbers.items():
                if kind == "inverses" and turn > 0 and turn % 2:
                    continue
                optimizer.param_groups[0]["step"] = number
                ours, adam = self._timed()
                if turn >= 0:
                    found[kind].append(ours)
                    found["adam"].append(adam)
        inverses, statistics, rest, adam = (median(seconds) for seconds in found.values())
        return {
            (t1, t2): (inverses + (t2 // t1 - 1) * statistics + (t2 - t2 // t1) * rest) / (t2 * adam)
            for t1, t2 in self.method.cycles
        }

    def _timed(self) -> tuple[float, float]:
        seconds = []
        for step in (self.ours, self.adam):
            start = now()
            step()
            seconds.append(now() - start)
        return seconds[0], seconds[1]


def main() -> None:
    """Prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [*OURS, *PEERS]
    names = [method.name for method in methods]
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="of each kind of step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.repeats < 1:
        sys.exit("--repeats must be at least 1")
    check_machine(chosen)
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
                race = Race(method, task, torch.device(chosen.device))
                ratios = race.ratios(chosen.repeats)
            except (ImportError, AttributeError) as missing:
                print(f"{method.name} is left out: {missing}", file=sys.stderr, flush=True)
                continue
            state = race.ours.memory
            for (t1, t2), ratio in ratios.items():
                row = {"task": name, "method": method.name, "t1": t1, "t2": t2, "ratio_to_adam": ratio, "state": state}
                table.add(row, [name, method.name, str(t1), str(t2), f"{ratio:.2f}", f"{state:.1f}"])


if __name__ == "__main__":
    main()
