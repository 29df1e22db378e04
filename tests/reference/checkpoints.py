"""Jobs for several ranks that save and load together."""

from __future__ import annotations

import math
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quadric.comm import checkpoint
from quadric.comm.communicator import Communicator, Solo
from reference.ranks import die


def state(step: int) -> dict[str, Any]:
    """All that a state may hold."""
    generator = torch.Generator().manual_seed(step)
    model = nn.Linear(40, 30)
    nn.init.constant_(model.weight, step)
    nn.init.zeros_(model.bias)
    return {
        "model": model.state_dict(),
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "m": torch.randn(3, 50, generator=generator)}, 1: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "amsgrad": False}],
        },
        "odd": {"": torch.arange(12).view(3, 4).T, "a/b": torch.zeros(0, 2), "a": {"b": torch.ones(2).bfloat16()}},
        "keys": {1: torch.tensor(True), "1": torch.tensor([1j])},
        "best": [math.inf, -math.inf, 0.1 + 0.2, 2**70, "ü\n"],
        "step": step,
    }


def same(a: Any, b: Any) -> bool:
    """To the bit, with types of containers and numbers; an `OrderedDict` is a dict."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def flip(path: Path, content: bytes) -> None:
    """Flips a bit in the middle of ``content``, which the file holds once."""
    before, found, after = path.read_bytes().partition(content)
    assert found and content not in after
    middle = len(content) // 2
    path.write_bytes(before + content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] + after)


def saves(communicator: Communicator, folder: Path, step: int) -> None:
    checkpoint.save(state(step), folder, communicator)


def loads(communicator: Communicator, folder: Path) -> int:
    """The step of the state, which is whole."""
    loaded = checkpoint.load(folder, communicator)
    assert same(loaded, state(loaded["step"]))
    return loaded["step"]


def saves_and_loads_alone(communicator: Communicator, folder: Path) -> int:
    """Each rank on its own, one after the other."""
    for rank in range(communicator.size):
        if rank == communicator.rank:
            saves(Solo(), folder / str(rank), rank)
            step = loads(Solo(), folder / str(rank))
        communicator.agree("whose turn it is", rank)
    return step


def saves_other_states(communicator: Communicator, folder: Path, what: str) -> None:
    """Rank 1 has one more in one tensor, or number."""
    value: dict[str, Any] = {"weight": torch.zeros(2), "seconds": 1.0}
    value[what] += communicator.rank
    checkpoint.save(value, folder, communicator)


def dies_at(communicator: Communicator, folder: Path, rank: int, event: str, path: str) -> str | None:
    """One rank does, in the second of two saves, as it is about to open, rename or remove what ends in ``path``."""
    saves(communicator, folder, 1)
    if communicator.rank == rank:
        sys.addaudithook(lambda name, args: die() if name == event and str(args[0]).endswith(path) else None)
    try:
        saves(communicator, folder, 2)
    except RuntimeError as error:
        return str(error)
    return None


def cannot_write(communicator: Communicator, folder: Path) -> None:
    """Rank 1 cannot, in the second of two saves, which has much to write for every rank."""
    saves(communicator, folder, 1)
    if communicator.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    checkpoint.save({**state(2), "large": [torch.zeros(100_000)] * communicator.size}, folder, communicator)
