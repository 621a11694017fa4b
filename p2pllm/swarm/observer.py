"""What one peer knows of the others: a run's signed records, read and made into a view."""

import dataclasses
import math
from dataclasses import dataclass

from p2pllm.swarm.group import Group
from p2pllm.swarm.network import Network, PeerId, Timeouts, loop_time
from p2pllm.swarm.records import Progress, progress_key, read
from p2pllm.swarm.rounds import Anchor, SwarmView
from p2pllm.swarm.shared_records import SharedRecords

_MAX_PEERS = 1024  # records of one run that we look at


@dataclass(frozen=True)
class _Committed:
    """The last round that this peer completed in a group."""

    group: Group
    anchor: Anchor  # the adapter that came out of it
    at: float  # when, by the loop's clock


class Observer:
    """Reads, and says nothing itself."""

    def __init__(
        self, network: Network, run_id: str, shared: SharedRecords, timeouts: Timeouts
    ) -> None:
        self.names: dict[PeerId, str] = {}  # of everybody whose record we have seen
        self._network, self._timeouts = network, timeouts
        self._key, self._shared = progress_key(run_id), shared
        self._view = SwarmView(network.me)
        self._viewed_at = -math.inf  # by the loop's clock
        self._shared_read_at = -math.inf
        self._committed: _Committed | None = None

    async def view(self, max_age: float = 0.0) -> SwarmView:
        """The live records, as they were at most so many seconds ago. What cannot be read just now
        stays as it was."""
        if loop_time() - self._viewed_at <= max_age:
            return self._view
        began = loop_time()
        peers = await self._read_progress()
        if (now := loop_time()) - self._shared_read_at >= self._timeouts.heartbeat:
            self._shared_read_at = now  # they change seldom
            await self._shared.read()
        self.names |= {p.peer: p.name for p in peers.values()}
        self._view = SwarmView(
            self._network.me,
            tuple(self._presumed(peers[author]) for author in sorted(peers)),
            self._shared.aggregator,
            tuple(self._shared.results.results),
            self.names,
        )
        self._viewed_at = began
        return self._view

    def look_anew(self) -> None:
        """What we know has led us astray: the next view is read, however young this one is."""
        self._viewed_at = -math.inf

    def presume(self, group: Group, anchor: Anchor) -> None:
        """All of this group hold the adapter now that came out of it, as we do."""
        self._committed = _Committed(group, anchor, loop_time())
        peers = tuple(self._presumed(p) for p in self._view.peers)
        self._view = dataclasses.replace(self._view, peers=peers)

    def _presumed(self, peer: Progress) -> Progress:
        """Who was in the group with us holds what we hold now, or soon does over a slower line,
        whatever its record still says: the next group should wait for it."""
        known, now = self._committed, loop_time()
        if known is None or now > known.at + self._timeouts.silence:
            return peer
        if peer.peer not in known.group.peers or peer.round != known.group.anchor.round:
            return peer
        news = {"round": known.anchor.round, "digest": known.anchor.digest, "state": "training"}
        return peer.model_copy(update={**news, "coverage": (), "sketch": None})

    async def _read_progress(self) -> dict[PeerId, Progress]:
        """The others' live records, those that cannot be read just now as we last knew them."""
        found, now = await self._network.get(self._key), self._network.now()
        peers = {p.peer: p for p in self._view.peers if p.expires > now}
        for author, data in list(found.items())[:_MAX_PEERS]:
            record = read(Progress, author, self._key, author, data)
            if record is None or record.peer != author or author == self._network.me:
                continue
            if record.expires <= now:
                continue  # replayed
            if author not in peers or record.expires > peers[author].expires:
                peers[author] = record
                self._network.note(a for a in record.addresses if a.endswith(f"/p2p/{author}"))
        return peers
