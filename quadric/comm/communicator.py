"""What the ranks of a job have to say to each other: sums, broadcasts, and that they agree.

Only a communicator sees other machines. Whoever holds one runs unchanged on 1 or N ranks, as long as all ranks call
the same methods in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from torch import Tensor

from quadric.stopwatch import Stopwatch

T = TypeVar("T")


class FirstFailed(RuntimeError):
    """What rank 0 does for all has failed there, where the error itself is raised."""


class Communicator(ABC):
    """One of the ranks 0, ..., size - 1 of a job. Every method is called by all ranks, or by none.

    It is its own context manager: leaving the context leaves the job.

    Attributes:
        rank: this one.
        size: how many there are.
        bytes_sent: what this rank has put into sums and broadcasts so far, in bytes. A ring of N ranks carries each
            byte of a sum 2 (N - 1) / N times over every rank's wire.
    """

    rank: int
    size: int
    bytes_sent: int

    @abstractmethod
    def sum_(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the ranks, which is the same to the bit on all of them.

        Tensors of one type travel together, so that several small ones cost no more than one. All ranks give
        the same number of tensors, of the same shapes and types.

        Raises:
            RuntimeError: another rank died or fell silent. The tensors are as they were.
        """

    @abstractmethod
    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replaces ``tensor`` by that of rank ``source``.

        Raises:
            ValueError: there is no such rank.
            RuntimeError: another rank died or fell silent. The tensor is as it was.
        """

    @abstractmethod
    def agree(self, what: str, value: object) -> None:
        """Checks that ``value``, a number, a string or a collection of such, is the same on all ranks.

        Values are compared as ``repr`` writes them: floats to the bit, a NaN with a NaN as equal.

        Raises:
            ValueError: it differs; on all ranks, with ``what`` and the different values.
            RuntimeError: another rank died or fell silent.
        """

    @abstractmethod
    def gather(self, what: str, text: str) -> list[str]:
        """The texts of all ranks, in their order; ``what`` they are about is named in errors.

        Raises:
            RuntimeError: another rank died or fell silent.
        """

    @abstractmethod
    def first(self, what: str, work: Callable[[], None]) -> None:
        """Has rank 0 do ``work`` while the others wait, as long as it takes.

        Raises:
            FirstFailed: on the others, when the work fails; on rank 0, its own error is raised.
            RuntimeError: rank 0 died.
        """

    @abstractmethod
    def first_then_all(self, what: str, work: Callable[[], T]) -> T:
        """What ``work`` returns: rank 0 does it first, and then the others, who find what it has left on the disk.

        Each waits for the others, as long as it takes.

        Raises:
            FirstFailed: on the others, when the work of rank 0 fails; a rank whose work fails raises its own error.
            RuntimeError: another rank died.
        """

    @abstractmethod
    def close(self) -> None:
        """Leaves the job. Nothing can be said to others afterwards."""

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_source(self, source: int) -> None:
        if not 0 <= source < self.size:
            raise ValueError(f"source={source}: the ranks are 0 to {self.size - 1}")


class Solo(Communicator):
    """The only rank of a job of one.

    >>> import torch
    >>> total = torch.ones(2)
    >>> Solo().sum_(total)
    >>> total
    tensor([1., 1.])
    """

    rank, size, bytes_sent = 0, 1, 0

    def sum_(self, *tensors: Tensor) -> None:
        pass

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        self._check_source(source)

    def agree(self, what: str, value: object) -> None:
        pass

    def gather(self, what: str, text: str) -> list[str]:
        return [text]

    def first(self, what: str, work: Callable[[], None]) -> None:
        work()

    def first_then_all(self, what: str, work: Callable[[], T]) -> T:
        return work()

    def close(self) -> None:
        pass


class Timed(Communicator):
    """A communicator whose conversations are timed as ``communication``, waiting for the other ranks included.

    Args:
        communicator: who talks.
        stopwatch: told the time.
    """

    def __init__(self, communicator: Communicator, stopwatch: Stopwatch) -> None:
        self._communicator, self._stopwatch = communicator, stopwatch
        self.rank, self.size = communicator.rank, communicator.size

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._communicator.bytes_sent

    def sum_(self, *tensors: Tensor) -> None:
        with self._stopwatch.on("communication"):
            self._communicator.sum_(*tensors)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        with self._stopwatch.on("communication"):
            self._communicator.broadcast_(tensor, source)

    def agree(self, what: str, value: object) -> None:
        with self._stopwatch.on("communication"):
            self._communicator.agree(what, value)

    def gather(self, what: str, text: str) -> list[str]:
        with self._stopwatch.on("communication"):
            return self._communicator.gather(what, text)

    def first(self, what: str, work: Callable[[], None]) -> None:
        with self._stopwatch.on("communication"):
            self._communicator.first(what, work)

    def first_then_all(self, what: str, work: Callable[[], T]) -> T:
        with self._stopwatch.on("communication"):
            return self._communicator.first_then_all(what, work)

    def close(self) -> None:
        self._communicator.close()
