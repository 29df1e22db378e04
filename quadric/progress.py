"""How long work reports how far it is, without deciding who looks at it.

A function with a long loop takes ``progress: Progress = silent`` and wraps its iterable. The command line passes
a bar, a test passes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Passes ``items`` through unchanged and may show how many of ``total`` have gone by."""

    def __call__(self, items: Iterable[T], *, total: int | None, what: str) -> Iterable[T]: ...


def silent(items: Iterable[T], *, total: int | None, what: str) -> Iterable[T]:
    """The progress nobody watches."""
    return items
