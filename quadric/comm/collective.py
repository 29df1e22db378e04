"""The ranks of a job over torch.distributed: gloo for tensors of the CPU, NCCL for those of a GPU.

No result is seen before it is whole. A collective that fails leaves part of its sum in the buffer (measured with gloo:
other parts on other ranks), so every collective works on a copy, waits for its end, and only then writes back.

That a sum is the same to the bit on all ranks follows from how it is made: a ring sums each piece at one rank in the
order of the ranks and passes the result on.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import takewhile
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quadric.comm.communicator import Communicator, FirstFailed, Solo

T = TypeVar("T")

TIMEOUT = 120.0
"""Seconds a collective waits for the other ranks: more than the slowest rank's micro-batches take, and no more."""

_PATIENCE = timedelta(days=365)
_GLANCE = 0.02  # seconds between looks at whether rank 0 is done: in between, a signal can end the wait
_SAID = 1000  # bytes of a message from rank 0
_SHOWN = 120


class Collective(Communicator):
    """One rank of a job of several processes, joined when it is built.

    A job under ``torchrun`` joins by `from_environment`. Set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` there: without it
    most restarts of a job fail (pytorch issue 135712).

    One rank that dies ends the collectives of all others with an error, one that falls silent does so after
    ``timeout``, except in `first` and `first_then_all`, where the ranks wait in a group of their own that knows no
    timeout. From then on this object refuses everything: a survivor may have finished the sum in which another failed,
    so the survivors no longer know what the others hold.

    Tensors of other sizes on other ranks cannot be told apart from a damaged connection: gloo ends the process.
    `agree` on sizes first where they may differ.

    Args:
        rank: this one.
        size: how many ranks there are.
        meeting: where they meet, as ``torch.distributed.init_process_group`` takes it: ``tcp://HOST:PORT`` of rank 0
            (which listens on all its interfaces), or ``file:///PATH`` of a file that does not exist yet.
        backend: ``gloo``, ``nccl`` or both, ``cpu:gloo,cuda:nccl``; None: both where there is a GPU, gloo elsewhere.
        timeout: seconds to wait for the other ranks, here and in every collective.

    Raises:
        ValueError: sizes out of range, or the process belongs to a job already.
        RuntimeError: not all ranks came.
    """

    def __init__(
        self, rank: int, size: int, meeting: str, *, backend: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank}, size={size}: give a rank from 0 to size - 1")
        self._join(backend, timeout, rank=rank, world_size=size, init_method=meeting)

    @classmethod
    def from_environment(cls, *, backend: str | None = None, timeout: float = TIMEOUT) -> Communicator:
        """What ``torchrun`` says this process is; a `Solo` when it was not started by it.

        Where there are GPUs, the one of the process's number on its machine becomes the current one.

        Raises:
            ValueError: the machine has fewer GPUs than processes, or the process belongs to a job already.
            RuntimeError: not all ranks came.
        """
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return Solo()
        if torch.cuda.is_available() and backend != "gloo":
            local, devices = dist.get_node_local_rank(0), torch.cuda.device_count()
            if local >= devices:
                raise ValueError(
                    f"this is process {local} of a machine with {devices} GPUs: start at most one process for each "
                    "(torchrun --nproc-per-node), or pass backend='gloo' to train on the CPU"
                )
            torch.cuda.set_device(local)
        self = cls.__new__(cls)
        self._join(backend, timeout)
        return self

    def _join(self, backend: str | None, timeout: float, **place: Any) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: give the seconds to wait for other ranks")
        if dist.is_initialized():
            raise ValueError("this process belongs to a torch.distributed job already: close that first")
        if backend is None:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        self._timeout = timedelta(seconds=timeout)
        try:
            dist.init_process_group(backend, timeout=self._timeout, **place)
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except RuntimeError as error:
            if dist.is_initialized():
                dist.destroy_process_group()
            raise RuntimeError(
                f"joining the job failed: not all ranks came within {timeout:g} s, or they cannot reach each other "
                f"({_first_line(error)}); check that all were started with the same meeting place and size"
            ) from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.bytes_sent = 0
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._lost: str | None = None
        self._closed = False

    @torch.no_grad()
    def sum_(self, *tensors: Tensor) -> None:
        kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
        groups = [[t for t in tensors if (t.dtype, t.device) == kind and t.numel()] for kind in kinds]
        groups = [group for group in groups if group]
        buckets = [torch.cat([t.reshape(-1) for t in group]) for group in groups]
        with self.operation("a sum", *buckets):
            works = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
            for work in works:
                self._finish(work)
        for group, bucket in zip(groups, buckets, strict=True):
            pieces = bucket.split([t.numel() for t in group])
            for tensor, piece in zip(group, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    @torch.no_grad()
    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        self._check_source(source)
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self.operation("a broadcast", *([copy] if self.rank == source else [])):
            self._finish(dist.broadcast(copy, source, async_op=True))
        tensor.copy_(copy)

    def agree(self, what: str, value: object) -> None:
        text = repr(value).encode()
        lengths = self._gather(what, len(text).to_bytes(8, "big") + hashlib.sha256(text).digest())
        if len(set(lengths)) == 1:
            return
        longest = max(int.from_bytes(length[:8], "big") for length in lengths)
        texts = [t.rstrip(b"\0").decode() for t in self._gather(what, text.ljust(longest, b"\0"))]
        same = sum(1 for _ in takewhile(lambda c: len(set(c)) == 1, zip(*texts, strict=False)))
        raise ValueError(f"the ranks disagree on {what}: {_listed(texts, same)}; start them all alike")

    def gather(self, what: str, text: str) -> list[str]:
        message = text.encode()
        lengths = [int.from_bytes(length, "big") for length in self._gather(what, len(message).to_bytes(8, "big"))]
        messages = self._gather(what, message.ljust(max(1, *lengths), b"\0"))
        return [m[:length].decode() for m, length in zip(messages, lengths, strict=True)]

    def first(self, what: str, work: Callable[[], None]) -> None:
        if self.rank:
            said = self._from_first(what)
            if said:
                raise FirstFailed(f"{what}, which rank 0 does for all, failed there: {said}")
            return
        self._check_not_lost(what)
        try:
            work()
        except BaseException as error:
            with suppress(RuntimeError):
                self._from_first(what, str(error) or type(error).__name__)
            raise
        self._from_first(what)

    def first_then_all(self, what: str, work: Callable[[], T]) -> T:
        made: list[T] = []
        self.first(what, lambda: made.append(work()))
        if self.rank:
            made.append(work())
        with self.operation(what):
            self._wait(dist.all_reduce(torch.zeros(1), group=self._patient, async_op=True))
        return made[0]

    def _from_first(self, what: str, text: str = "") -> str:
        """What rank 0 says; ``text`` is used there alone."""
        message = torch.frombuffer(bytearray(text.encode()[:_SAID].ljust(_SAID, b"\0")), dtype=torch.uint8)
        with self.operation(what):
            self._wait(dist.broadcast(message, 0, group=self._patient, async_op=True))
        return message.numpy().tobytes().rstrip(b"\0").decode(errors="ignore")

    def _wait(self, work: Any) -> None:
        """Without a timeout."""
        while not work.is_completed():
            threading.Event().wait(_GLANCE)
        work.wait()

    def close(self) -> None:
        if not self._closed:
            self._closed, self._lost = True, "the job was left"
            dist.destroy_process_group()

    def _gather(self, what: str, message: bytes) -> list[bytes]:
        """The messages, of one length, of all ranks."""
        own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._device)
        all_ = [torch.empty_like(own) for _ in range(self.size)]
        with self.operation(f"the agreement on {what}"):
            self._finish(dist.all_gather(all_, own, async_op=True))
        return [bytes(message.cpu().numpy()) for message in all_]

    def _finish(self, work: Any) -> None:
        # With a timeout NCCL too blocks and raises; without, an error shows after the result has been used.
        work.wait(self._timeout)

    def _check_not_lost(self, what: str) -> None:
        if self._lost:
            raise RuntimeError(f"{what} on rank {self.rank} of {self.size}: impossible since {self._lost}")

    @contextmanager
    def operation(self, what: str, *sent: Tensor) -> Iterator[None]:
        """Around what the ranks do together: a ``RuntimeError`` of it means that they are lost to each other.

        For calls of torch.distributed that this class does not have; ``sent`` is counted in ``bytes_sent``.

        Raises:
            RuntimeError: it failed, or an operation before it did.
        """
        self._check_not_lost(what)
        try:
            yield
        except RuntimeError as error:
            self._lost = f"{what} failed"
            raise RuntimeError(
                f"{what} on rank {self.rank} of {self.size} failed: another rank died, or was silent for "
                f"{self._timeout.total_seconds():g} s ({_first_line(error)}). Its result was thrown away; end "
                "this process and start all ranks again from the last checkpoint"
            ) from error
        self.bytes_sent += sum(tensor.nbytes for tensor in sent)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _listed(texts: list[str], same: int) -> str:
    """Who says what, from shortly before where the texts part."""
    start = max(0, same - _SHOWN // 3) if max(map(len, texts)) > _SHOWN else 0
    said: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        shown = ("..." if start else "") + text[start : start + _SHOWN]
        said.setdefault(shown + ("..." if len(text) > start + _SHOWN else ""), []).append(str(rank))
    return ", ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(ranks)} {'have' if len(ranks) > 1 else 'has'} {shown}"
        for shown, ranks in said.items()
    )
