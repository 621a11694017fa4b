"""A swarm of trainers in one process, for what is measured in losses and bytes and not in seconds.

Each peer has the real learner, and the real node, which forms groups, compresses, cuts down,
averages and carries rounding errors on, over the in-memory network and in virtual time. The peers
train one after the other, so one model is enough: all that is a peer's own between two rounds are
the moments of its optimizer and its place in its rows. No peer is ever late here.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pllm.config.run import RunConfig
from p2pllm.digest import digest_of
from p2pllm.model.adapter import Adapter, Values
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.memory_network import World
from p2pllm.swarm.network import Timeouts
from p2pllm.swarm.node import Averaged, Contribution, Missed, Node
from p2pllm.swarm.records import Progress
from p2pllm.swarm.rounds import Anchor
from p2pllm.swarm.virtual_time import VirtualTimeLoop
from p2pllm.training.aggregation import aggregation_error
from p2pllm.training.learner import Learner
from p2pllm.training.outer import OuterOptimizer
from p2pllm.training.source import Source


@dataclass(frozen=True)
class Round:
    """What a round came to."""

    samples: int  # of all peers
    error: float  # aggregation error: see `aggregation_error`
    bytes_per_peer: float  # sent and received, mean over the peers
    cut_down: int  # peers whose delta was out of proportion


class OneProcessSwarm:
    """As many trainers as there are sources. `values` is the adapter that they agree on."""

    def __init__(self, run: RunConfig, adapter: Adapter, sources: Sequence[Source]) -> None:
        """run: with `averaging.min_peers` equal to the number of sources."""
        self._adapter, self._size = adapter, len(sources)
        self._learners = [Learner(adapter, source, run) for source in sources]
        self._outer = OuterOptimizer(run.averaging, adapter.size)
        self._state = self._outer.start(adapter.initial_values(run.seed))
        self._round = 0
        self._nodes: list[Node] = []
        self._loop = VirtualTimeLoop()
        self._loop.run_until_complete(self._enter(run))

    @property
    def values(self) -> Values:
        """(size,)"""
        return self._outer.values(self._state)

    def play_round(self) -> Round:
        """A local epoch of each peer, and their average.

        Raises RuntimeError: a peer missed the round, which nothing here should bring about.
        """
        works, locals_ = [], []
        for learner in self._learners:
            learner.adopt(self.values)
            works.append(learner.train(self._round, lambda step: None, lambda: False))
            locals_.append(learner.values())
        samples = [work.samples for work in works]
        error = aggregation_error(self._adapter, locals_, samples)
        part = self._learners[0].part(self._round)
        deltas = [values[part] - self.values[part] for values in locals_]
        outcomes = self._loop.run_until_complete(self._averaged(deltas, samples, part))
        if len({digest_of(outcome.delta) for outcome in outcomes}) > 1:
            raise RuntimeError(f"round {self._round}: the peers hold different averages")
        self._state = self._state.copy()  # the nodes hand out the one before
        self._outer.step(self._state, outcomes[0].delta, part)
        self._round += 1
        self._loop.run_until_complete(self._hold())
        travelled = sum(o.bytes_sent + o.bytes_received for o in outcomes)
        cut_down = len(outcomes[0].group.out_of_proportion())
        return Round(sum(samples), error, travelled / self._size, cut_down)

    def close(self) -> None:
        """Nothing of the swarm is left at work."""

        async def ended() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._loop.run_until_complete(ended())
        self._loop.close()

    async def _enter(self, run: RunConfig) -> None:
        manifest, world = Manifest.found(run, _identity("owner")), World()
        for number in range(self._size):
            identity = _identity(f"peer {number}")
            node = Node(world.join(identity), identity, manifest, Timeouts())
            await node.enter(
                Progress(
                    peer=identity.peer_id,
                    name=f"peer{number}",
                    role="trainer",
                    state="joining",
                    round=0,
                    dialable=True,
                )
            )
            self._nodes.append(node)
        await self._hold()

    async def _hold(self) -> None:
        part = self._learners[0].part(self._round)
        for node in self._nodes:
            await node.hold(self._anchor, self._state, part.stop - part.start)
            node.announce(state="training")

    @property
    def _anchor(self) -> Anchor:
        return Anchor(self._round, digest_of(self._state))

    async def _averaged(
        self, deltas: Sequence[Values], samples: Sequence[int], part: slice
    ) -> list[Averaged]:
        anchor, attempts = self._anchor, []
        for node, delta, weight in zip(self._nodes, deltas, samples, strict=True):
            node.announce(state="ready")
            attempts.append(node.average(Contribution(anchor, delta, float(weight), part.start)))
        averaged = []
        for outcome in await asyncio.gather(*attempts):
            if isinstance(outcome, Missed):
                raise RuntimeError(f"round {self._round} was missed: {outcome.reason}")
            averaged.append(outcome)
        return averaged


def _identity(name: str) -> Identity:
    """The same in every run, so that the order of the peers is."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))
