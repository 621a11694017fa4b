"""The demo's child processes: started, read through their journals, and ended whatever happens.

It knows processes and files, not what the children are doing.
"""

import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from p2pllm.journal import METRICS, Row, follow

POLITENESS = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # seconds each
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl+C, kill, a terminal that is closed
_GLANCE = 0.02  # seconds between two looks at children that are to end


class Interrupts:
    """Requests to end, as a number: within the block they interrupt nothing half-way, such as the
    start of a child that nobody would then end."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._notice) for number in ENDINGS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def endable() -> Iterator[None]:
    """Within it, SIGTERM and a closed terminal raise KeyboardInterrupt, as Ctrl+C does."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Child:
    """One peer in its own process. It writes what it says to a log, and what it does to a journal
    somewhere below `folder`."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._folder = folder
        self._rows: Iterator[list[Row]] | None = None
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl+C is for the demo, which then tells its children
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def news(self) -> list[Row]:
        """The rows of its journal since the last call."""
        if self._rows is None:
            found = list(self._folder.glob(f"*/{self.name}/{METRICS}"))
            if not found:
                return []
            self._rows = follow(found[0])
        return next(self._rows)

    def last_words(self, lines: int = 8) -> str:
        """The end of its log."""
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(said[-lines:])

    def send(self, number: signal.Signals) -> None:
        """Does nothing to a child that has ended, whose process id may be another's by now."""
        self._process.send_signal(number)


class Children:
    """All children of one demo. None outlives the block, however it is left."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._started: list[Child] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __iter__(self) -> Iterator[Child]:
        return iter(self._started)

    def add(self, child: Child) -> None:
        self._started.append(child)

    def end(self) -> None:
        """Ask them to leave, then insist, then kill. Another Ctrl+C goes on to the next."""
        for number, patience in POLITENESS:
            running = [child for child in self._started if child.is_running]
            for child in running:
                child.send(number)
            self._wait(running, patience)

    def _wait(self, running: Sequence[Child], patience: float) -> None:
        asked, deadline = self._interrupts.count, time.monotonic() + patience
        while any(child.is_running for child in running):
            if time.monotonic() > deadline or self._interrupts.count > asked:
                return
            time.sleep(_GLANCE)
