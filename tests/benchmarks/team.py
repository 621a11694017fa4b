"""N processes that run one system together, commanded over pipes. Every wait has a deadline, and
only processes that were started here, and their children, are ever ended."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

import psutil

for _pool in ("OMP", "OPENBLAS", "MKL"):  # one thread per process, in every system alike
    os.environ[f"{_pool}_NUM_THREADS"] = "1"
os.environ["HIVEMIND_LOGLEVEL"] = "CRITICAL"

_ANSWER = 180.0  # seconds for any one call
_FAREWELL = 15.0  # seconds for a process to end by itself
# A server that has torch and hivemind loaded, and forks: processes start in no time.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.benchmarks.ours", "tests.benchmarks.rivals"])


class TeamFailed(Exception):
    """A process of the team raised, died or did not answer."""


class Team:
    """Use it as a context; in it, `call` runs a method of the system in every process."""

    def __init__(self, name: str, n: int, size: int, make: Callable[[], Any]) -> None:
        """size: values of the vector. make: builds the system in each process."""
        self.name, self.n, self.size = name, n, size
        self._pipes: list[Connection] = []
        self._members: list[Any] = []
        for rank in range(n):
            ours, theirs = _processes.Pipe()
            member = _processes.Process(target=_serve, args=(theirs, make), name=f"{name}-{rank}")
            member.start()
            theirs.close()
            self._pipes.append(ours)
            self._members.append(member)

    def __enter__(self) -> Self:
        try:
            meeting = self._call([0], "open", 0, self.n, self.size, "")[0]
            for rank in range(1, self.n):
                self._pipes[rank].send(("open", (rank, self.n, self.size, meeting)))
            for rank in range(1, self.n):
                self._answer(rank)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(TeamFailed):
            self.call("close")
        self._end()

    def call(self, method: str, *args: Any) -> list[Any]:
        """The answers in the order of ranks. Raises TeamFailed."""
        return self._call(range(self.n), method, *args)

    def _call(self, ranks: Any, method: str, *args: Any) -> list[Any]:
        for rank in ranks:
            with contextlib.suppress(BrokenPipeError):
                self._pipes[rank].send((method, args))
        return [self._answer(rank) for rank in ranks]

    def _answer(self, rank: int) -> Any:
        pipe, deadline = self._pipes[rank], time.monotonic() + _ANSWER
        try:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TeamFailed(f"{self.name}: peer {rank} hangs")
            went_well, answer = pipe.recv()
        except (EOFError, ConnectionError) as problem:
            raise TeamFailed(f"{self.name}: peer {rank} died") from problem
        if not went_well:
            raise TeamFailed(f"{self.name}: peer {rank} failed:\n{answer}")
        return answer

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the process sees the end of its pipe, and goes
        for member in self._members:
            family: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(member.pid)
                family = [leader, *leader.children(recursive=True)]
            member.join(_FAREWELL)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            member.join(_FAREWELL)


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    """A process of the team: do what comes over the pipe until it closes."""
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # hivemind counts on it
    system = make()
    while True:
        try:
            method, args = pipe.recv()
            pipe.send(_answer(system, method, args))
        except (EOFError, ConnectionError):
            return


def _answer(system: Any, method: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, getattr(system, method)(*args)
    except Exception:  # noqa: BLE001 - the driver is told, and decides
        return False, traceback.format_exc()
