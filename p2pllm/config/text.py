"""Configuration as text: a strict reading of YAML, and the same values written out again.

The dialect is YAML's core schema rather than PyYAML's: `1e-3` is a number, `no` and `2024-01-01`
are text, and a key that stands twice is an error. Knows nothing of what the keys mean.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

MERGE_TAG = "tag:yaml.org,2002:merge"
DEEPEST = 8  # levels of keys that get a line number; a configuration has three

_PLAIN = {
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
}


class TextInvalid(Exception):
    """The text is not YAML that we take; `problem` says why, with the line number."""

    def __init__(self, problem: str, line: int | None) -> None:
        self.problem = problem if line is None else f"line {line}: {problem}"
        super().__init__(self.problem)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice, or one that is not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise TextInvalid(f"the key {key!r} is not text; put it in quotes", line)
            if key in seen:
                raise TextInvalid(f"the key {key!r} stands twice, first in line {seen[key]}", line)
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same values.

    It keeps PyYAML's own rules beside ours, so that text like `no` is quoted for other readers.
    """


_Loader.yaml_implicit_resolvers = {}  # none of PyYAML's
for _tag, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), [*_first]
        )
for _class in (_Loader, _Dumper):  # an empty value is null, too
    _class.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])


def _represent(dumper: yaml.SafeDumper, written: str) -> yaml.ScalarNode:
    """Text with line breaks of any kind is quoted and escaped; the rest is as plain as can be."""
    one_line = len(f"{written}.".splitlines()) == 1
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", written, style=None if one_line else '"'
    )


_Dumper.add_representer(str, _represent)


@dataclass(frozen=True)
class Document:
    """The values of a YAML text, and the line in which each dotted key stands."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Document:
    """Read one YAML document.

    Raises:
        TextInvalid: a syntax error, a repeated key, a key that is not text.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        return Document(loader.construct_document(node), _lines(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise TextInvalid(why, mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError) as error:
        raise TextInvalid(" ".join(str(error).split()), None) from error
    except RecursionError as error:
        raise TextInvalid("the brackets are nested too deeply", None) from error


def _lines(node: yaml.Node, prefix: str = "", depth: int = 0) -> dict[str, int]:
    if not isinstance(node, yaml.MappingNode) or depth == DEEPEST:
        return {}
    found: dict[str, int] = {}
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        found[dotted] = key.start_mark.line + 1
        found |= _lines(value, f"{dotted}.", depth + 1)
    return found


def line_of(key: str, value: object) -> str:
    """`key: value` on one line, such that `parse` gives the value back."""
    collection = isinstance(value, list | dict)
    written: str = yaml.dump(
        value if collection else {key: value},
        Dumper=_Dumper,
        default_flow_style=collection,
        allow_unicode=True,
        sort_keys=False,
        width=float("inf"),
    )
    return f"{key}: {written.rstrip()}" if collection else written.rstrip("\n")
