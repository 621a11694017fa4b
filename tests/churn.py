"""Scripted swarms in one process: the real trainer and the real protocol, over the in-memory
network, with a learner that only counts.

    Churn(rounds=4).crash("cat", at_round=2).play("ann", "bob", "cat")
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import (
    AveragingConfig,
    DataConfig,
    Deadline,
    ModelConfig,
    RunConfig,
)
from p2pllm.events import Event, Events, Finished
from p2pllm.roles.aggregator import Aggregator
from p2pllm.roles.entry import Seat, seated
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.memory_network import World
from p2pllm.swarm.network import Timeouts
from p2pllm.swarm.records import Role
from p2pllm.swarm.swarm import EventLoopThread, Swarm
from tests.counting import CountingLearner, counting_adapter, counting_trainer

SIZE = 3000
QUICK = Timeouts(
    dial=0.3,
    silence=0.4,
    record=1.0,
    heartbeat=0.1,
    look=0.05,
    announce=0.1,
    record_life=2.0,
    start=2.0,
)


class Script:
    """What happens to one peer, and when."""

    def __init__(self) -> None:
        self.crash_at: int | None = None
        self.slow: dict[int, float] = {}
        self.crash = lambda: None

    def before_training(self, round: int) -> None:
        if round == self.crash_at:
            self.crash()
        time.sleep(self.slow.get(round, 0.0))


class Peer:
    """A trainer, or another role, in a thread of its own."""

    role: Role = "trainer"

    def __init__(self, name: str, churn: "Churn", folder: Path) -> None:
        self.name, self.events = name, list[Event]()
        self.script = churn.scripts.setdefault(name, Script())
        self._identity = Identity.ephemeral()
        self._stop = threading.Event()
        self._churn = churn

        async def opened() -> Any:
            return churn.world.join(self._identity)

        self.swarm = Swarm(self._identity, opened, QUICK, self._stop, churn.thread)
        self.script.crash = self.crash
        config = PeerConfig(**{**churn.settings, "name": name, "output": folder})
        self._seated = seated(
            self.swarm, churn.manifest, config, self.role, Events(self.events.append)
        )
        self.life = self.take(self._seated.__enter__())
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self, seat: Seat) -> Any:
        """What lives in this seat: anything that runs."""
        step = 1e-3 * (len(self._churn.peers) + 1)
        self.learner = self._churn.learner(step, self.script.before_training)
        return counting_trainer(seat, self.learner, self._churn.evaluator)

    def _run(self) -> None:
        with ExitStack() as end:
            end.push(self._seated.__exit__)
            self.life.run()
        if not self._stop.is_set():
            self.swarm.close()

    def crash(self) -> None:
        """Gone without a word, as by kill -9."""
        self._stop.set()
        loop = self._churn.thread.loop
        loop.call_soon_threadsafe(self._churn.world.kill, self._identity.peer_id)
        for task in list(self.swarm._in_run._tasks):
            loop.call_soon_threadsafe(task.cancel)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"{self.name} hangs; its last: {self.events[-3:]}"

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def final(self) -> Finished:
        [finished] = self.of(Finished)
        return cast(Finished, finished)


class Follower(Peer):
    """An aggregator that evaluates nothing."""

    role: Role = "aggregator"

    def take(self, seat: Seat) -> Any:
        return Aggregator(seat, counting_adapter(SIZE), None)


class Churn:
    """A run, and what happens in it."""

    evaluator: Any = None  # of every trainer
    settings: Mapping[str, Any] = MappingProxyType({})  # of every peer's own configuration
    shards = 16

    def __init__(
        self, folder: Path, rounds: int = 3, plan: Mapping[str, Any] | None = None, **averaging: Any
    ) -> None:
        """plan: what else the run agrees on."""
        deadline = Deadline(floor=0.5, ceiling=1.0)
        run = RunConfig(
            name="churn",
            rounds=rounds,
            model=ModelConfig(name="none"),
            data=DataConfig(source="none", shards=self.shards),
            averaging=AveragingConfig(**{"deadline": deadline, **averaging}),
            **(plan or {}),
        )
        self.manifest = Manifest.found(run, Identity.ephemeral())
        self.world, self.thread = World(), EventLoopThread()
        self.scripts: dict[str, Script] = {}
        self.peers: dict[str, Peer] = {}
        self.local_epoch = (1, 0.0)  # steps, seconds for each
        self._folder = folder

    def learner(self, step: float, before_training: Callable[[int], None]) -> CountingLearner:
        """What a peer trains with; another kind of churn has another."""
        return CountingLearner(SIZE, step, before_training, *self.local_epoch)

    def crash(self, name: str, at_round: int) -> "Churn":
        self.scripts.setdefault(name, Script()).crash_at = at_round
        return self

    def slow(self, name: str, at_round: int, seconds: float) -> "Churn":
        self.scripts.setdefault(name, Script()).slow[at_round] = seconds
        return self

    def start(self, *names: str, kind: type[Peer] = Peer) -> "Churn":
        for name in names:
            self.peers[name] = kind(name, self, self._folder)
        return self

    def wait_for(self, name: str, condition: Callable[[Peer], object]) -> None:
        until = time.monotonic() + 20
        while not condition(self.peers[name]):
            assert time.monotonic() < until, self.peers[name].events[-5:]
            time.sleep(0.02)

    def play(self, *names: str, patience: float = 30) -> dict[str, Peer]:
        """Start these peers, and wait for the end of everybody's run, so many seconds for each."""
        self.start(*names)
        for peer in list(self.peers.values()):
            peer.join(timeout=patience)
        self.thread.close()
        return self.peers
