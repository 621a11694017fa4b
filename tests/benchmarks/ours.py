"""p2pllm under test, and what is measured of no other system: its memory, and where time goes."""

import contextlib
import cProfile
import pstats
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from p2pllm.config.peer import NetworkConfig
from p2pllm.config.run import AveragingConfig, DataConfig, ModelConfig, RunConfig
from p2pllm.swarm.codec import Compression
from p2pllm.swarm.hivemind_network import HivemindNetwork
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import Timeouts
from p2pllm.swarm.node import Averaged, Contribution
from p2pllm.swarm.records import Progress
from p2pllm.swarm.rounds import Anchor
from p2pllm.swarm.swarm import Swarm
from tests.benchmarks.peer import LONGEST, LOOPBACK, Peak, Peer, Round


class Ours(Peer):
    """`Swarm`, as the trainer uses it, over a real libp2p daemon."""

    def __init__(self, compression: Compression) -> None:
        self.compression, self.listens = compression, LOOPBACK
        self.epoch = 0.0  # seconds between `prepare` and `round`; 0: a peer cannot tell

    def start(self, meeting: str) -> str:
        self._folder = Path(tempfile.mkdtemp(prefix="p2pllm-bench-"))
        identity = Identity.open(self._folder / "peer.key")
        config = NetworkConfig(
            host_maddrs=(self.listens,), initial_peers=tuple(meeting.split()), relay=False
        )
        timeouts = Timeouts()

        async def network() -> HivemindNetwork:
            return await HivemindNetwork.start(identity, config, timeouts)

        self._swarm = Swarm(identity, network, timeouts, threading.Event())
        run = RunConfig(
            name=f"bench-{self.compression}",
            model=ModelConfig(name="none"),
            data=DataConfig(source="none"),
            averaging=AveragingConfig(compression=self.compression, min_peers=self.n),
        )
        progress = Progress(
            peer=identity.peer_id,
            name=f"peer-{self.rank}",
            role="trainer",
            state="joining",
            round=0,
        )
        # Nobody reads the signature: the manifest is handed to everybody here.
        self._swarm.enter(Manifest(run, "owner", b""), progress, lambda trouble: None)
        self._delta = self.contribution()
        return " ".join(self._swarm.addresses())

    def prepare(self, number: int) -> None:
        # The content of the anchor plays no part in a round, only its name does.
        self._anchor = Anchor(number, f"{number:064x}")
        self._swarm.hold(self._anchor, np.zeros(1, np.float32), self.size)
        self._swarm.announce(state="training")
        self._swarm.approach(self._anchor)
        if self.epoch:
            self._swarm.expect_end(self.epoch)

    def round(self, number: int) -> Round:
        # All that a trainer does between its last local step and the average.
        self._swarm.announce(state="ready")
        self._swarm.view(10.0)
        outcome = self._swarm.average(Contribution(self._anchor, self._delta, samples=1.0)).result()
        ended = time.monotonic()
        if not isinstance(outcome, Averaged):
            return Round(ended, None, 0.0, f"missed: {outcome.reason if outcome else 'stopped'}")
        if len(outcome.group.members) != self.n:
            return Round(ended, None, 0.0, f"a group of {len(outcome.group.members)}")
        problem = self.problem_with(outcome.delta)
        return Round(ended, outcome.seconds_forming, outcome.seconds_reducing, problem)

    def close(self) -> None:
        self._swarm.close()
        (self._folder / "peer.key").unlink(missing_ok=True)
        self._folder.rmdir()

    # ---- measurements of one system only

    def peak(self, number: int) -> Peak:
        """One round of a peer that holds its state and its delta, as a trainer does."""
        del self._delta
        idle = psutil.Process().memory_info().rss
        state = np.ones(self.size, np.float32)
        self._delta = self.contribution()
        before = psutil.Process().memory_info().rss
        self.prepare(number)
        with _high_water() as water:
            outcome = self.round(number)
        if outcome.problem:
            raise RuntimeError(outcome.problem)
        del state
        return Peak(idle, before, water[0], self.usage().daemon_rss)

    def profile(self, number: int, rounds: int) -> list[tuple[str, int, float, float]]:
        """(function, calls, own seconds, seconds with what it calls) of the network's thread."""
        profiler = cProfile.Profile(time.thread_time)

        async def switch(on: bool) -> None:
            (profiler.enable if on else profiler.disable)()

        self._swarm._thread.submit(switch(True)).result(LONGEST)
        for at in range(rounds):
            self.prepare(number + at)
            self.round(number + at)
        self._swarm._thread.submit(switch(False)).result(LONGEST)
        found: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        return [
            (f"{Path(file).name}:{name}" if line else name, calls, own, total)
            for (file, line, name), (_, calls, own, total, _) in found.items()
        ]


@contextlib.contextmanager
def _high_water() -> Iterator[list[int]]:
    """Yields a list that holds, afterwards, the most memory (bytes) that was resident at once."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the mark
    water: list[int] = []
    yield water
    status = Path("/proc/self/status").read_text()
    water.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
