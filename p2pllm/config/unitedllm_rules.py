"""How a key of UnitedLLM is judged: outcomes, kinds of rules, and readings of values.

A rule is given the value and all other keys, and answers with an outcome.
"""

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Mapped:
    """The key lives on, under these dotted keys of the run's and the peer's configuration."""

    run: Mapping[str, Any] = field(default_factory=dict)
    peer: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Ignored:
    """Nothing is lost without it."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The run will not do what the key asks for; the reason says what it does instead."""

    reason: str


Outcome = Mapped | Ignored | Refused
Rule = Callable[[Any, Given], Outcome]


# ---- kinds of rules


def to_run(key: str, convert: Callable[[Any], Any], reason: str = "") -> Rule:
    return lambda value, given: Mapped(run={key: convert(value)}, reason=reason)


def to_peer(key: str, convert: Callable[[Any], Any], reason: str = "") -> Rule:
    return lambda value, given: Mapped(peer={key: convert(value)}, reason=reason)


def ignored(reason: str) -> Rule:
    return lambda value, given: Ignored(reason)


def off_or_refused(reason: str) -> Rule:
    """For what is off unless it is asked for."""
    return lambda value, given: Refused(reason) if is_on(value) else Ignored("it is off")


def positive(rule: Rule) -> Rule:
    """For numbers that mean nothing unless they are positive."""
    return lambda value, given: rule(value, given) if is_positive(value) else Ignored("it is off")


def choice(key: str, choices: Mapping[str, str], otherwise: str) -> Rule:
    """For words; one that is not among the choices is refused."""

    def rule(value: Any, given: Given) -> Outcome:
        if str(value) in choices:
            return Mapped(run={key: choices[str(value)]})
        return Refused(f"{value} has no counterpart; {otherwise}")

    return rule


def each(names: str, rule: Rule) -> dict[str, Rule]:
    """The same rule for several keys."""
    return dict.fromkeys(names.split(), rule)


# ---- values


def is_on(value: Any) -> bool:
    return bool(value) and str(value).lower() not in ("false", "no", "none", "0")


def is_positive(value: Any) -> bool:
    return value is not None and float(value) > 0


def paths_in(value: Any) -> list[str]:
    """Of one path or several, those that count; ranks are shards here."""
    named = [value] if isinstance(value, str) and value else list(value or [])
    places = {"{rank}": "{shard}", "{client_num_in_total}": "{shards}"}
    return [re.sub("|".join(places), lambda m: places[m[0]], str(path)) for path in named[:2]]


def table_in(value: Any) -> dict[str, str]:
    """A mapping, or one as YAML in base64. Raises ValueError for the path of a file."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(base64.urlsafe_b64decode(value).decode())
        except (ValueError, yaml.YAMLError) as problem:
            raise ValueError("write the mapping of that file in its place") from problem
    if not isinstance(value, Mapping):
        raise ValueError("it is not a mapping")
    return {str(k): str(v) for k, v in value.items() if k != v}


def local_steps_of(given: Given) -> int | None:
    steps = given.get("local_max_steps", given.get("max_steps"))
    return int(steps) if is_positive(steps) else None
