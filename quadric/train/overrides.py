"""Dotted overrides: ``first_order.lr=3e-4`` into a tree of frozen records, with types and suggestions."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pkgutil
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

Record = TypeVar("Record")


def override(record: Record, assignments: Iterable[str]) -> Record:
    """``record`` with each ``path.to.field=value`` replaced; of one field, the last counts.

    All are replaced at once, so that options which only go together can be given in any order. Values are written as
    JSON or as bare words: ``8``, ``3e-4``, ``[512, 512]``, ``none``, ``tdnn``. Types are checked against the field's.
    A group of options takes a name of its type's ``presets()``, where it has any; what follows may change parts of it.

    Raises:
        ValueError: no ``=``, no such field (with the nearest names), or a value of the wrong type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Options:
    ...     lr: float = 1.0
    ...     sizes: tuple[int, ...] = (1,)
    >>> override(Options(), ["lr=1e-3", "sizes=[4, 5]"])
    Options(lr=0.001, sizes=(4, 5))
    """
    draft = _Draft(record)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r} has no '=': write path.to.option=value")
        draft.set(path.split("."), text, path)
    return draft.made()


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


class _Draft:
    """A record and what is to be changed of it."""

    def __init__(self, record: Any) -> None:
        self._record = record
        self._inner: dict[str, _Draft] = {}
        self._values: dict[str, Any] = {}
        self._said: dict[str, tuple[str, str]] = {}  # the path and the text of each of these values

    def set(self, keys: list[str], text: str, path: str) -> None:
        """Takes a value for the field that ``keys`` lead to."""
        record, key = self._record, keys[0]
        names = [field.name for field in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else []
        if key not in names:
            near = difflib.get_close_matches(key, names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names) or 'none'}"
            raise ValueError(f"{path}: {type(record).__name__} has no option {key!r}; {hint}")
        if len(keys) == 1:
            self._values[key] = convert(_hints(type(record))[key], text, path)
            self._said[key] = (path, text)
            self._inner.pop(key, None)
            return
        if key not in self._inner:
            inner = self._values.pop(key, getattr(record, key))
            self._said.pop(key, None)
            if inner is None:
                kind = _group(record, key)
                if kind is None:
                    raise ValueError(f"{path}: {key} is None and has no options of its own")
                inner = kind()
            self._inner[key] = _Draft(inner)
        self._inner[key].set(keys[1:], text, path)

    def made(self) -> Any:
        """The record with everything changed."""
        changed = self._values | {key: draft.made() for key, draft in self._inner.items()}
        try:
            return dataclasses.replace(self._record, **changed) if changed else self._record
        except ValueError as error:
            raise ValueError(self._sentence(str(error))) from error

    def _sentence(self, problem: str) -> str:
        """``problem`` with the options that were given, as they were given."""
        for key, (path, text) in self._said.items():
            for shown in (self._values[key], text):
                if problem.startswith(f"{key}={shown}"):
                    return f"{path}={text}{problem.removeprefix(f'{key}={shown}')}"
        given = ", ".join(f"{path}={text}" for path, text in self._said.values())
        return f"{given}: {problem}" if given else problem


def _group(record: Any, name: str) -> type | None:
    """The record that an option may be besides None."""
    kinds = typing.get_args(_hints(type(record))[name])
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _presets(kind: Any) -> Mapping[str, Any]:
    """The records of a type that have a name."""
    return kind.presets() if hasattr(kind, "presets") else {}


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
        named = _presets(kind)
        if text in named:
            return named[text]
        raise ValueError(f"{path}={text}: {_wanted(kind, path)}")
    if typing.get_origin(kind) is type:
        return _subclass(typing.get_args(kind)[0], text, path)
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    for candidate in (value, text):
        try:
            return adapter.validate_python(candidate)
        except ValidationError:
            continue
    raise ValueError(f"{path}={text}: must be {_wanted(kind, path)}")


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


_KINDS = {
    bool: ("true or false", "truth values", "true", "false"),
    int: ("a whole number", "whole numbers", "4", "5"),
    float: ("a number", "numbers", "0.5", "1.0"),
    str: ("a word", "words", "a", "b"),
    Path: ("a path", "paths", "a/b", "c"),
}
"""Of the types that options have, what one is called, what several are, and two examples."""


def _wanted(kind: Any, path: str) -> str:
    """What the option ``path`` can be, with an example."""
    parts = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        named = f", or all of them, {path}=NAME: {', '.join(_presets(kind))}" if _presets(kind) else ""
        example = f"for example {path}.{names[0]}=value (it has {', '.join(names)})"
        return f"a group of options; set one of them, {example}{named}"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, parts))
    if type(None) in parts:
        return f"none or {' or '.join(_wanted(part, path) for part in parts if part is not type(None))}"
    if typing.get_origin(kind) is tuple:
        return f"{_several(kind, 'a list')}, for example {path}={_example(kind)}"
    if kind in _KINDS and kind is not bool:
        return f"{_KINDS[kind][0]}, for example {path}={_KINDS[kind][2]}"
    return _KINDS[kind][0] if kind in _KINDS else f"a {getattr(kind, '__name__', kind)}"


def _several(kind: Any, what: str) -> str:
    parts = typing.get_args(kind)
    of = _several(parts[0], "lists") if typing.get_origin(parts[0]) is tuple else _KINDS[parts[0]][1]
    return f"{what} of {of}" if parts[-1] is Ellipsis else f"{what} of {len(parts)} {of}"


def _example(kind: Any) -> str:
    parts = typing.get_args(kind)
    count = 2 if parts[-1] is Ellipsis else len(parts)
    some = [_example(parts[0])] if typing.get_origin(parts[0]) is tuple else _KINDS[parts[0]][2:]
    return f"[{','.join(some[k % len(some)] for k in range(count))}]"


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
