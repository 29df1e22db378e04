"""How much of what was recorded for curvature products is kept: as much as fits, and the rest is recorded anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def retained(batches: Sequence[Callable[[], R]], memory: int) -> list[Callable[[], R]]:
    """Each micro-batch as recorded, as many as fit ``memory`` bytes; the others to be recorded when they are used.

    The first stays in any case: a product needs the memory of one.
    """
    if len(batches) == 1:
        return [partial(_same, batches[0]())]
    kept: list[Callable[[], R]] = []
    for batch in batches:
        if kept and memory <= 0:
            kept.append(batch)
            continue
        weighed = _Weighed()
        with weighed:
            recorded = batch()
        memory -= weighed.bytes
        if kept and memory < 0:
            del recorded
            kept.append(batch)
        else:
            kept.append(partial(_same, recorded))
    return kept


def free(device: torch.device, ranks: int = 1) -> int:
    """Bytes that are free on a device, or for one of several ranks on this machine where the device is its CPU."""
    if device.type == "cuda":
        held_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_by_torch
    return min([_available(), *_limits()]) // ranks


def _available() -> int:
    """Of the machine's memory, what could be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits() -> Iterable[int]:
    """What the control group of a container leaves, where it has a limit."""
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return
    if limit != "max":
        yield max(0, int(limit) - int(used))


def _same(recorded: R) -> R:
    return recorded


class _Weighed(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the tensors that autograd saves inside; views of one storage count once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        super().__init__(self._count, lambda saved: saved)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _count(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return saved.detach()  # the tensor itself may know the node it is saved in: a circle that is never freed
