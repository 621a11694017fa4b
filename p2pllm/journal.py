"""What happened to this peer, kept on disk: metrics.jsonl has every event, ledger.jsonl the rounds.

It knows rows and files, not what the rows mean. Whatever the disk does, training goes on.
"""

import json
import logging
import math
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from p2pllm.events import CaughtUp, Event, RoundCommitted, RoundMissed

log = logging.getLogger(__name__)

METRICS, LEDGER = "metrics.jsonl", "ledger.jsonl"

Row = dict[str, Any]


class Journal:
    """Subscribes to `Events`. A restarted peer appends to what is there."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made with the first row."""
        self._metrics = _Rows(folder / METRICS)
        self._ledger = _Rows(folder / LEDGER)

    def __call__(self, event: Event) -> None:
        row = event.as_row()
        self._metrics.append(row)
        if isinstance(event, RoundCommitted | RoundMissed | CaughtUp):
            self._ledger.append(row)

    def close(self) -> None:
        self._metrics.close()
        self._ledger.close()


def follow(path: Path) -> Iterator[list[Row]]:
    """Each `next` gives the rows that have been completed since the one before, perhaps none.

    The file need not exist yet. It never ends by itself.
    """
    position = 0
    while True:
        fresh = _read_from(path, position)
        complete = fresh[: fresh.rfind(b"\n") + 1]  # the last line may be half written
        position += len(complete)
        yield [row for line in complete.splitlines() if (row := _parsed(line)) is not None]


class _Rows:
    """One file of JSON rows. Unbuffered: a killed process loses nothing that it has appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._is_torn = False  # what is in the file does not end with a line's end
        self._dropped = 0
        self._lock = threading.Lock()  # training and the network emit from threads of their own

    def append(self, row: Row) -> None:
        line = json.dumps(_finite(row), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._write(line)
            except OSError as error:
                if not self._dropped:
                    log.warning("%s cannot be written, rows are lost: %s", self._path, error)
                self._dropped += 1
            else:
                if self._dropped:
                    log.warning("%s is written again; %d rows are lost", self._path, self._dropped)
                self._dropped = 0

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, line: bytes) -> None:
        file = self._file or self._open()
        if self._is_torn:
            line = b"\n" + line  # so that only the torn row is lost, and not this one too
        written = file.write(line)
        if written:
            self._is_torn = written < len(line)
        if written != len(line):  # what a disk does as it fills up
            raise OSError("only a part of the row fitted")

    def _open(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._is_torn = not _ends_whole(self._path)
        self._file = FileIO(self._path, "a")
        return self._file


def _ends_whole(path: Path) -> bool:
    """Whether the file is absent, empty or ends with a line's end: no process died in a row."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return file.read(1) in (b"", b"\n")


def _read_from(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return b""


def _parsed(line: bytes) -> Row | None:
    """The row, or None for a line that is empty or torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(row: Row) -> Row:
    """JSON has no NaN; other programs' readers refuse the whole line. null says: no number."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
