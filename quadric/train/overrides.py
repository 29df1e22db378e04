"""Dotted overrides: ``adam.lr=3e-4`` into a tree of frozen records, with types and suggestions."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

Record = TypeVar("Record")


def override(record: Record, assignments: Iterable[str]) -> Record:
    """``record`` with each ``path.to.field=value`` replaced, in order.

    Values are written as JSON or as bare words: ``8``, ``3e-4``, ``[512, 512]``, ``none``, ``tdnn``. Types are checked
    against the field's.

    Raises:
        ValueError: no ``=``, no such field (with the nearest names), or a value of the wrong type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Options:
    ...     lr: float = 1.0
    ...     sizes: tuple[int, ...] = (1,)
    >>> override(Options(), ["lr=1e-3", "sizes=[4, 5]"])
    Options(lr=0.001, sizes=(4, 5))
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r} has no '=': write path.to.option=value")
        record = _replace(record, path.split("."), text, path)
    return record


def options(record: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every option of a tree of records as (dotted path, value), depth first."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from options(value, f"{path}.")
        else:
            yield path, value


def _replace(record: Any, keys: list[str], text: str, path: str) -> Any:
    names = [field.name for field in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else []
    if keys[0] not in names:
        near = difflib.get_close_matches(keys[0], names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names) or 'none'}"
        raise ValueError(f"{path}: {type(record).__name__} has no option {keys[0]!r}; {hint}")
    if len(keys) > 1:
        inner = getattr(record, keys[0])
        if inner is None:
            inner = _default(record, keys[0], path)
        value = _replace(inner, keys[1:], text, path)
    else:
        value = convert(_hints(type(record))[keys[0]], text, path)
    try:
        return dataclasses.replace(record, **{keys[0]: value})
    except ValueError as error:
        raise ValueError(f"{path}={text}: {error}") from error


def _default(record: Any, name: str, path: str) -> Any:
    """A fresh record for an option that is None, when its type is a record that needs no argument."""
    for kind in typing.get_args(_hints(type(record))[name]):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind()
    raise ValueError(f"{path}: {name} is None and has no options of its own")


def convert(kind: Any, text: str, path: str) -> Any:
    """``text`` as a value of type ``kind``; ``path`` names the option in the error.

    Raises:
        ValueError: it is not such a value.
    """
    if text.lower() in ("none", "null"):
        value: Any = None
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
    if dataclasses.is_dataclass(kind):
        raise ValueError(f"{path}={text}: a group of options; set one of them, for example {path}.{_first(kind)}=value")
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    for candidate in (value, text):
        try:
            return adapter.validate_python(candidate)
        except ValidationError as failed:
            error = failed
    raise ValueError(f"{path}={text}: {error.errors()[0]['msg']}; the option is a {_name(kind)}")


def _first(kind: Any) -> str:
    return dataclasses.fields(kind)[0].name


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
