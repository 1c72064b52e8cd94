"""YAML as recipes use it: text <-> plain trees of dicts, lists and scalars.

Scalars are read by YAML 1.2: ``1e-4`` is a number, ``no`` and ``16:9`` are texts, ``010`` is ten. PyYAML
alone follows YAML 1.1, where they are a text, false, 969 and eight. A key that stands twice is refused:
PyYAML would quietly keep the last one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from motionloom.errors import UserError

_TAG = "tag:yaml.org,2002:"
_FLOAT = (
    "float",
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "-+.0123456789",
)
_SCALARS = (  # tag, pattern, possible first characters; tried in this order
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    _FLOAT,
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own way to say "none of yours")

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence(_TAG + "seq", data, flow_style=True)


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_TAG + "int", lambda loader, node: int(node.value))
_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_implicit_resolver(_TAG + _FLOAT[0], re.compile(f"(?:{_FLOAT[1]})$"), list(_FLOAT[2]))


def read_yaml(text: str, label: str) -> Any:
    """The tree that ``text`` says: dicts with text keys, lists, texts, numbers, booleans, None.

    Args:
        label: where the text comes from; every message starts with it.

    Raises:
        UserError: broken YAML, with line and column; a key twice; a tag such as ``!!python/object``.
    """
    try:
        return _plain(yaml.load(text, _Loader))  # a SafeLoader: builds no objects
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{label}{place}: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{label}: not YAML text: {error}") from error
    except ValueError as error:
        raise UserError(f"{label}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{label}: nested too deep, or an anchor that contains itself") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"a value of type {type(value).__name__} has no place in a recipe")


def write_yaml(tree: dict[str, Any]) -> str:
    """``tree`` as YAML that :func:`read_yaml` reads back equal; lists in brackets."""
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110
    )
