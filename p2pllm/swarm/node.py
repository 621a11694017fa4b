"""One peer's life in one run, in the network's event loop: its record, rounds, catching up.

`swarm.py` is what roles use of it. Nothing here knows models or tensors libraries, and nothing
waits for a remote peer without a deadline.
"""

import asyncio
import logging
import statistics
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2pllm.coverage import Span
from p2pllm.errors import P2PLLMError
from p2pllm.swarm.allreduce import REDUCE, AllReduce
from p2pllm.swarm.codec import Floats
from p2pllm.swarm.desk import Desk
from p2pllm.swarm.gathering import NoGroup
from p2pllm.swarm.group import Group, Member
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.leader import HELLO, JOIN
from p2pllm.swarm.lobby import Lobby
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import (
    HUNG_UP,
    Network,
    NetworkError,
    PeerId,
    Scoped,
    Stream,
    Timeouts,
    in_background,
    loop_time,
    receive,
    send_message,
)
from p2pllm.swarm.observer import Observer
from p2pllm.swarm.records import Progress, progress_key, seal
from p2pllm.swarm.reducer import AttemptFailed
from p2pllm.swarm.rounds import Anchor, CatchUp
from p2pllm.swarm.shared_records import SHARED_LIFE, SharedRecords
from p2pllm.swarm.transfer import ADAPTER, Shelf, fetch
from p2pllm.swarm.warmup import WARM_UP, WarmUp

logger = logging.getLogger(__name__)
_REMEMBERED = 5  # rounds by which our line is judged


@dataclass(frozen=True)
class Contribution:
    """A local epoch's outcome: delta = local adapter - anchor, (size,) float32, of those values of
    the adapter that this round averages; the first of them is number `start`."""

    anchor: Anchor
    delta: Floats
    samples: float
    start: int = 0
    spans: tuple[Span, ...] = ()  # of the run's rows, which were trained for it


@dataclass(frozen=True)
class Averaged:
    """The round is complete: the average of all deltas, bit-identical for all members."""

    delta: Floats
    group: Group
    seconds_forming: float
    seconds_reducing: float
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)
class Missed:
    """This peer did not get the average; nothing of it was used. A value, not an exception."""

    reason: str
    culprits: tuple[PeerId, ...] = ()
    left_out: tuple[tuple[PeerId, str], ...] = ()


class Node:
    """Make it with `enter`."""

    def __init__(
        self,
        network: Network,
        identity: Identity,
        manifest: Manifest,
        timeouts: Timeouts,
    ) -> None:
        self.manifest = manifest
        self._network, self._identity = network, identity
        self._streams = Scoped(network, manifest.run_id)
        self.shared = SharedRecords(network, identity, manifest)
        self.observer = Observer(network, manifest.run_id, self.shared, timeouts)
        self._timeouts = timeouts
        self._progress: Progress
        self._group: Group | None = None  # the last one that averaged with us
        self._rounding: dict[int, Floats] = {}  # what int8 lost, by where a delta starts
        self._uplinks: deque[float] = deque(maxlen=_REMEMBERED)  # bytes/s in the last rounds
        self._is_calling = False
        self._lobby = Lobby(self._streams, manifest.run.averaging, self.observer.view, timeouts)
        self._desk = Desk(timeouts)
        self._shelf = Shelf(timeouts)
        self._warm_up = WarmUp(self._streams, timeouts)
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_trouble: Callable[[str], None] = logger.warning

    async def enter(self, progress: Progress) -> None:
        """Begin to answer others, and to say that we are here."""
        for protocol, handler in (
            (HELLO, self._say_hello),
            (JOIN, self._lobby.leader.serve),
            (REDUCE, self._desk.serve),
            (ADAPTER, self._shelf.serve),
            (WARM_UP, self._warm_up.serve),
        ):
            await self._streams.serve(protocol, handler)
        self._progress = progress
        self._progress = progress.model_copy(update={"addresses": await self._addresses()})
        await self._announce()
        await self.shared.renew()
        self._in_background(self._keep_alive())

    async def _addresses(self) -> list[str]:
        return (await self._network.addresses())[:4] if self._progress.dialable else []

    # ---- what this peer says

    def announce(self, **changes: Any) -> None:
        """Change our progress record, and publish it soon: nobody waits for that."""
        self._progress = self._progress.model_copy(update=changes)
        self._in_background(self._announce())

    async def _announce(self) -> None:
        sealed, expires = self._sealed_progress()
        key = progress_key(self.manifest.run_id)
        await self._network.put(key, self._network.me, sealed, expires)

    def _sealed_progress(self) -> tuple[bytes, float]:
        expires = self._network.now() + self._timeouts.record_life
        record = self._progress.model_copy(update={"expires": expires})
        key = progress_key(self.manifest.run_id)
        return seal(self._identity, key, self._network.me, record, expires), expires

    async def _say_hello(self, stream: Stream) -> None:
        await send_message(stream, record=self._sealed_progress()[0])
        await receive(stream, 64, self._timeouts.silence)  # until the other side hangs up

    async def hold(self, anchor: Anchor, state: Floats, size: int, **said: Any) -> None:
        """This is what we hold now, an adapter and perhaps an optimizer's state behind it; this
        round averages `size` values of it. Hand it to others, and say so. `said`: what else changes
        in our record."""
        self._shelf.hold(anchor, state)
        trains = self._progress.role == "trainer"
        self._lobby.stand_at(anchor, size, trains)
        self._warm_up.plan(self._group)
        if self._group is not None and anchor.round == self._group.anchor.round + 1:
            self.observer.presume(self._group, anchor)
        self.announce(round=anchor.round, digest=anchor.digest, **said)

    async def leave(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._lobby.turn_back()
        self._warm_up.end()
        self._progress = self._progress.model_copy(update={"state": "leaving"})
        await self._announce()

    # ---- the round

    def approach(self, anchor: Anchor) -> None:
        """The local epoch on this anchor has begun: go to where its group will form."""
        self._lobby.approach(anchor, self._progress.dialable)
        self._in_background(self._meet_the_others())

    def expect_end(self, seconds: float) -> None:
        """Our local epoch ends in about so many seconds."""
        self._warm_up.expect(seconds)

    @property
    def closes_at(self) -> float | None:
        """By the loop's clock, when this round's group closes without us; None: not yet."""
        return self._lobby.closes_at

    async def average(self, contribution: Contribution) -> Averaged | Missed:
        """One attempt at the round. Bounded by the deadlines, whatever others do."""
        started = loop_time()
        self._warm_up.end()
        mine = Member(
            self._network.me,
            float(contribution.samples),
            self._norm_of(contribution),
            self._progress.dialable,
            self._progress.speed,
            statistics.median(self._uplinks) if self._uplinks else 0.0,
            contribution.spans,
        )
        if not mine.is_sane:
            return Missed("our own local epoch did not end in finite values")
        group = await self._lobby.join(contribution.anchor, mine)
        if isinstance(group, NoGroup):
            self.observer.look_anew()
            return Missed(group.reason)
        formed = loop_time()
        rounding = self._rounding.get(contribution.start)
        attempt = AllReduce(group, self._streams, contribution.delta, rounding, self._timeouts)
        try:
            reduced = await self._desk.run(attempt)
        except AttemptFailed as failure:
            if failure.culprit != self._network.me:
                self._lobby.suspicion.blame(failure.culprit, failure.reason)
                if failure.reason.endswith(HUNG_UP):
                    self._in_background(self._lobby.hear(failure.culprit))
            self.observer.look_anew()
            return Missed(failure.reason, (failure.culprit,), tuple(group.left_out.items()))
        finally:
            self._in_background(self._desk.forget(attempt))
        if reduced.rounding is not None:
            self._rounding[contribution.start] = reduced.rounding
        self._group = group
        if reduced.uplink:
            self._uplinks.append(reduced.uplink)
        return Averaged(
            reduced.delta,
            group,
            seconds_forming=formed - started,
            seconds_reducing=loop_time() - formed,
            bytes_sent=reduced.bytes_sent,
            bytes_received=reduced.bytes_received,
        )

    def _norm_of(self, contribution: Contribution) -> float:
        """What may come from us at most: the delta, and what rounding left of earlier ones."""
        norm = float(np.linalg.norm(contribution.delta))
        if (rounding := self._rounding.get(contribution.start)) is not None:
            norm += float(np.linalg.norm(rounding))
        return norm

    async def catch_up(
        self, action: CatchUp, size: int
    ) -> tuple[Floats, tuple[PeerId, ...]] | Missed:
        """The committed adapter, and who delivered parts of it."""
        try:
            return await fetch(self._streams, action.donors, action.anchor, size, self._timeouts)
        except NetworkError as problem:
            return Missed(str(problem), action.donors)

    # ---- staying alive

    async def _keep_alive(self) -> None:
        shared_at = loop_time()
        while True:
            await asyncio.sleep(self._timeouts.announce)
            try:
                await self._mend_network()
                await self._announce()
                await self.observer.view(self._timeouts.heartbeat)
                self._in_background(self._meet_the_others())
                if loop_time() - shared_at > SHARED_LIFE / 4:
                    shared_at = loop_time()
                    await self.shared.renew()
            except (NetworkError, P2PLLMError) as problem:  # the next turn tries again
                logger.info("renewing our records failed: %s", problem)

    async def _mend_network(self) -> None:
        if not await self._network.is_alive():
            self.on_trouble("the libp2p daemon died or is stuck; starting it again")
            await self._network.restart()
            self.announce(addresses=await self._addresses())
        elif not self._is_calling:
            self._is_calling = True
            self._in_background(self._call_the_lost())

    async def _meet_the_others(self) -> None:
        """The all-reduce needs a connection to everybody: have it before that."""
        view = await self.observer.view(self._timeouts.announce)
        await self._network.connect({p.peer: p.addresses for p in view.trainers if p.dialable})

    async def _call_the_lost(self) -> None:
        """Dial those that we knew and have no link to: after a cut nobody else would, and the two
        halves of a swarm that was parted do not find each other by themselves."""
        try:
            was_connected = await self._network.is_connected()
            if await self._network.reconnect() and not was_connected and self.observer.names:
                self.on_trouble("lost the swarm for a while; found it again")
        finally:
            self._is_calling = False

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        in_background(work, self._tasks)
