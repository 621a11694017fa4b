"""Reading and showing configurations: a YAML file, then `--set key=value`, checked at the door.

A configuration is valid as a whole or refused as a whole, with every problem in one letter.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from p2pllm.config import text
from p2pllm.config.base import Config
from p2pllm.config.peer import PeerConfig
from p2pllm.config.problems import Problem, problems_in, sub_config
from p2pllm.config.run import RunConfig
from p2pllm.errors import (
    ConfigInvalid,
    ConfigNotFound,
    ConfigUnreadable,
    PeerConfigNotFound,
    SettingsInvalid,
)

# Of these keys exactly one may be given, so setting one takes the others back.
RIVALS: tuple[frozenset[str], ...] = (
    frozenset({"model.name", "model.random_init"}),
    frozenset({"training.local.steps", "training.local.epochs", "training.local.seconds"}),
)
COMMENT_WIDTH = 96

T = TypeVar("T", bound=Config)


@dataclass(frozen=True)
class _Source:
    """Where values came from, so that a problem can point at it."""

    path: Path | None
    kind: str
    lines: Mapping[str, int]
    settings: Sequence[str]

    def place(self, key: str) -> tuple[int, str]:
        """For sorting, and for the eye: `line 7: `, `--set: ` or nothing."""
        last = max(self.lines.values(), default=0) + 1
        for setting in self.settings:
            name = setting.partition("=")[0].strip()
            made_here = name.startswith(f"{key}.") and key not in self.lines
            if key and (f"{key}.".startswith(f"{name}.") or made_here):
                return last + 1, "--set: "
        if key in self.lines:
            return self.lines[key], f"line {self.lines[key]}: "
        return last, "the file's name: " if key == "name" else ""

    def refuse(self, problems: Sequence[Problem]) -> ConfigInvalid | SettingsInvalid:
        """One letter with every problem, in the order of the file."""
        ordered = sorted(problems, key=lambda problem: self.place(problem.key)[0])
        listed = "\n".join(f"  {self.place(p.key)[1]}{p.text}" for p in ordered)
        if self.path is None:
            return SettingsInvalid(kind=self.kind, problems=listed)
        return ConfigInvalid(path=self.path, kind=self.kind, problems=listed)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file, which is named after the file unless it says otherwise.

    Raises:
        ConfigNotFound, ConfigUnreadable: there is no such text file.
        ConfigInvalid: with every problem that was found.
    """
    values, source = _read(path, "run", overrides)
    return _checked(RunConfig, PeerConfig, {"name": path.stem} | values, source)


def load_peer(path: Path | None, overrides: Sequence[str] = ()) -> PeerConfig:
    """What a YAML file (none: the defaults) and the overrides say about this peer.

    Raises:
        PeerConfigNotFound, ConfigUnreadable: there is no such text file.
        ConfigInvalid, SettingsInvalid: with every problem that was found.
    """
    if path is None:
        values: dict[str, Any] = {}
        source = _Source(None, "peer", {}, overrides)
    else:
        values, source = _read(path, "peer", overrides)
    return _checked(PeerConfig, RunConfig, values, source)


def load_either(path: Path, overrides: Sequence[str] = ()) -> RunConfig | PeerConfig:
    """The run or the peer that a file describes, told apart by its keys; in doubt it is a run."""
    values, _ = _read(path, "run", overrides)
    if _likeness(values, PeerConfig, RunConfig) > 0:
        return load_peer(path, overrides)
    return load_run(path, overrides)


def show(config: RunConfig | PeerConfig) -> str:
    """The resolved configuration as YAML, each key under its description. It loads again as is."""
    return "\n".join(_shown(config, config.model_dump(mode="json"))) + "\n"


def _shown(config: Config, values: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        value, group = getattr(config, name), sub_config(field)
        about = field.description or (group.__doc__ if group else None) or ""
        lines += textwrap.wrap(
            " ".join(about.split()), COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# "
        )
        if isinstance(value, Config):
            inner = _shown(value, values[name])
            lines += [f"{name}:", *(f"  {line}" for line in inner)]
        else:
            lines.append(text.line_of(name, values[name]))
    return lines


def _read(path: Path, kind: str, overrides: Sequence[str]) -> tuple[dict[str, Any], _Source]:
    try:
        written = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise (PeerConfigNotFound if kind == "peer" else ConfigNotFound)(path=path) from error
    except OSError as error:
        raise ConfigUnreadable(path=path, reason=error.strerror or error) from error
    except UnicodeDecodeError as error:
        raise ConfigUnreadable(path=path, reason="it is not UTF-8 text") from error
    try:
        document = text.parse(written)
    except text.TextInvalid as error:
        raise _Source(path, kind, {}, ()).refuse([Problem("", error.problem)]) from error
    source = _Source(path, kind, document.lines, overrides)
    if document.value is None:
        return {}, source
    if not isinstance(document.value, dict):
        raise source.refuse(
            [Problem("", "the file must hold keys with values, such as rounds: 10")]
        )
    return document.value, source


def _checked(model: type[T], other: type[Config], values: Mapping[str, Any], source: _Source) -> T:
    if _likeness(values, other, model) > 0:
        raise source.refuse([Problem("", _misplaced(values, other, model))])
    layered, problems = _with_settings(values, source.settings)
    try:
        config = model.model_validate(layered)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += problems_in(details, layered, model, other)
    if problems:
        raise source.refuse(problems)
    return config


def _likeness(values: Mapping[str, Any], model: type[Config], other: type[Config]) -> int:
    """How many more keys only `model` knows than keys only `other` knows."""
    mine, theirs = set(model.model_fields), set(other.model_fields)
    return len((mine - theirs) & set(values)) - len((theirs - mine) & set(values))


def _misplaced(values: Mapping[str, Any], model: type[Config], other: type[Config]) -> str:
    known = [key for key in values if key in model.model_fields and key not in other.model_fields]
    if model is PeerConfig:
        kind, use = "peer", "p2pllm join --initial-peers ADDR --config FILE"
    else:
        kind, use = "run", "p2pllm bootstrap FILE"
    return f"this looks like a {kind} configuration ({', '.join(known)}); use it with: {use}"


def _with_settings(
    values: Mapping[str, Any], settings: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """The values with every `key=value` laid over them, and the settings that could not be."""
    layered, problems = dict(values), []
    for setting in settings:
        key, equals, written = setting.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(
                Problem(
                    "", f"--set {setting}: write it as key=value, such as training.batch_size=4"
                )
            )
            continue
        try:
            layered = _with(layered, parts, text.parse(written).value)
        except text.TextInvalid as error:
            problems.append(Problem("", f"--set {setting}: {error.problem}"))
        except _NotAGroup as error:
            problems.append(Problem("", f"--set {setting}: {error} is not a group of keys"))
    return layered, problems


class _NotAGroup(Exception):
    """A dotted key goes through a plain value."""


def _with(
    values: Mapping[str, Any], parts: Sequence[str], value: Any, above: str = ""
) -> dict[str, Any]:
    head, rest = parts[0], parts[1:]
    key = above + head
    if rest:
        inner = values.get(head)
        if inner is not None and not isinstance(inner, Mapping):
            raise _NotAGroup(key)
        value = _with(inner or {}, rest, value, f"{key}.")
    gone = {rival for rivals in RIVALS if key in rivals and value is not None for rival in rivals}
    kept = {name: old for name, old in values.items() if above + name not in gone}
    return {**kept, head: value}
