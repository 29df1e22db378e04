"""Dotted overrides: ``first_order.lr=3e-4`` into a tree of frozen records, with types and suggestions."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pkgutil
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
    for name, value in _values(record):
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from options(value, f"{path}.")
        else:
            yield path, value


def absent_options(record: Any) -> Iterable[tuple[str, Any]]:
    """The options, with their defaults, of the groups of ``record`` that are None: setting one brings the group in."""
    for name, value in _values(record):
        if value is None and (kind := _group(record, name)):
            yield from options(kind(), f"{name}.")


def _values(record: Any) -> Iterable[tuple[str, Any]]:
    return ((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))


def _replace(record: Any, keys: list[str], text: str, path: str) -> Any:
    names = [field.name for field in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else []
    if keys[0] not in names:
        near = difflib.get_close_matches(keys[0], names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names) or 'none'}"
        raise ValueError(f"{path}: {type(record).__name__} has no option {keys[0]!r}; {hint}")
    if len(keys) > 1:
        inner = getattr(record, keys[0])
        if inner is None:
            kind = _group(record, keys[0])
            if kind is None:
                raise ValueError(f"{path}: {keys[0]} is None and has no options of its own")
            inner = kind()
        value = _replace(inner, keys[1:], text, path)
    else:
        value = convert(_hints(type(record))[keys[0]], text, path)
    try:
        return dataclasses.replace(record, **{keys[0]: value})
    except ValueError as error:
        raise ValueError(f"{path}={text}: {error}") from error


def _group(record: Any, name: str) -> type | None:
    """The record that an option may be besides None."""
    kinds = typing.get_args(_hints(type(record))[name])
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


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
    if typing.get_origin(kind) is type:
        return _subclass(typing.get_args(kind)[0], text, path)
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    for candidate in (value, text):
        try:
            return adapter.validate_python(candidate)
        except ValidationError as failed:
            error = failed
    raise ValueError(f"{path}={text}: {error.errors()[0]['msg']}; the option is a {_name(kind)}")


def _subclass(base: type, text: str, path: str) -> type:
    """The class named ``text``: with its module, or by itself where it is beside ``base``."""
    beside = base.__module__.rpartition(".")[0]
    for name in (text, f"{beside}.{text}"):
        try:
            found = pkgutil.resolve_name(name)
        except (ValueError, ImportError, AttributeError):
            continue
        if isinstance(found, type) and issubclass(found, base):
            return found
    raise ValueError(f"{path}={text}: no such {base.__name__}; name its class, for example {beside}.SGD")


def _first(kind: Any) -> str:
    return dataclasses.fields(kind)[0].name


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
