"""From a configuration of FedML's UnitedLLM to a run and a peer: each key gets a verdict.

`translate` is pure: a parsed fedml_config.yaml in, verdicts and two configurations out. What each
key means there and becomes here is in the modules named unitedllm_*.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from p2pllm.config.base import Config
from p2pllm.config.peer import PeerConfig
from p2pllm.config.problems import nearest, problems_in
from p2pllm.config.run import RunConfig
from p2pllm.config.unitedllm_data import DATA, MODEL
from p2pllm.config.unitedllm_rest import HUGGING_FACE, MACHINES, TRACKING, TRUST
from p2pllm.config.unitedllm_rules import Given, Ignored, Mapped, Outcome, Refused, Rule
from p2pllm.config.unitedllm_training import TRAINING, VALIDATION
from p2pllm.errors import ConfigNotFound, ConfigUnreadable

RULES: dict[str, Rule] = {
    **HUGGING_FACE,
    **MACHINES,
    **DATA,
    **MODEL,
    **TRAINING,
    **VALIDATION,
    **TRACKING,
    **TRUST,
}
# What the absence of a key means there, where it means something else here.
DEFAULTS: dict[str, Any] = {
    "comm_round": 5,
    "learning_rate": 5e-5,
    "max_seq_length": None,
    "model_dtype": "none",
    "peft_type": "none",
    "response_template": "",
    "save_frequency": None,
    "seed": 42,
}
_SECRET = re.compile("token|api_key|secret|password|customized_training")


@dataclass(frozen=True)
class Unknown:
    """Neither UnitedLLM nor its dissection knows the key; it is not carried over."""

    reason: str


@dataclass(frozen=True)
class Verdict:
    """What became of one key."""

    key: str  # with its group, as in train_args.learning_rate
    value: Any
    outcome: Outcome | Unknown
    in_file: bool = True  # otherwise it is UnitedLLM's default, which differs from ours

    @property
    def fate(self) -> Literal["mapped", "ignored", "refused", "unknown"]:
        match self.outcome:
            case Mapped():
                return "mapped"
            case Ignored():
                return "ignored"
            case Refused():
                return "refused"
        return "unknown"

    @property
    def shown_value(self) -> str:
        """For a table; no secrets."""
        return "(not shown)" if self.value and _SECRET.search(self.key) else str(self.value)


@dataclass(frozen=True)
class Translation:
    """`run` and `peer` are nested keys and values, to be checked by RunConfig and PeerConfig."""

    verdicts: tuple[Verdict, ...]
    run: dict[str, Any]
    peer: dict[str, Any]


def read_unitedllm(path: Path) -> dict[str, Any]:
    """The file as UnitedLLM reads it, by YAML's older rules: there, a plain `no` is false.

    Raises ConfigNotFound and ConfigUnreadable.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigNotFound(path=path) from error
    except (OSError, ValueError) as error:
        raise ConfigUnreadable(path=path, reason=error) from error
    except yaml.YAMLError as error:
        raise ConfigUnreadable(path=path, reason=f"it is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigUnreadable(path=path, reason="it does not hold keys with values")
    return document


def translate(document: Mapping[str, Any]) -> Translation:
    """The verdict on every key, and what they make together.

    UnitedLLM pours all groups into one: which group a key stands in means nothing, and of a key
    that stands twice the last one counts.
    """
    found = list(_keys_in(document))
    last = {name: dotted for dotted, name, _ in found}
    written = {name: value for _, name, value in found}
    given: Given = {**DEFAULTS, **written}
    verdicts = [
        Verdict(dotted, value, _judge(name, value, given))
        if last[name] == dotted
        else Verdict(dotted, value, Ignored(f"{last[name]} stands further down and counts"))
        for dotted, name, value in found
    ]
    verdicts += [
        Verdict(name, value, _judge(name, value, given), in_file=False)
        for name, value in DEFAULTS.items()
        if name not in written
    ]
    mapped = [v.outcome for v in verdicts if isinstance(v.outcome, Mapped)]
    run = _nested(pair for outcome in mapped for pair in outcome.run.items())
    peer = _nested(pair for outcome in mapped for pair in outcome.peer.items())
    return Translation(tuple(verdicts), run, peer)


def _keys_in(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every key with its group, without it, and its value."""
    for group, content in document.items():
        if isinstance(content, Mapping):
            yield from ((f"{group}.{name}", str(name), value) for name, value in content.items())
        else:
            yield str(group), str(group), content


def _judge(name: str, value: Any, given: Given) -> Outcome | Unknown:
    rule = RULES.get(name)
    if rule is None:
        meant = nearest(name, RULES)
        hint = f"; did you mean {meant}?" if meant else ""
        return Unknown(f"UnitedLLM has no such key that we know of{hint}")
    try:
        outcome = rule(value, given)
    except (TypeError, ValueError) as problem:
        return Refused(f"the value cannot be used: {problem}")
    if isinstance(outcome, Mapped):
        problems = _problems(outcome.run, RunConfig, PeerConfig)
        problems += _problems(outcome.peer, PeerConfig, RunConfig)
        if problems:
            return Refused("; ".join(problems))
    return outcome


def _problems(targets: Mapping[str, Any], model: type[Config], other: type[Config]) -> list[str]:
    """What the configuration says against these dotted keys and values, each for itself."""
    values = _nested(targets.items())
    try:
        model.model_validate(values)
    except ValidationError as error:
        found = problems_in(error.errors(include_url=False), values, model, other)
        return [problem.text for problem in found if problem.key in targets]
    return []


def _nested(pairs: Any) -> dict[str, Any]:
    """Dotted keys as groups in groups."""
    nested: dict[str, Any] = {}
    for dotted, value in pairs:
        *groups, leaf = dotted.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return nested
