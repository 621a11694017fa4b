"""What is wrong with a configuration, in words: pydantic's errors as lines a user can act on.

Every line names the dotted key, the value that was found, and what would be valid there.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from p2pllm.config.base import Config

TYPO = 0.75  # difflib ratio from which another key is taken for the one meant
OTHER_FILE = {"PeerConfig": "a peer's own peer.yaml", "RunConfig": "the run's file in configs/"}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60

_WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a group of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le}",
    "path_type": "a path",
    "string_type": "text, in quotes",
    "tuple_type": "a list, such as [a, b]",
}


@dataclass(frozen=True)
class Problem:
    """One thing to mend. `key` is the dotted key it is about; empty: the whole file."""

    key: str
    text: str


def sub_config(field: FieldInfo) -> type[Config] | None:
    """The model of a field that is a group of keys, also of an optional one."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def keys_of(model: type[Config], prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key of a configuration, groups included, in the order of the source."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if inner := sub_config(field):
            found |= keys_of(inner, f"{prefix}{name}.")
    return found


def problems_in(
    errors: Iterable[ErrorDetails],
    values: Mapping[str, Any],
    model: type[Config],
    other: type[Config],
) -> list[Problem]:
    """One problem for each key; the branches of a union are joined into one line."""
    keys = keys_of(model)
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(_dotted(error, keys), []).append(error)
    return [
        Problem(key, _unknown(key, model, other))
        if group[0]["type"] == "extra_forbidden"
        else Problem(key, _wrong(key, group, values, keys))
        for key, group in by_key.items()
    ]


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that was probably meant: a sibling, the same name elsewhere, or a like one."""
    known = list(keys)
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(leaf, siblings, n=1, cutoff=TYPO):
        return siblings[close[0]]
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    candidates, cutoff = (elsewhere, 0.0) if elsewhere else (known, TYPO)
    return next(iter(difflib.get_close_matches(key, candidates, n=1, cutoff=cutoff)), None)


def _unknown(key: str, model: type[Config], other: type[Config]) -> str:
    keys = keys_of(model)
    if key in keys_of(other):
        return f"unknown key {key}; it belongs in {OTHER_FILE[other.__name__]}"
    if (meant := nearest(key, keys)) is not None:
        return f"unknown key {key}; did you mean {meant}?"
    parent = key.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    return f"unknown key {key}; valid here: {', '.join(siblings)}"


def _wrong(
    key: str, group: list[ErrorDetails], values: Mapping[str, Any], keys: Mapping[str, FieldInfo]
) -> str:
    field = keys.get(key)
    first = group[0]
    if first["type"] == "missing":
        return f"{key} is missing: {_about(field)}"
    if first["type"] == "value_error":
        text = first["msg"].removeprefix("Value error, ")
        return f"{key}: {text}" if key else text
    deepest = max(len(error["loc"]) for error in group)  # the branch of a union that came furthest
    wanted = [_wanted(error, field) for error in group if len(error["loc"]) == deepest]
    found: Any = first["input"]
    if len(first["loc"]) > len(key.split(".")):  # of a branch or an item: show the whole value
        found = values
        for part in key.split("."):
            found = found[part]
    return f"{key} is {_shown(found)}; it must be {', or '.join(dict.fromkeys(wanted))}"


def _wanted(error: ErrorDetails, field: FieldInfo | None) -> str:
    kind, ctx = error["type"], error.get("ctx", {})
    index = next((part for part in error["loc"] if isinstance(part, int)), None)
    if kind == "literal_error":
        wanted = _choices(str(ctx["expected"]), error["input"])
    elif kind == "string_pattern_mismatch":
        wanted = f"text that matches {ctx['pattern']} ({_about(field)})"
    elif kind == "model_type":
        inner = sub_config(field) if field else None
        wanted = f"a group of keys: {', '.join(inner.model_fields)}" if inner else "a group of keys"
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        wanted = _limits(field) or _WANTED[kind].format(**ctx)
    else:
        wanted = _WANTED.get(kind) or f"otherwise ({error['msg']})"
    return wanted if index is None else f"a list whose item {index + 1} is {wanted}"


def _choices(expected: str, found: object) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    meant = difflib.get_close_matches(str(found), choices, n=1)
    hint = f" (did you mean {meant[0]}?)" if meant else ""
    return ("one of " if len(choices) > 1 else "") + ", ".join(choices) + hint


def _limits(field: FieldInfo | None) -> str:
    """Both limits of a number, whichever was broken."""
    names = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    found = [
        f"{words} {getattr(limit, name)}"
        for name, words in names.items()
        for limit in (field.metadata if field else [])
        if hasattr(limit, name)
    ]
    return " and ".join(found)


def _dotted(error: ErrorDetails, keys: Mapping[str, FieldInfo]) -> str:
    """The key an error is about; pydantic's location also holds union branches and indices."""
    parts = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return ".".join(parts)
    end = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in keys), len(parts))
    field = keys.get(".".join(parts[:end]))
    if field is not None and get_origin(field.annotation) is dict:
        end += 1
    return ".".join(parts[:end])


def _about(field: FieldInfo | None) -> str:
    """The first sentence of a field's description, or of its group's."""
    group = sub_config(field) if field else None
    described = field.description if field else None
    text = " ".join((described or (group.__doc__ if group else None) or "").split())
    return re.split(r"(?<=\.)\s", text)[0].rstrip(".") if text else ""


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _short.repr(value)
