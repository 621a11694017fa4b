"""The seam to the network: streams of frames between peers, and a shared table of expiring records.

Everything above it (rounds, groups, the all-reduce, catching up) is the same code over hivemind's
libp2p daemon (`hivemind_network.py`) and over its in-process twin (`memory_network.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack

PeerId = str  # base58 libp2p peer id; for our Ed25519 identities it contains the public key


class NetworkError(Exception):
    """A remote peer did not do its part: unreachable, gone, too slow or speaking something else.

    Internal to `swarm`: every caller turns it into a value (`Missed`) or a letter.
    """


HUNG_UP = "hung up"  # the last words of what is raised when a stream breaks


@dataclass(frozen=True)
class Timeouts:
    """Longest waits for anything remote, in seconds."""

    dial: float = 8.0  # open a stream, connection set-up and hole punching included
    silence: float = 10.0  # nothing has come on a stream that should be busy
    record: float = 6.0  # one read or write of the record table
    heartbeat: float = 1.0  # how often a waiting leader says that it is still there
    look: float = 0.5  # between two looks at the records while a group gathers
    announce: float = 5.0  # how often a peer renews its record
    record_life: float = 20.0  # how long a record lives when it is not renewed
    start: float = 30.0  # until our own daemon answers


class Stream(Protocol):
    """One bidirectional stream of frames to one authenticated peer."""

    @property
    def peer(self) -> PeerId: ...

    async def send(self, frame: bytes | memoryview) -> None:
        """Raises NetworkError when the peer is gone."""

    async def receive(self, limit: int) -> bytes:
        """The next frame. Raises NetworkError at the end of the stream, and before anything is
        allocated when the frame is longer than `limit` bytes."""

    def close(self) -> None: ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...


Handler = Callable[[Stream], Awaitable[None]]


class Streams(Protocol):
    """The half of a network by which two peers talk directly."""

    @property
    def me(self) -> PeerId: ...

    async def open(self, peer: PeerId, protocol: str) -> Stream:
        """Raises NetworkError when the peer cannot be reached or does not speak `protocol`."""

    async def serve(self, protocol: str, handler: Handler) -> None: ...


class Network(Streams, Protocol):
    """What the protocol needs of a network; its coroutines run in one event loop."""

    def now(self) -> float:
        """Seconds since the epoch, as the records count them."""

    async def put(self, key: str, subkey: str, value: bytes, expires: float) -> bool: ...

    async def get(self, key: str) -> dict[str, bytes]: ...

    async def addresses(self) -> list[str]:
        """Multiaddrs under which others can dial this peer, each with its /p2p/ part."""

    async def is_alive(self) -> bool:
        """Whether our own daemon answers."""

    async def is_connected(self) -> bool:
        """Whether we know any other peer."""

    async def connect(self, peers: Mapping[PeerId, Sequence[str]]) -> None:
        """Be connected to those whom we can reach, by their addresses or otherwise, before a
        stream to them is needed."""

    def note(self, addresses: Iterable[str]) -> None:
        """Remember these multiaddrs of live peers, for `reconnect` and for the next start."""

    async def reconnect(self) -> bool:
        """Find the swarm again from the peers known so far."""

    async def restart(self) -> None:
        """Replace a daemon that died; identity, handlers and addresses stay."""

    async def close(self) -> None: ...


_AGAIN = 0.3  # seconds
MESSAGE_LIMIT = 1 << 20  # bytes of one msgpack message; bulk data has its own, exact limits


def loop_time() -> float:
    """Seconds by the running event loop's clock; a simulation's loop has a clock of its own."""
    return asyncio.get_running_loop().time()


def in_background(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Run it as one of `tasks`: one without a strong reference may be collected while it runs."""
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def send_message(stream: Stream, **fields: Any) -> None:
    await stream.send(msgpack.packb(fields))


async def receive_message(stream: Stream, timeout: float) -> dict[str, Any]:
    """One msgpack map. Raises NetworkError when it does not come in time or is not one."""
    frame = await receive(stream, MESSAGE_LIMIT, timeout)
    try:
        message = msgpack.unpackb(frame)
    except (ValueError, msgpack.UnpackException) as problem:
        raise NetworkError(f"{stream.peer} sent something that is not a message") from problem
    if not isinstance(message, dict):
        raise NetworkError(f"{stream.peer} sent something that is not a message")
    return message


async def receive(stream: Stream, limit: int, timeout: float) -> bytes:
    """`Stream.receive` with a deadline in seconds."""
    try:
        async with asyncio.timeout(timeout):
            return await stream.receive(limit)
    except TimeoutError:
        raise NetworkError(f"{stream.peer} was silent for {timeout:.0f} s") from None


async def send(stream: Stream, frame: bytes | memoryview, timeout: float) -> None:
    """`Stream.send` with a deadline in seconds: a peer that stops reading must not hold us up."""
    try:
        async with asyncio.timeout(timeout):
            await stream.send(frame)
    except TimeoutError:
        raise NetworkError(f"{stream.peer} read nothing for {timeout:.0f} s") from None


class DialledTooSoon(NetworkError):
    """Both have called each other at once, or did a moment ago: libp2p leaves a peer alone for some
    seconds after a dial that failed. It may well be there."""


async def dial(
    network: Streams, peer: PeerId, protocol: str, timeout: float, *, patient: bool = False
) -> Stream:
    """`Network.open` with a deadline in seconds. patient: go on trying after DialledTooSoon."""
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    return await network.open(peer, protocol)
                except DialledTooSoon:
                    if not patient:
                        raise
                await asyncio.sleep(_AGAIN)
    except TimeoutError:
        raise NetworkError(f"{peer} did not answer within {timeout:.0f} s") from None


class Scoped(Streams):
    """A network whose stream protocols belong to one run, so that runs never mix."""

    def __init__(self, network: Streams, run_id: str) -> None:
        self._network, self._suffix = network, f"/{run_id}"

    @property
    def me(self) -> PeerId:
        return self._network.me

    async def open(self, peer: PeerId, protocol: str) -> Stream:
        return await self._network.open(peer, protocol + self._suffix)

    async def serve(self, protocol: str, handler: Handler) -> None:
        await self._network.serve(protocol + self._suffix, handler)
