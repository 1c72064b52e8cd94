"""JSON files from elsewhere: every entry has the type that it should have, or one line says which has not.

Types are annotations: ``int``, ``float``, ``bool``, ``str``, ``Literal[...]``, a tuple of these (a list
there), and any of them or None. Numbers are finite and above 0, or at least 0 where it is said so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from motionloom.errors import UserError

T = TypeVar("T")
MISSING: Any = object()
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def own_keys(config: Mapping[str, Any], class_name: str, where: str, reader: str) -> dict[str, Any]:
    """The entries of diffusers' ``config.json`` but for those that are about the file.

    Raises:
        UserError: it is of another class than ``class_name``, which ``reader`` reads.
    """
    if (kind := config.get("_class_name", class_name)) != class_name:
        raise UserError(f"{where}: _class_name is {kind}, but {reader} reads {class_name}")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def from_entries(
    kind: type[T], values: Mapping[str, Any], where: str, reader: str, zero: Collection[str] = ()
) -> T:
    """A dataclass of the entries; what is missing has its default.

    Args:
        where: the file, for messages.
        reader: who reads it, for messages.
        zero: names of numbers that may be 0.

    Raises:
        UserError: an entry that ``kind`` has no field for, or of another type than the field's.
    """
    types = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - set(names)):
        raise UserError(
            f"{where}: {reader} does not know {unknown[0]}: is it of another model or a newer one?"
        )
    given = [name for name in names if name in values]
    return kind(**{name: entry(values, name, types[name], where, zero=name in zero) for name in given})


def entry(
    values: Mapping[str, Any], key: str, kind: Any, where: str, default: Any = MISSING, *, zero: bool = False
) -> Any:
    """``values[key]``, of type ``kind``; without such an entry ``default``.

    Raises:
        UserError: it is of another type, or missing and without default.
    """
    if key not in values and default is not MISSING:
        return default
    if key not in values:
        raise UserError(f"{where}: {key} is missing")
    value = tuple(values[key]) if isinstance(values[key], list) else values[key]
    if not _is(value, kind, zero):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise UserError(f"{where}: {key} is {shown}, expected {_in_words(kind, zero)}")
    return value


def _is(value: Any, kind: Any, zero: bool) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is(value, one, zero) for one in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        alike = isinstance(value, tuple) and len(value) == len(args)
        return alike and all(map(_is, value, args, [zero] * len(args)))
    if kind in (int, float):
        # bool is an int to Python, and 2 a fine float to JSON.
        number = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
        return number and (value >= 0 if zero else value > 0)
    return type(value) is kind


def _in_words(kind: Any, zero: bool) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one, zero) for one in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list of {len(args)}, each {_in_words(args[0], zero)}"
    limit = (" of at least 0" if zero else " above 0") if kind in (int, float) else ""
    return _WORDS[kind] + limit
