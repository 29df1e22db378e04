"""What the options of a job's records must be like, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from quadric.data.stream import MICRO_FRAMES
from quadric.options import check_whole

Rule = tuple[Callable[[Any], bool], str]
POSITIVE: Rule = (lambda value: 0 < value < math.inf, "must be positive")
NOT_NEGATIVE: Rule = (lambda value: 0 <= value < math.inf, "must not be negative")
NONE_OR_NOT_NEGATIVE: Rule = (lambda value: value is None or 0 <= value < math.inf, "must not be negative")
NONE_OR_POSITIVE: Rule = (lambda value: value is None or 0 < value < math.inf, "must be positive")
AT_LEAST_ONE: Rule = (lambda value: 1 <= value < math.inf, "must be at least 1, which keeps the size")
SHARE: Rule = (lambda value: 0 <= value <= 1, "must be between 0 and 1")
WINDOW: Rule = (
    lambda value: 1 <= value <= MICRO_FRAMES,
    f"must be between 1 and {MICRO_FRAMES}, the frames of a micro-batch",
)
ALL_POSITIVE: Rule = (
    lambda values: len(values) > 0 and all(0 < v < math.inf for v in values),
    "needs positive values",
)
ALL_FINITE: Rule = (lambda values: len(values) > 0 and all(map(math.isfinite, values)), "needs finite values")


def one_of(choices: Any) -> Rule:
    """The rule of an option that is one of the words of a ``Literal``."""
    words = get_args(choices)
    return lambda value: value in words, f"must be {' or '.join(map(repr, words))}"


def check_name(name: str) -> None:
    """Refuses a job's name that is not that of a folder."""
    if not name or Path(name).name != name:
        raise ValueError(f"name={name}: must be the plain name of a folder")


def check(record: object, **rules: Rule) -> None:
    """Raises ``ValueError`` for the first option that breaks its rule: before any work, not in the middle of it.

    Those that the record declares as ``int`` must be whole numbers besides.
    """
    kinds = get_type_hints(type(record))
    for name, (holds, demand) in rules.items():
        value = getattr(record, name)
        if kinds[name] is int or (kinds[name] == int | None and value is not None):
            check_whole(**{name: value})
        if not holds(value):
            raise ValueError(f"{name}={value}: {demand}")
