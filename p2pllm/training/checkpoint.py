"""Adapters on disk: complete or absent, the last few kept, found again after a crash.

A checkpoint is a plain PEFT folder plus round.json. It is written under a temporary name, flushed
to the disk and renamed; so whatever happens, the last good one stays.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from p2pllm.digest import digest_of
from p2pllm.errors import CheckpointFailed, DiskFull, ForeignFolder
from p2pllm.model.adapter import Adapter, Values, adapter_values

log = logging.getLogger(__name__)

FACTS, OUTER_FILE = "round.json", "outer.safetensors"
UNFINISHED, EARLIER = ".unfinished-", ".earlier-"  # before the name of what they become


class Saved(NamedTuple):
    """A checkpoint that was read back and found whole."""

    round: int
    values: Values
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one peer, below its output folder."""

    def __init__(self, folder: Path, keep: int | None, spared: Collection[int] = ()) -> None:
        """Clean up what a killed process left unfinished in `folder`, which need not exist yet.

        keep: how many stay (none: all), besides those of the rounds `spared`.
        """
        self._folder = folder
        self._rounds = folder / "checkpoints"
        self._keep, self._spared = keep, frozenset(spared)
        for parent in (self._folder, self._rounds):
            for unfinished in parent.glob(UNFINISHED + "*"):
                _remove(unfinished)
            for earlier in parent.glob(EARLIER + "*"):
                _put_back(earlier)

    def check_owner(self, fingerprint: str) -> None:
        """Raises: ForeignFolder: a checkpoint of another run lies here."""
        for checkpoint in self._all():
            theirs = (_read_facts(checkpoint) or {}).get("fingerprint")
            if theirs not in (None, fingerprint):
                raise ForeignFolder(folder=self._folder, theirs=theirs, ours=fingerprint)

    def save(self, round: int, adapter: Adapter, values: Values, facts: dict[str, Any]) -> Path:
        """Write checkpoints/round-<n>/, point `latest` to it, remove the oldest beyond `keep`.

        `facts` (fingerprint, peers, samples, evaluation) go into round.json with round and digest.

        Raises:
            DiskFull, CheckpointFailed: earlier checkpoints are untouched.
        """
        path = self._rounds / f"round-{round}"
        self._write(path, adapter, values, {**facts, "round": round})
        self._prune()
        return path

    def save_final(
        self, round: int, adapter: Adapter, values: Values, facts: dict[str, Any]
    ) -> Path:
        """Write final/ in the same way; nothing is pruned.

        Raises:
            DiskFull, CheckpointFailed: an earlier final/ is untouched.
        """
        path = self._folder / "final"
        self._write(path, adapter, values, {**facts, "round": round})
        return path

    def newest(self, fingerprint: str) -> Saved | None:
        """The whole checkpoint of this run with the highest round; damaged ones are passed over."""
        known = [(path, _read_facts(path) or {}) for path in self._all()]
        ours = [entry for entry in known if entry[1].get("fingerprint") == fingerprint]
        for path, facts in sorted(ours, key=lambda entry: int(entry[1]["round"]), reverse=True):
            try:
                values = _state_in(path)
            except (OSError, SafetensorError, ValueError) as error:
                log.warning("%s is damaged: %s", path, error)
                continue
            if digest_of(values) == facts.get("digest"):
                return Saved(facts["round"], values, facts)
            log.warning("%s does not have the digest in its %s", path, FACTS)
        return None

    def _all(self) -> list[Path]:
        return [*self._rounds.glob("round-*"), *self._folder.glob("final")]

    def _write(self, path: Path, adapter: Adapter, values: Values, facts: dict[str, Any]) -> None:
        unfinished = path.parent / (UNFINISHED + path.name)
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            adapter.save(unfinished, values[: adapter.size])
            if values.size > adapter.size:
                momentum = {"momentum": values[adapter.size :]}
                (unfinished / OUTER_FILE).write_bytes(safetensors.numpy.save(momentum))
            described = json.dumps({**facts, "digest": digest_of(values)}, indent=2)
            (unfinished / FACTS).write_text(described)
            for file in (*unfinished.iterdir(), unfinished):
                _flush(file)
            _replace(unfinished, path)
            _flush(path.parent)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(folder=path.parent, last=self._last()) from error
            raise CheckpointFailed(folder=path.parent, reason=error, last=self._last()) from error
        self._point_latest_to(path)

    def _last(self) -> str:
        latest = self._folder / "latest"
        return f"The last good one is {latest.resolve()}." if latest.exists() else ""

    def _point_latest_to(self, path: Path) -> None:
        fresh = self._folder / f"{UNFINISHED}latest"
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.relative_to(self._folder), target_is_directory=True)
            fresh.replace(self._folder / "latest")
        except OSError as error:  # some file systems have no links; the checkpoint itself is there
            log.warning("no link `latest` in %s: %s", self._folder, error)

    def _prune(self) -> None:
        if self._keep is None:
            return
        numbered = {path: _number(path) for path in self._rounds.glob("round-*")}
        rounds = sorted(
            (p for p, n in numbered.items() if n is not None and n not in self._spared),
            key=lambda p: numbered[p] or 0,
        )
        for old in rounds[: -self._keep]:
            _remove(old)


def _state_in(path: Path) -> Values:
    """The adapter's values, and the outer optimizer's behind them where it keeps any."""
    values = adapter_values(path)
    if not (path / OUTER_FILE).exists():
        return values
    momentum = safetensors.numpy.load_file(path / OUTER_FILE)["momentum"]
    return np.concatenate([values, momentum])


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix("round-")
    return int(digits) if digits.isdecimal() else None


def _read_facts(checkpoint: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((checkpoint / FACTS).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(facts, dict) and isinstance(facts.get("round"), int)
    return facts if whole else None


def _replace(unfinished: Path, path: Path) -> None:
    """Put a complete folder in the place of `path`, which may hold an earlier one."""
    if path.exists():
        earlier = path.parent / (EARLIER + path.name)
        shutil.rmtree(earlier, ignore_errors=True)
        path.rename(earlier)
        unfinished.rename(path)
        shutil.rmtree(earlier, ignore_errors=True)
    else:
        unfinished.rename(path)


def _put_back(earlier: Path) -> None:
    """A process was killed within `_replace`: the earlier folder counts unless the new one came."""
    path = earlier.parent / earlier.name.removeprefix(EARLIER)
    if path.exists():
        _remove(earlier)
    else:
        earlier.rename(path)


def _remove(path: Path) -> None:
    """Best effort: what cannot be removed now is removed at the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until `path`, a file or a folder, is on the disk and not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
