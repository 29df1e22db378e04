"""Small trainings under DDP with a communication hook, and the same by one process that plays all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quadric.comm import hooks
from quadric.comm.combine import adasum, graph_any2vec
from quadric.comm.communicator import Communicator

MAKE: dict[str, tuple[Callable[[nn.Module], Any], Callable[..., Any]]] = {
    "adacomp": (lambda model: hooks.AdaCompState(model.parameters(), bin=20), hooks.adacomp_hook),
    "adacomp, the paper's bins": (lambda model: hooks.AdaCompState(model.parameters()), hooks.adacomp_hook),
    "scalecom": (lambda model: hooks.ScaleComState(model.parameters(), share=0.1), hooks.scalecom_hook),
    "scalecom, filtered": (
        lambda model: hooks.ScaleComState(model.parameters(), share=0.1, memory=0.5),
        hooks.scalecom_hook,
    ),
    "adasum": (lambda model: hooks.CombinerState(), hooks.combiner_hook),
    "graph_any2vec": (lambda model: hooks.CombinerState(graph_any2vec), hooks.combiner_hook),
}
COMBINED = {"adasum": adasum, "graph_any2vec": graph_any2vec}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 4))


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    """Of frames that no other rank and step has: the class is to be read off the first numbers."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(16, 2, 8, generator=generator)
    return nn.functional.cross_entropy(model(x), (x[:, 0, 0] > 0).long() + 2 * (x[:, 1, 3] > 0).long())


def given(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    """The gradient of one rank."""
    return list(torch.autograd.grad(loss(model, rank, step), list(model.parameters())))


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """The loss on frames that nobody is trained on."""
    return sum(float(loss(model, 99, step)) for step in range(20)) / 20


class Hooked:
    """A network under DDP, in many buckets if nothing else is said, with a hook whose buckets are noted."""

    def __init__(self, name: str, megabytes: float = 0.001) -> None:
        make, hook = MAKE[name]
        self.network = network()
        self.state = make(self.network)
        self.buckets: list[list[int]] = []

        @wraps(hook)
        def counted(state: Any, bucket: Any) -> Any:
            order = [next(k for k, p in enumerate(self.network.parameters()) if p is q) for q in bucket.parameters()]
            self.buckets.append(order)
            return hook(state, bucket)

        self.model = DistributedDataParallel(self.network, bucket_cap_mb=megabytes)
        self.model.register_comm_hook(self.state, counted)

    def gradient(self, rank: int, step: int) -> list[Tensor]:
        self.model.zero_grad()
        loss(self.model, rank, step).backward()
        return [p.grad.clone() for p in self.network.parameters() if p.grad is not None]

    def residues(self) -> list[Tensor]:
        return [state["residue"] for state in self.state.state_dict()["compressors"]]

    def descend(self, lr: float) -> None:
        with torch.no_grad():
            for p in self.network.parameters():
                assert p.grad is not None
                p -= lr * p.grad


def numbers(tensors: list[Tensor]) -> list[list[float]]:
    return [t.double().flatten().tolist() for t in tensors]


def gradients(communicator: Communicator, name: str, steps: int) -> tuple[Any, Any, list[list[list[int]]], int]:
    """The gradients that DDP leaves at one point in so many steps, residues, and bytes.

    With them, of every step, which parameters each of its buckets holds.
    """
    hooked, found, buckets = Hooked(name), [], []
    for step in range(steps):
        found.append(numbers(hooked.gradient(communicator.rank, step)))
        buckets.append(hooked.buckets)
        hooked.buckets = []
    residues = [] if name in COMBINED else numbers(hooked.residues())
    return found, residues, buckets, getattr(hooked.state, "bytes_sent", 0)


def trains(communicator: Communicator, name: str | None, steps: int) -> tuple[float, bytes]:
    """The loss on new frames after a training by SGD, and the bits of the network."""
    hooked = Hooked(name or "adacomp")
    if name is None:
        hooked.model = DistributedDataParallel(hooked.network)
    for step in range(steps):
        hooked.gradient(communicator.rank, step)
        hooked.descend(0.5)
    parameters = torch.cat([p.detach().flatten() for p in hooked.network.parameters()])
    return held_out(hooked.network), parameters.numpy().tobytes()


def goes_on(communicator: Communicator, name: str) -> bool:
    """Whether a new state and network, all in one bucket, go on as the old ones, to the bit."""
    first = Hooked(name, megabytes=1)
    for step in range(3):
        first.gradient(communicator.rank, step)
        first.descend(0.5)
    kept, second = first.state.state_dict(), Hooked(name, megabytes=1)
    second.network.load_state_dict({key: value.clone() for key, value in first.network.state_dict().items()})
    second.state.load_state_dict(kept)
    for step in range(3, 6):
        for hooked in (first, second):
            hooked.gradient(communicator.rank, step)
            hooked.descend(0.5)
    pairs = zip(first.network.parameters(), second.network.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def spoils(communicator: Communicator, name: str) -> tuple[list[list[list[float]]], list[bool]]:
    """The gradients of four steps. One of the last rank, who leads in the second, is NaN there and in the third.

    And of each step whether each residue of a gradient that came out not finite is the one before, to the bit.
    """
    hooked, found, kept = Hooked(name), [], []
    for step in range(4):
        hooked.model.zero_grad()
        bad = communicator.rank == communicator.size - 1 and step in (1, 2)
        one = next(p for p in hooked.network.parameters() if len(p) == 4 and p.dim() == 1)
        before = [] if name in COMBINED else [residue.clone() for residue in hooked.residues()]
        (loss(hooked.model, communicator.rank, step) + (torch.nan if bad else 0.0) * one[0]).backward()
        gradients = [p.grad for p in hooked.network.parameters() if p.grad is not None]
        found.append(numbers(gradients))
        after = [] if name in COMBINED else hooked.residues()
        rows = zip(before, after, gradients, strict=name not in COMBINED)
        kept.append(all(a.numel() == 0 or torch.equal(a, b) for a, b, g in rows if bool(g.isnan().any())))
    return found, kept


def misused(communicator: Communicator) -> list[str]:
    """What is said of a parameter that is not in the state, and of a state of another model."""
    said, model = [], network()
    state = hooks.ScaleComState(list(model.parameters())[:-1], share=0.1)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(state, hooks.scalecom_hook)
    for wrong in (
        lambda: loss(wrapped, 0, 0).backward(),
        lambda: state.load_state_dict(hooks.ScaleComState(model.parameters(), share=0.1).state_dict()),
    ):
        try:
            wrong()
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def everything(communicator: Communicator, jobs: list[tuple[str, tuple[Any, ...]]]) -> dict[Any, Any]:
    """What so many jobs of this module leave, one after the other in the same processes."""
    return {(job, *args): globals()[job](communicator, *args) for job, args in jobs}
