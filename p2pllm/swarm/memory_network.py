"""The in-process twin of the network: the same seam, no sockets, no daemon, no waiting.

All peers of a `World` live in one event loop. A test scripts its failures: `cut` makes a peer a
silent black hole, `kill` breaks its streams at once, `tamper` rewrites the frames that it sends.
"""

import asyncio
from collections.abc import Callable

from p2pllm.swarm.identity import Identity
from p2pllm.swarm.network import Handler, NetworkError, PeerId, Stream
from p2pllm.swarm.records import is_acceptable

Tamper = Callable[[bytes], bytes]


class World:
    """Everything that the peers of one in-process swarm share."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.peers: dict[PeerId, MemoryNetwork] = {}
        self.records: dict[str, dict[str, tuple[bytes, float]]] = {}
        self._cut: set[PeerId] = set()
        self.tampers: dict[PeerId, Tamper] = {}

    def join(self, identity: Identity, dialable: bool = True) -> "MemoryNetwork":
        network = MemoryNetwork(self, identity, dialable)
        self.peers[identity.peer_id] = network
        return network

    def cut(self, peer: PeerId) -> None:
        self._cut.add(peer)

    def heal(self, peer: PeerId) -> None:
        self._cut.discard(peer)

    def kill(self, peer: PeerId) -> None:
        network = self.peers.pop(peer)
        network.handlers.clear()
        for stream in list(network.streams):
            stream.close()
        for task in list(network.tasks):
            task.cancel()

    def is_severed(self, *peers: PeerId) -> bool:
        return not self._cut.isdisjoint(peers)


class _MemoryStream:
    """One end of a pair of queues."""

    _END = b""  # a frame is never empty on the wire; the protocol sends none

    def __init__(self, world: World, me: PeerId, peer: PeerId) -> None:
        self.peer = peer
        self.bytes_sent = self.bytes_received = 0
        self._world, self._me = world, me
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._other: _MemoryStream
        self._closed = False

    @classmethod
    def pair(
        cls, world: World, one: PeerId, two: PeerId
    ) -> tuple["_MemoryStream", "_MemoryStream"]:
        left, right = cls(world, one, two), cls(world, two, one)
        left._other, right._other = right, left
        return left, right

    async def send(self, frame: bytes | memoryview) -> None:
        if self._closed or self._other._closed:
            raise NetworkError(f"{self.peer} hung up")
        data = bytes(frame)
        if self._me in self._world.tampers:
            data = self._world.tampers[self._me](data)
        if self._world.is_severed(self._me, self.peer):
            return  # a black hole swallows it
        await self._other._inbox.put(data)
        self.bytes_sent += len(data)

    async def receive(self, limit: int) -> bytes:
        if self._closed:
            raise NetworkError("this stream is closed")
        frame = await self._inbox.get()
        if frame == self._END:
            self._inbox.put_nowait(self._END)
            raise NetworkError(f"{self.peer} hung up")
        if len(frame) > limit:
            raise NetworkError(f"{self.peer} sent {len(frame)} bytes where {limit} are allowed")
        self.bytes_received += len(frame)
        return frame

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._other._inbox.put_nowait(self._END)


class MemoryNetwork:
    """One peer's end of a `World`."""

    def __init__(self, world: World, identity: Identity, dialable: bool) -> None:
        self.me = identity.peer_id
        self.handlers: dict[str, Handler] = {}
        self.streams: set[_MemoryStream] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._world, self._dialable = world, dialable

    def now(self) -> float:
        return self._world.clock()

    async def open(self, peer: PeerId, protocol: str) -> Stream:
        if self._world.is_severed(self.me, peer):
            await asyncio.Future()  # never answers; the caller's deadline ends it
        other = self._world.peers.get(peer)
        handler = other.handlers.get(protocol) if other is not None else None
        if other is None or handler is None or not other._dialable:
            raise NetworkError(f"{peer} cannot be reached")
        ours, theirs = _MemoryStream.pair(self._world, self.me, peer)
        self.streams.add(ours)
        other.streams.add(theirs)
        task = asyncio.ensure_future(other._run(handler, theirs))
        other.tasks.add(task)
        task.add_done_callback(other.tasks.discard)
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
        if self._world.is_severed(self.me) or not is_acceptable(key, subkey, value, expires):
            return False
        self._world.records.setdefault(key, {})[subkey] = (value, expires)
        return True

    async def get(self, key: str) -> dict[str, bytes]:
        if self._world.is_severed(self.me):
            return {}
        now = self.now()
        records = self._world.records.get(key, {})
        return {subkey: value for subkey, (value, expires) in records.items() if expires > now}

    async def addresses(self) -> list[str]:
        return [f"/memory/{self.me}"]

    async def is_alive(self) -> bool:
        return True

    async def is_connected(self) -> bool:
        return not self._world.is_severed(self.me)

    async def reconnect(self) -> bool:
        return await self.is_connected()

    async def restart(self) -> None:
        pass

    async def close(self) -> None:
        if self.me in self._world.peers:
            self._world.kill(self.me)
