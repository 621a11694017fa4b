"""Where peers were seen alive: kept across restarts, for when the initial peers are gone."""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)
_KEPT = 64  # multiaddrs
_WRITES = 30.0  # seconds between two writes of the file


class AddressBook:
    """Multiaddrs with their /p2p/ part, and when each was last seen (seconds since the epoch)."""

    def __init__(self, path: Path | None) -> None:
        """path: the file; None: nothing is kept. One that cannot be read counts as empty."""
        self._path = path
        self._seen: dict[str, float] = {}
        self._written = time.monotonic()
        try:
            entries = json.loads(path.read_text()) if path is not None else {}
            self._seen = {str(address): float(seen) for address, seen in entries.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as problem:
            logger.warning("%s cannot be read: %s", path, problem)

    def note(self, addresses: Iterable[str]) -> None:
        """These answer just now."""
        before = set(self._seen)
        self._seen.update(dict.fromkeys(addresses, time.time()))
        for address in sorted(self._seen, key=lambda a: self._seen[a])[:-_KEPT]:
            del self._seen[address]
        if before != set(self._seen) or time.monotonic() - self._written > _WRITES:
            self._write()

    def newest(self) -> list[str]:
        """All that are known, the last seen first."""
        return sorted(self._seen, key=lambda a: (-self._seen[a], a))

    def _write(self) -> None:
        if self._path is None:
            return
        self._written = time.monotonic()
        draft = self._path.with_name(f".{self._path.name}.new")
        try:
            draft.write_text(json.dumps(self._seen, indent=1))
            draft.replace(self._path)
        except OSError as problem:  # a full disk must not end the peer
            logger.warning("%s cannot be written: %s", self._path, problem)
