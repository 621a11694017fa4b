"""One peer's life in one run, in the network's event loop: records, rounds, catching up.

`swarm.py` is what roles use of it. Nothing here knows models or tensors libraries, and nothing
waits for a remote peer without a deadline.
"""

import asyncio
import dataclasses
import logging
import math
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
from p2pllm.swarm.group import Group, Member
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.leader import HELLO, JOIN, NoGroup
from p2pllm.swarm.lobby import Lobby
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import (
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
from p2pllm.swarm.records import (
    RUNS_KEY,
    Designation,
    Progress,
    Results,
    designation_key,
    open_envelope,
    progress_key,
    read,
    results_key,
    seal,
)
from p2pllm.swarm.reducer import AttemptFailed
from p2pllm.swarm.rounds import Anchor, CatchUp, SwarmView
from p2pllm.swarm.transfer import ADAPTER, Shelf, fetch

logger = logging.getLogger(__name__)
_SHARED_LIFE = 120.0  # seconds: records that every peer renews (manifest, designation)
_RESULTS_LIFE = 3600.0  # seconds: results outlive their aggregator
_DESIGNATION_LIFE = 10 * 365 * 86400.0  # seconds: the owner's word holds as long as the run
_REMEMBERED = 5  # rounds by which our line is judged
_MAX_PEERS = 1024  # records of one run that we look at


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


@dataclass(frozen=True)
class _Committed:
    """The last round that this peer completed in a group."""

    group: Group
    anchor: Anchor  # the adapter that came out of it
    at: float  # when, by the loop's clock


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
        self._timeouts = timeouts
        self._progress: Progress
        self._designation: tuple[Designation, bytes] | None = None
        self._results: Results = Results(results=[])
        self._group: Group | None = None  # the last one that averaged with us
        self._committed: _Committed | None = None
        self._rounding: dict[int, Floats] = {}  # what int8 lost, by where a delta starts
        self._uplinks: deque[float] = deque(maxlen=_REMEMBERED)  # bytes/s in the last rounds
        self._view = SwarmView(network.me)
        self._viewed_at = -math.inf  # by the loop's clock
        self._names: dict[PeerId, str] = {}  # of everybody whose record we have seen
        self._is_calling = False
        self._slow_read = -1e9  # monotonic time when designation and results were last read
        self._lobby = Lobby(self._streams, manifest.run.averaging, self.view, timeouts)
        self._desk = Desk(timeouts)
        self._shelf = Shelf(timeouts)
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_trouble: Callable[[str], None] = logger.warning

    async def enter(self, progress: Progress) -> None:
        """Begin to answer others, and to say that we are here."""
        for protocol, handler in (
            (HELLO, self._say_hello),
            (JOIN, self._lobby.leader.serve),
            (REDUCE, self._desk.serve),
            (ADAPTER, self._shelf.serve),
        ):
            await self._streams.serve(protocol, handler)
        self._progress = progress
        self._progress = progress.model_copy(update={"addresses": await self._addresses()})
        await self._announce()
        await self._renew_shared()
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
        if self._group is not None and anchor.round == self._group.anchor.round + 1:
            self._committed = _Committed(self._group, anchor, loop_time())
            peers = tuple(self._presumed(p) for p in self._view.peers)
            self._view = dataclasses.replace(self._view, peers=peers)
        self.announce(round=anchor.round, digest=anchor.digest, **said)

    def _presumed(self, peer: Progress) -> Progress:
        """Who was in the group with us holds what we hold now, whatever its record says for a
        moment longer: the next group should not be looked for in the wrong place."""
        known, now = self._committed, loop_time()
        if known is None or now > known.at + 2 * self._timeouts.heartbeat:
            return peer
        if peer.peer not in known.group.peers or peer.round != known.group.anchor.round:
            return peer
        news = {"round": known.anchor.round, "digest": known.anchor.digest, "state": "training"}
        return peer.model_copy(update={**news, "coverage": (), "sketch": None})

    async def leave(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        self._lobby.turn_back()
        self._progress = self._progress.model_copy(update={"state": "leaving"})
        await self._announce()

    # ---- what it knows of the others

    async def view(self, max_age: float = 0.0) -> SwarmView:
        """The live records, as they were at most so many seconds ago. What cannot be read just now
        stays as it was."""
        if loop_time() - self._viewed_at <= max_age:
            return self._view
        began = loop_time()
        found = await self._network.get(progress_key(self.manifest.run_id))
        key, now = progress_key(self.manifest.run_id), self._network.now()
        peers = {p.peer: p for p in self._view.peers if p.expires > now}
        for author, data in list(found.items())[:_MAX_PEERS]:
            record = read(Progress, author, key, author, data)
            if record is None or record.peer != author or author == self._network.me:
                continue
            if record.expires <= now:
                continue  # replayed
            if author not in peers or record.expires > peers[author].expires:
                peers[author] = record
                self._network.note(a for a in record.addresses if a.endswith(f"/p2p/{author}"))
        await self._read_slow_records()
        self._names |= {p.peer: p.name for p in peers.values()}
        self._view = SwarmView(
            self._network.me,
            tuple(self._presumed(peers[author]) for author in sorted(peers)),
            self._designation[0].aggregator if self._designation else None,
            tuple(self._results.results),
            self._names,
        )
        self._viewed_at = began
        return self._view

    async def _read_slow_records(self) -> None:
        if loop_time() - self._slow_read < self._timeouts.heartbeat:
            return
        self._slow_read = loop_time()
        run_id, owner = self.manifest.run_id, self.manifest.owner
        key = designation_key(run_id)
        for author, data in (await self._network.get(key)).items():
            word = read(Designation, owner, key, author, data)
            known = self._designation[0].serial if self._designation else 0
            if word is not None and word.run_id == run_id and word.serial >= known:
                self._designation = (word, data)
        if self._designation is not None:
            aggregator, key = self._designation[0].aggregator, results_key(run_id)
            data = (await self._network.get(key)).get(aggregator, b"")
            self._results = read(Results, aggregator, key, aggregator, data) or self._results

    # ---- the round

    def approach(self, anchor: Anchor) -> None:
        """The local epoch on this anchor has begun: go to where its group will form."""
        self._lobby.approach(anchor, self._progress.dialable)
        self._in_background(self._meet_the_others())

    async def average(self, contribution: Contribution) -> Averaged | Missed:
        """One attempt at the round. Bounded by the deadlines, whatever others do."""
        started = loop_time()
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
            self._viewed_at = -math.inf
            return Missed(group.reason)
        formed = loop_time()
        rounding = self._rounding.get(contribution.start)
        attempt = AllReduce(group, self._streams, contribution.delta, rounding, self._timeouts)
        try:
            reduced = await self._desk.run(attempt)
        except AttemptFailed as failure:
            if failure.culprit != self._network.me:
                self._lobby.suspicion.blame(failure.culprit, failure.reason)
            self._viewed_at = -math.inf
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

    # ---- the owner's and the aggregator's part

    async def designate(self, aggregator: PeerId, serial: int) -> None:
        """As the run's owner: name the aggregator rank."""
        word = Designation(run_id=self.manifest.run_id, aggregator=aggregator, serial=serial)
        until = self._network.now() + _DESIGNATION_LIFE
        key = designation_key(self.manifest.run_id)
        self._designation = (word, seal(self._identity, key, self._network.me, word, until))
        await self._renew_shared()

    async def publish(self, results: Results) -> None:
        """As the aggregator: announce the evaluations so far."""
        self._results = results
        expires = self._network.now() + _RESULTS_LIFE
        key = results_key(self.manifest.run_id)
        sealed = seal(self._identity, key, self._network.me, results, expires)
        await self._network.put(key, self._network.me, sealed, expires)

    # ---- staying alive

    async def _keep_alive(self) -> None:
        shared_at = loop_time()
        while True:
            await asyncio.sleep(self._timeouts.announce)
            try:
                await self._mend_network()
                await self._announce()
                await self.view(self._timeouts.heartbeat)
                self._in_background(self._meet_the_others())
                if loop_time() - shared_at > _SHARED_LIFE / 4:
                    shared_at = loop_time()
                    await self._renew_shared()
                    if self._is_aggregator() and self._results.results:
                        await self.publish(self._results)
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
        view = await self.view(self._timeouts.announce)
        await self._network.connect({p.peer: p.addresses for p in view.trainers if p.dialable})

    async def _call_the_lost(self) -> None:
        """Dial those that we knew and have no link to: after a cut nobody else would, and the two
        halves of a swarm that was parted do not find each other by themselves."""
        try:
            was_connected = await self._network.is_connected()
            if await self._network.reconnect() and not was_connected and self._names:
                self.on_trouble("lost the swarm for a while; found it again")
        finally:
            self._is_calling = False

    async def _renew_shared(self) -> None:
        """Keep the manifest and the designation alive: any peer may serve them."""
        until = self._network.now() + _SHARED_LIFE
        await self._network.put(RUNS_KEY, self.manifest.run_id, self.manifest.pack(), until)
        if self._designation is not None:
            key, data = designation_key(self.manifest.run_id), self._designation[1]
            opened = open_envelope(key, self.manifest.owner, data)
            if opened is not None:
                await self._network.put(key, self.manifest.owner, data, min(until, opened[2]))

    def _is_aggregator(self) -> bool:
        return self._designation is not None and (
            self._designation[0].aggregator == self._network.me
        )

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        in_background(work, self._tasks)
