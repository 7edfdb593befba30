"""Settings of a run: frozen dataclasses that hold data only, changed by `section.key=value` and kept as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from vlkd.errors import UserError

Config = TypeVar("Config")


def override(config: Config, assignments: Sequence[str]) -> Config:
    """A copy of `config` with each `section.key=value` applied.

    Raises:
        UserError: no "=", an unknown key, or a value of another type; the sentence says what is allowed.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"Found {assignment!r}, expected key=value, for instance seed=1.")
        config = _replace(config, key.split("."), text, key)
    return config


def _replace(config: Any, path: list[str], text: str, key: str) -> Any:
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config)]
    name, rest = path[0], path[1:]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"No setting is called {key!r}; here are {', '.join(names)}.{hint}")
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            inner = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(value))
            raise UserError(f"{key!r} is a section; set one of {inner}.")
        return dataclasses.replace(config, **{name: _replace(value, rest, text, key)})
    if rest:
        raise UserError(f"{key!r} goes too deep: {name!r} is a single value.")
    return dataclasses.replace(config, **{name: parse(text, hints[name], key)})


def parse(text: str, kind: Any, key: str) -> Any:
    """Read `text` as a value of the annotated type `kind`.

    Raises:
        UserError: it is no such value.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return parse(text, next(argument for argument in arguments if argument is not type(None)), key)
    if origin is typing.Literal:
        if text not in arguments:
            raise UserError(f"{key}={text}: expected one of {', '.join(map(str, arguments))}.")
        return text
    if origin is tuple:
        # Only a pair around the whole is dropped: a glob may end in a bracket of its own.
        bare = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        parts = [part.strip() for part in bare.split(",") if part.strip()]
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(parse(part, arguments[0], key) for part in parts)
        if len(parts) != len(arguments):
            raise UserError(f"{key}={text}: expected {len(arguments)} values separated by commas.")
        return tuple(parse(part, argument, key) for part, argument in zip(parts, arguments, strict=True))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text}: expected true or false.")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{key}={text}: expected {'a whole number' if kind is int else 'a number'}.")
        return value
    return text


def to_json(config: Any) -> dict[str, Any]:
    """The settings as nested dictionaries; tuples become lists."""
    return {
        field.name: to_json(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two results of `to_json` differ, as `key: old -> new`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return found
