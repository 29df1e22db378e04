"""What options of every floor must be like."""

from __future__ import annotations

from numbers import Integral


def check_whole(**options: object) -> None:
    """Raises ``ValueError`` for the first that is no whole number: before any work, not in the middle of it.

    >>> check_whole(max_steps=2.5)
    Traceback (most recent call last):
    ValueError: max_steps=2.5: give a whole number
    """
    for name, value in options.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name}={value}: give a whole number")
