"""Placeholders in the paths of a peer's configuration: `~/{run}/part-{shard:03}.jsonl`."""

import re
from collections.abc import Mapping
from pathlib import Path

PLACEHOLDERS = {
    "run_id": "the run's id",
    "run": "its name",
    "peer": "this peer's name",
    "shard": "this peer's `shard`",
    "shards": "how many shards the run has",
}
_PATTERN = re.compile(r"\{([^{}:]*)(?::(0\d+))?\}")


def named_in(path: Path) -> set[str]:
    """The placeholders of a path. Raises ValueError, with those there are, for an unknown one."""
    named = {found[1] for found in _PATTERN.finditer(str(path))}
    rest = _PATTERN.sub("", str(path))
    unknown = sorted(f"{{{name}}}" for name in named - PLACEHOLDERS.keys())
    unknown += ["a single brace"] if "{" in rest or "}" in rest else []
    if unknown:
        valid = ", ".join(f"{{{name}}} ({about})" for name, about in PLACEHOLDERS.items())
        raise ValueError(f"{path} has {', '.join(unknown)}; valid in a path are {valid}")
    return named


def filled(path: Path, values: Mapping[str, object]) -> Path:
    """The path with every placeholder replaced. {shard:03} is a number of at least three digits."""

    def value_of(found: re.Match[str]) -> str:
        value = values[found[1]]
        return format(value, found[2] or "") if isinstance(value, int) else str(value)

    return Path(_PATTERN.sub(value_of, str(path))).expanduser()


def folder_for(output: Path, values: Mapping[str, object]) -> Path:
    """Where a peer writes: <output>/<run id>/<peer>, less what `output` names already."""
    named, folder = named_in(output), filled(output, values)
    if not named & {"run_id", "run"}:
        folder /= str(values["run_id"])
    return folder if "peer" in named else folder / str(values["peer"])


def root_of(output: Path) -> Path:
    """The part of `output` that is the same for every run: keys of peers lie there."""
    parts = output.expanduser().parts
    fixed = next((n for n, part in enumerate(parts) if "{" in part), len(parts))
    return Path(*parts[:fixed])
