"""A peer without a model: a real process, the real roles, the real network, and a learner that only
counts. It says on standard output in which phase of which round it is, and stands still there when
the test asks for it.

    {"phase": "reducing", "round": 2, "held": true, "time": 1784...}

Phases: training, forming (it wants to join the group), sending (its third chunk goes out), reducing
(its third averaged chunk goes out), committed (it has the average and has told nobody yet).
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import p2pllm.swarm.hivemind_network  # noqa: F401  # loaded once, before forking
from p2pllm.config.peer import NetworkConfig, PeerConfig
from p2pllm.config.run import AveragingConfig, DataConfig, Deadline, ModelConfig, RunConfig
from p2pllm.events import Events
from p2pllm.roles.bootstrap import bootstrap
from p2pllm.roles.entry import seat_in_run
from p2pllm.swarm import exchange, network
from p2pllm.swarm.allreduce import AllReduce
from p2pllm.swarm.codec import CHUNK, encoded_size
from p2pllm.swarm.lobby import Lobby
from p2pllm.swarm.swarm import Swarm
from tests.counting import CountingLearner, counting_aggregator, counting_trainer
from tests.faults.liars import corrupt, declared
from tests.faults.orders import Orders

_KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET
_THIRD = 3  # the chunk at which `sending` and `reducing` are in full swing


class Script:
    """Says what the peer does, and makes it stand still where it is told to."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._said: set[tuple[str, int]] = set()
        self._chunks: dict[bytes, int] = {}
        self.round = 0  # of the all-reduce that runs

    def is_held(self, phase: str, round: int) -> bool:
        """Whether to wait. Says so, the first time."""
        hold = f"{phase}:{round}"
        held = hold in self._orders.holds and self._orders.gate(hold).exists()
        if (phase, round) not in self._said:
            self._said.add((phase, round))
            row = {"phase": phase, "round": round, "held": held, "time": time.time()}
            print(json.dumps(row), flush=True)
        return held

    def pause(self, phase: str, round: int) -> None:
        while self.is_held(phase, round):
            time.sleep(0.02)

    async def wait(self, phase: str, round: int) -> None:
        while self.is_held(phase, round):
            await asyncio.sleep(0.02)

    def train(self, round: int) -> None:
        self.pause("training", round)
        least, until = time.monotonic() + 0.4, time.monotonic() + self._orders.epoch
        while time.monotonic() < until and not (
            self._orders.hurry.exists() and time.monotonic() > least
        ):
            time.sleep(0.02)

    def is_chunk(self, found: bytes, kind: bytes) -> bool:
        """Whether this is a whole chunk of that kind, and not one of the first."""
        if found != kind:
            return False
        self._chunks[kind] = self._chunks.get(kind, 0) + 1
        return self._chunks[kind] >= _THIRD

    @property
    def lie(self) -> str:
        return self._orders.lie.read_text() if self._orders.lie.exists() else ""

    def new_attempt(self, round: int) -> None:
        self.round = round
        self._chunks.clear()


def install(script: Script, by_line: bool) -> None:
    """Put the script's hooks around the product's own functions."""
    join, run, send, hold = Lobby.join, AllReduce.run, network.send, Swarm.hold
    sent = 1 + encoded_size(CHUNK, "fp16")

    async def joined(self: Lobby, anchor: Any, mine: Any) -> Any:
        await script.wait("forming", anchor.round)
        return await join(self, anchor, declared(script.lie, mine))

    async def ran(self: AllReduce) -> Any:
        script.new_attempt(self.group.anchor.round)
        corrupt(script.lie, self)
        while script.lie == "silence":
            await asyncio.sleep(0.1)
        return await run(self)

    async def sends(stream: Any, frame: bytes | memoryview, timeout: float) -> None:
        for phase, kind in (("sending", b"d"), ("reducing", b"c")):
            if len(frame) == sent and script.is_chunk(bytes(frame[:1]), kind):
                await script.wait(phase, script.round)
        await send(stream, frame, timeout)

    def holds(self: Swarm, anchor: Any, state: Any, size: int, **said: Any) -> None:
        script.pause("committed", anchor.round - 1)
        hold(self, anchor, state, size, **said)

    if not by_line:
        exchange._TIMED = sys.maxsize
    Lobby.join, AllReduce.run = joined, ran  # type: ignore[method-assign]
    Swarm.hold = holds  # type: ignore[method-assign]
    exchange.send = sends  # type: ignore[attr-defined]


def live(orders: Orders) -> None:
    """The whole life of a light peer, in a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_KILLED_WITH_PARENT, signal.SIGKILL)
    os.setpgid(0, 0)
    log = os.open(orders.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(log, standard)
    if orders.namespace:
        handle = os.open(f"/run/netns/{orders.namespace}", os.O_RDONLY)
        if libc.setns(handle, _NETWORK_NAMESPACE):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    script = Script(orders)
    install(script, orders.by_line)
    config = PeerConfig(
        name=orders.name,
        output=orders.folder / orders.name,
        network=NetworkConfig(
            initial_peers=orders.initial_peers,
            host_maddrs=(orders.host,),
            client_only=orders.client_only,
        ),
    )
    if orders.role == "aggregator":
        with seat_in_run(config, "aggregator", Events(), stop) as seat:
            counting_aggregator(seat, orders.size).run()
    elif orders.initial_peers:
        _train(orders, config, script.train, stop)
    else:
        bootstrap(run_config(orders), config, None, Events(), stop)
    sys.stdout.flush()
    os._exit(0)  # there is no one here but us; a forked process has handlers of its parent


def run_config(orders: Orders) -> RunConfig:
    averaging = {"deadline": Deadline(floor=5.0, ceiling=60.0), **orders.averaging}
    return RunConfig(
        name="faults",
        rounds=orders.rounds,
        model=ModelConfig(name="none"),
        data=DataConfig(source="none"),
        averaging=AveragingConfig(**averaging),
    )


def _train(
    orders: Orders, config: PeerConfig, before: Callable[[int], None], stop: threading.Event
) -> None:
    with seat_in_run(config, "trainer", Events(), stop) as seat:
        learner = CountingLearner(orders.size, orders.step, before, orders.steps, orders.pause)
        counting_trainer(seat, learner).run()
