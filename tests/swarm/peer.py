"""One peer as a child process: what it says, and its end."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from p2pllm.journal import LEDGER, METRICS, Row, follow

LOADED = 150.0  # seconds in which a peer has loaded everything, on a busy machine too
HAPPENED = 60.0  # seconds in which anything else has happened
POLL = 0.1  # seconds between two looks

Wanted = Any  # what a field must be equal to, or a predicate over it
T = TypeVar("T")


def wait_until(look: Callable[[], T | None], what: str, timeout: float = HAPPENED) -> T:
    """The first true answer. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(POLL)
    return answer


@dataclass
class Peer:
    """One life of a peer: a child process, and what it writes."""

    name: str
    command: list[str]  # all after `python -m p2pllm`
    output: Path  # its own; several lives of one peer share it
    log: Path  # what it prints
    cwd: Path
    process: subprocess.Popen[bytes]
    born: float = field(default_factory=time.time)
    killed: float | None = None  # when it got its kill -9

    # ---- what it says

    @property
    def home(self) -> Path:
        """<output>/<run>/<name>, once it is in a run."""
        [home] = self.output.glob(f"*/{self.name}")
        return home

    @property
    def key(self) -> Path:
        return self.output / "identities" / f"{self.name}.key"

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def rows(self) -> list[Row]:
        """The events of all its lives so far."""
        return self._journal(METRICS)

    @property
    def ledger(self) -> list[Row]:
        return self._journal(LEDGER)

    def events(self, event: str, **fields: Wanted) -> list[Row]:
        """This life's events of one kind with such fields."""
        return [r for r in self.rows if r["time"] >= self.born and _matches(r, event, fields)]

    def wait_for(self, event: str, timeout: float = HAPPENED, **fields: Wanted) -> Row:
        """The first such event of this life. Fails at once when the process has ended without."""

        def look() -> Row | None:
            code = self.process.poll()
            found = self.events(event, **fields)
            assert found or code is None, f"{self.name} ended with code {code}, without {event}"
            return found[0] if found else None

        return wait_until(look, f"{event} of {self.name}", timeout)

    @property
    def address(self) -> str:
        """Of a bootstrap peer, as others give it to --initial-peers."""
        return str(self.wait_for("opened")["addresses"][0])

    # ---- its end

    def kill(self) -> None:
        """kill -9"""
        self.process.kill()
        self.process.wait(10)
        self.killed = time.time()

    def interrupt(self) -> None:
        """Ctrl+C"""
        self.process.send_signal(signal.SIGINT)

    def end(self, timeout: float) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout:.0f} s") from None

    def finish(self, timeout: float = LOADED) -> Row:
        """Its `finished` event; then the process must have ended well."""
        row = self.wait_for("finished", timeout)
        assert self.end(20) == 0
        return row

    def _journal(self, file: str) -> list[Row]:
        files = self.output.glob(f"*/{self.name}/{file}")
        return [row for path in files for row in next(follow(path))]


def _matches(row: Row, event: str, fields: dict[str, Wanted]) -> bool:
    return row["event"] == event and all(
        wanted(row[name]) if callable(wanted) else row[name] == wanted
        for name, wanted in fields.items()
    )
