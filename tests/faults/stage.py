"""A swarm of light peers to strike at: start them, see in which phase they are, hurt them, and read
in their ledgers what they made of it.

Every wait has a deadline, and only processes that were started here are ever signalled.
"""

import dataclasses
import json
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from p2pllm.journal import LEDGER, METRICS, Row, follow
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.rounds import precedes
from tests.faults.lab import Lab
from tests.faults.orders import Orders, obey
from tests.swarm.traces import daemons_of

NAMES = ("ann", "bob", "cat", "dan")
HAPPENED = 90.0  # seconds in which anything must have happened
T = TypeVar("T")

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # a process with threads cannot be forked
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.faults.light_peer"])  # torch is loaded once, not five times


def wait_until(look: Callable[[], T | None], what: str, timeout: float = HAPPENED) -> T:
    """The first true answer. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.03)
    return answer


class Actor:
    """One light peer's process."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.name = orders, orders.name
        self.born = time.time()
        self._process: multiprocessing.process.BaseProcess = _forks.Process(
            target=obey, args=(orders,), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    # ---- what it says

    def rows(self, file: str = METRICS, event: str = "") -> list[Row]:
        """What this life has written so far."""
        found = self.orders.folder.glob(f"{self.name}/*/{self.name}/{file}")
        rows = [row for path in found for row in next(follow(path)) if row["time"] >= self.born]
        return [row for row in rows if event in ("", row["event"])]

    @property
    def ledger(self) -> list[Row]:
        return self.rows(LEDGER)

    @property
    def final(self) -> str | None:
        """The digest with which it finished."""
        finished = self.rows(event="finished")
        return str(finished[-1]["digest"]) if finished else None

    def wait_for(self, phase: str, round: int, timeout: float = HAPPENED) -> None:
        """Until it is in this phase of this round."""
        seen = re.compile(rf'{{"phase": "{phase}", "round": {round},.*"time": ([\d.]+)}}')

        def look() -> bool:
            assert self.code is None, f"{self.name} ended with {self.code}:\n{self.printed[-2000:]}"
            return any(float(at) >= self.born for at in seen.findall(self.printed))

        wait_until(look, f"{self.name}: {phase} of round {round}", timeout)

    def wait_for_row(self, event: str, after: float = 0.0, timeout: float = HAPPENED) -> Row:
        def look() -> Row | None:
            found = next((r for r in self.rows(event=event) if r["time"] > after), None)
            assert found or self.code is None, f"{self.name} ended:\n{self.printed[-2000:]}"
            return found

        return wait_until(look, f"{self.name}: {event}", timeout)

    @property
    def printed(self) -> str:
        try:
            return self.orders.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # ---- what is done to it

    def signal(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9"""
        self.signal(signal.SIGKILL)
        self._process.join(10)

    def kill_daemon(self) -> None:
        """kill -9 of its p2pd alone."""
        [daemon] = daemons_of(self.pid)
        os.kill(daemon, signal.SIGKILL)

    def release(self, hold: str) -> None:
        self.orders.gate(hold).unlink(missing_ok=True)

    def end(self, timeout: float) -> int | None:
        self._process.join(timeout)
        return self.code


class Stage:
    """A bootstrap peer, `door`, and trainers."""

    def __init__(self, folder: Path, lab: Lab | None = None, **orders: Any) -> None:
        """orders: of every peer."""
        self.folder, self.lab = folder, lab
        self._orders = orders
        self.actors: list[Actor] = []
        self.keys: dict[str, str] = {}
        self.address = ""

    def open(self, **each: dict[str, Any]) -> dict[str, Actor]:
        """Start the door and four trainers, which begin round 0 together. each: orders by name."""
        for name in NAMES:
            path = self.folder / name / "identities" / f"{name}.key"
            identity = Identity.open(path)
            identity.release()
            self.keys[name] = identity.peer_id
        door = self.start("door")
        self.address = str(door.wait_for_row("opened")["addresses"][0])
        begin = "training:0"
        for number, name in enumerate(NAMES, 1):
            orders = dict(each.get(name, {}))
            holds = (*orders.pop("holds", ()), begin)
            self.start(name, step=number * 1e-3, holds=holds, **orders)
        trainers = {actor.name: actor for actor in self.actors[1:]}
        for actor in trainers.values():
            actor.wait_for("training", 0)
        for actor in trainers.values():
            actor.release(begin)
        return trainers

    def start(self, name: str, **more: Any) -> Actor:
        orders = {**self._orders, **more}
        if self.address:
            orders.setdefault("initial_peers", (self.address,))
        if self.lab is not None:
            host = f"/ip4/{self.lab.ip(name)}/tcp/0"
            orders |= {"namespace": self.lab.namespace(name), "host": host}
        told = Orders(name=name, folder=self.folder, **orders)
        for hold in told.holds:
            told.gate(hold).touch()
        self.actors.append(Actor(told))
        return self.actors[-1]

    def again(self, actor: Actor, **changes: Any) -> Actor:
        """Another life: the same identity and folder."""
        orders = dataclasses.replace(actor.orders, holds=(), **changes)
        self.actors.append(Actor(orders))
        return self.actors[-1]

    def leader(self) -> str:
        """Whom they all choose to gather the group."""
        keys = self.keys
        return next(n for n in NAMES if all(n == o or precedes(keys[n], keys[o]) for o in NAMES))

    def hurry(self) -> None:
        """From now on local epochs take no time."""
        (self.folder / "hurry").touch()

    def close(self) -> list[str]:
        """End everybody; who had to be killed, and which daemons are left."""
        for actor in self.actors:
            actor.signal(signal.SIGCONT)
            actor.signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        left = []
        for actor in self.actors:
            if actor.end(max(deadline - time.monotonic(), 0.1)) is None:
                left.append(f"{actor.name} does not end on SIGTERM")
                actor.kill()
        time.sleep(0.2)
        left += [f"{a.name} left a daemon" for a in self.actors if daemons_of(a.pid)]
        return left

    def report(self) -> str:
        """What everybody said, for a case that failed."""
        parts = []
        for actor in self.actors:
            told = [r for r in actor.rows() if r["event"] not in ("step_done", "working")]
            rows = "\n".join(json.dumps(r) for r in told[-40:])
            parts.append(f"--- {actor.name} ({actor.code})\n{actor.printed[-3000:]}\n{rows}")
        return "\n".join(parts)


def reasons(ledgers: Iterable[list[Row]], name: str) -> list[str]:
    """What these ledgers say of a peer that did not take part in a round."""
    found = []
    for row in (row for ledger in ledgers for row in ledger):
        if name in row.get("left_out", {}):
            found.append(str(row["left_out"][name]))
        if name in row.get("culprits", []):
            found.append(str(row["reason"]))
    return found
