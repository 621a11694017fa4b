"""What every system under test has in common, and what is measured of it.

All average the same vector: peer k of n brings pattern * (k + 1), so everybody knows the right
answer, and a round that is quietly incomplete is found out. One thread per process (`team.py`).
"""

from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LONGEST = 120.0  # seconds after which a round counts as hung
_WRONG = 0.02  # an average that is off by more than this part of its largest value is no average
_SAMPLES = 4096  # values that are compared with the right answer
_BLOCK: Floats = np.random.default_rng(0).normal(size=65_521, scale=1e-3).astype(np.float32)


@dataclass(frozen=True)
class Round:
    """One peer's view of one round. Times in seconds."""

    ended: float  # by the machine's monotonic clock, which all processes share
    forming: float | None  # until this peer knew its group; None where nothing is formed
    reducing: float
    problem: str = ""  # why the round does not count


@dataclass(frozen=True)
class Usage:
    """What one peer holds at this moment; the daemon counted apart."""

    rss: int  # bytes
    threads: int
    files: int  # open file descriptors
    children: int
    daemon_rss: int  # bytes
    daemon_files: int
    cpu: float  # seconds since its start
    daemon_cpu: float


@dataclass(frozen=True)
class Peak:
    """Memory of one peer in a round, in bytes."""

    idle: int  # before it held anything of the adapter's size
    before: int  # with the state and the delta that it brings into the round
    peak: int  # the most during the round, by the kernel's high-water mark
    daemon: int  # p2pd after the round


class Peer:
    """What all systems share. `open` is called once, then `prepare` and `round` in turns."""

    def open(self, rank: int, n: int, size: int, meeting: str) -> str:
        """meeting: what rank 0 returned; empty for rank 0 itself."""
        self.rank, self.n, self.size = rank, n, size
        return self.start(meeting)

    def start(self, meeting: str) -> str:
        raise NotImplementedError

    def prepare(self, number: int) -> None:
        """What is not timed: everything that a round needs to be in place."""

    def round(self, number: int) -> Round:
        raise NotImplementedError

    def close(self) -> None: ...

    def contribution(self) -> Floats:
        values: Floats = np.resize(_BLOCK, self.size)
        values *= np.float32(self.rank + 1)
        return values

    def problem_with(self, average: Floats) -> str:
        at = np.arange(0, self.size, max(1, self.size // _SAMPLES))
        right = _BLOCK[at % _BLOCK.size] * np.float32((self.n + 1) / 2)
        error = float(np.max(np.abs(average[at] - right)) / np.max(np.abs(right)))
        return "" if error < _WRONG else f"the average is wrong by {error:.1%}"

    def usage(self) -> Usage:
        me = psutil.Process()
        children = me.children(recursive=True)
        daemons = [c for c in children if c.name().startswith("p2pd")]
        own = [me, *(c for c in children if c not in daemons)]
        return Usage(
            rss=sum(p.memory_info().rss for p in own),
            threads=sum(p.num_threads() for p in own),
            files=sum(p.num_fds() for p in own),
            children=len(children),
            daemon_rss=sum(p.memory_info().rss for p in daemons),
            daemon_files=sum(p.num_fds() for p in daemons),
            cpu=_cpu(own),
            daemon_cpu=_cpu(daemons),
        )


def _cpu(processes: list[psutil.Process]) -> float:
    times = [p.cpu_times() for p in processes]
    return float(sum(t.user + t.system for t in times))
