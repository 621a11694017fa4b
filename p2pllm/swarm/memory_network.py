"""The in-process twin of the network: the same seam, no sockets, no daemon.

All peers of a `World` live in one event loop. Without links everything arrives at once; with them
(`Link`) it takes its time, best in a loop of `virtual_time.py`. A test scripts its failures: `cut`
makes a peer a silent black hole, `part` does so between groups of peers, `kill` breaks a peer's
streams, `tamper` rewrites the frames that it sends.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from p2pllm.swarm.identity import Identity
from p2pllm.swarm.link import INSTANT, Line, Link, retransmission
from p2pllm.swarm.network import (
    HUNG_UP,
    Handler,
    NetworkError,
    PeerId,
    Stream,
    in_background,
    loop_time,
)
from p2pllm.swarm.records import is_acceptable

Tamper = Callable[[bytes], bytes]
_BUFFER = 65_536  # bytes that may wait for the line behind a `send` that has returned


class World:
    """Everything that the peers of one in-process swarm share."""

    def __init__(self, clock: Callable[[], float] = loop_time, seed: int = 0) -> None:
        """clock: what records expire by, in seconds. seed: of the draw which packets are lost."""
        self.clock = clock
        self.chance = random.Random(seed)
        self.peers: dict[PeerId, MemoryNetwork] = {}
        self.records: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.tampers: dict[PeerId, Tamper] = {}
        self._cut: set[PeerId] = set()
        self._groups: dict[PeerId, int] = {}  # of a partition
        self._held: list[_MemoryStream] = []  # what cannot arrive before the world is whole again

    def join(
        self, identity: Identity, dialable: bool = True, link: Link = INSTANT
    ) -> "MemoryNetwork":
        network = MemoryNetwork(self, identity, dialable, link)
        self.peers[identity.peer_id] = network
        return network

    def cut(self, peer: PeerId) -> None:
        self._cut.add(peer)

    def heal(self, peer: PeerId) -> None:
        self._cut.discard(peer)
        self._release()

    def part(self, *groups: Collection[PeerId]) -> None:
        """Let nothing pass between these groups, neither frames nor records, until `unite`."""
        self._groups = {peer: at for at, group in enumerate(groups) for peer in group}

    def unite(self) -> None:
        self._groups.clear()
        self._release()

    def kill(self, peer: PeerId) -> None:
        network = self.peers.pop(peer)
        network.handlers.clear()
        for stream in list(network.streams):
            stream.close()
        for task in list(network.tasks):
            task.cancel()

    def is_parted(self, one: PeerId, two: PeerId) -> bool:
        groups = self._groups
        return one in groups and two in groups and groups[one] != groups[two]

    def is_severed(self, one: PeerId, two: PeerId) -> bool:
        return one in self._cut or two in self._cut or self.is_parted(one, two)

    def hold(self, stream: "_MemoryStream") -> None:
        """Try again to deliver to this stream when something heals."""
        self._held.append(stream)

    def _release(self) -> None:
        held, self._held = self._held, []
        for stream in held:
            stream.land()


class _MemoryStream:
    """One end of a stream. Frames always arrive whole and in order, as over TCP.

    A frame takes the sender's line up, travels for the latency of both links, and takes the
    receiver's line down; its head is there while its tail is still being sent. No window stops the
    sender when the receiver reads slowly.
    """

    _END = b""  # a frame is never empty on the wire; the protocol sends none

    def __init__(self, world: World, here: "MemoryNetwork", there: "MemoryNetwork") -> None:
        self.peer = there.me
        self.bytes_sent = self.bytes_received = 0
        self._world, self._here, self._there = world, here, there
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._coming: deque[tuple[bytes, float, float]] = deque()  # frame, its first and last bit
        self._other: _MemoryStream
        self._closed = self._hung_up = False

    @classmethod
    def pair(
        cls, world: World, one: "MemoryNetwork", two: "MemoryNetwork"
    ) -> tuple["_MemoryStream", "_MemoryStream"]:
        left, right = cls(world, one, two), cls(world, two, one)
        left._other, right._other = right, left
        return left, right

    async def send(self, frame: bytes | memoryview) -> None:
        if self._closed or self._hung_up:
            raise NetworkError(f"{self.peer} {HUNG_UP}")
        data = bytes(frame)
        if self._here.me in self._world.tampers:
            data = self._world.tampers[self._here.me](data)
        gone = self._transmit(data)
        self.bytes_sent += len(data)
        if gone and (bandwidth := self._here.link.bandwidth):
            await asyncio.sleep(gone - _BUFFER / bandwidth - loop_time())

    async def receive(self, limit: int) -> bytes:
        if self._closed:
            raise NetworkError("this stream is closed")
        frame = await self._inbox.get()
        if frame == self._END:
            self._inbox.put_nowait(self._END)
            raise NetworkError(f"{self.peer} {HUNG_UP}")
        if len(frame) > limit:
            raise NetworkError(f"{self.peer} sent {len(frame)} bytes where {limit} are allowed")
        self.bytes_received += len(frame)
        return frame

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transmit(self._END)

    def _transmit(self, data: bytes) -> float:
        """Put a frame on its way: the time when it has left the line, 0 where there is no line."""
        other, here, there = self._other, self._here.link, self._there.link
        if here is INSTANT and there is INSTANT and not other._coming:
            if self._world.is_severed(self._here.me, self.peer):
                other._coming.append((data, 0.0, 0.0))
                self._world.hold(other)
            else:
                other._arrive(data)
            return 0.0
        first, last = self._here.up.take(len(data), here)
        delay = here.latency + there.latency
        late = retransmission(len(data), here, there, self._world.chance)
        other._coming.append((data, first + delay, last + delay + late))
        if len(other._coming) == 1:
            other._expect()
        return last

    def _expect(self) -> None:
        _, first, _ = self._coming[0]
        asyncio.get_running_loop().call_at(first, self._enter)

    def _enter(self) -> None:
        """The first bit of a frame has come to our line."""
        frame, _, last = self._coming[0]
        _, through = self._here.down.take(len(frame), self._here.link)
        asyncio.get_running_loop().call_at(max(through, last), self.land)

    def land(self) -> None:
        """A frame is there, or may be there at last."""
        if self._world.is_severed(self._here.me, self.peer):
            self._world.hold(self)
            return
        self._arrive(self._coming.popleft()[0])
        if self._coming:
            self._expect()

    def _arrive(self, frame: bytes) -> None:
        self._hung_up |= frame == self._END
        self._inbox.put_nowait(frame)


class MemoryNetwork:
    """One peer's end of a `World`."""

    def __init__(self, world: World, identity: Identity, dialable: bool, link: Link) -> None:
        self.me = identity.peer_id
        self.link, self.up, self.down = link, Line(), Line()
        self.handlers: dict[str, Handler] = {}
        self.streams: set[_MemoryStream] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._world, self._dialable = world, dialable

    def now(self) -> float:
        return self._world.clock()

    async def open(self, peer: PeerId, protocol: str) -> Stream:
        if peer in self._world.peers:
            await self._round_trip(self._world.peers[peer].link)
        if self._world.is_severed(self.me, peer):
            await asyncio.Future()  # never answers; the caller's deadline ends it
        other = self._world.peers.get(peer)
        handler = other.handlers.get(protocol) if other is not None else None
        if other is None or handler is None or not other._dialable:
            raise NetworkError(f"{peer} cannot be reached")
        ours, theirs = _MemoryStream.pair(self._world, self, other)
        self.streams.add(ours)
        other.streams.add(theirs)
        in_background(other._run(handler, theirs), other.tasks)
        return ours

    async def _run(self, handler: Handler, stream: _MemoryStream) -> None:
        try:
            await handler(stream)
        except NetworkError:
            pass
        finally:
            stream.close()
            self.streams.discard(stream)

    async def serve(self, protocol: str, handler: Handler) -> None:
        self.handlers[protocol] = handler

    async def put(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        await self._round_trip(self.link)
        if not await self.is_connected() or not is_acceptable(key, subkey, value, expires):
            return False
        self._world.records.setdefault(key, {})[subkey] = (value, expires)
        return True

    async def get(self, key: str) -> dict[str, bytes]:
        await self._round_trip(self.link)
        if not await self.is_connected():
            return {}
        return {
            subkey: value
            for subkey, (value, expires) in self._world.records.get(key, {}).items()
            if expires > self.now() and not self._world.is_parted(self.me, subkey)
        }

    async def _round_trip(self, link: Link) -> None:
        """To a peer on this link and back; records lie with peers on links like our own."""
        if seconds := 2 * (self.link.latency + link.latency):
            await asyncio.sleep(seconds)

    async def addresses(self) -> list[str]:
        return [f"/memory/{self.me}"]

    async def is_alive(self) -> bool:
        return True

    async def is_connected(self) -> bool:
        return not self._world.is_severed(self.me, self.me)

    async def connect(self, peers: Mapping[PeerId, Sequence[str]]) -> None:
        pass

    def note(self, addresses: Iterable[str]) -> None:
        pass

    async def reconnect(self) -> bool:
        return await self.is_connected()

    async def restart(self) -> None:
        pass

    async def close(self) -> None:
        if self.me in self._world.peers:
            self._world.kill(self.me)
