"""The network over hivemind: its libp2p daemon for streams, its DHT for records.

The DHT node runs in our own event loop rather than in hivemind's forked process, so that there is
one child process to watch (the daemon, p2pd), no shared memory, and every wait is ours to bound.
"""

import asyncio
import contextlib
import logging
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from p2pllm.config.peer import NetworkConfig
from p2pllm.errors import AddressInUse, NetworkDown, NoPeersReached
from p2pllm.swarm.address_book import AddressBook
from p2pllm.swarm.addresses import check_addresses, check_ports
from p2pllm.swarm.daemon import FAILURES, Daemon, DaemonStream, has_crossed, make_folder
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.network import DialledTooSoon, Handler, NetworkError, PeerId, Stream, Timeouts
from p2pllm.swarm.records import is_acceptable

logger = logging.getLogger(__name__)
_TRIED = 8  # remembered addresses with which a peer starts when the initial ones are gone


class _SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Lets a DHT node store and hand on only what `records.is_acceptable` accepts."""

    def validate(self, record: DHTRecord) -> bool:
        try:
            subkey = MSGPackSerializer.loads(record.subkey)
            key, data = msgpack.unpackb(MSGPackSerializer.loads(record.value))
            if DHTID.generate(source=key).to_bytes() != record.key:
                return False
            return is_acceptable(key, subkey, data, record.expiration_time)
        except Exception:  # hostile bytes fail in every way there is, inside the parsers
            logger.debug("refused a malformed record", exc_info=True)
            return False

    def merge_with(self, other: RecordValidatorBase) -> bool:
        return isinstance(other, _SignedRecords)


class HivemindNetwork:
    """One peer's daemon and DHT node. Make it with `start`; all methods run in its event loop."""

    def __init__(self, identity: Identity, config: NetworkConfig, timeouts: Timeouts) -> None:
        self._identity, self._config, self._timeouts = identity, config, timeouts
        self._handlers: dict[str, Handler] = {}
        path = identity.path
        self._seen = AddressBook(path.with_suffix(".peers.json") if path is not None else None)
        self._daemon: Daemon
        self._node: DHTNode
        self._folder = make_folder()
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def me(self) -> PeerId:
        return self._identity.peer_id

    def now(self) -> float:
        return float(get_dht_time())

    @classmethod
    async def start(
        cls, identity: Identity, config: NetworkConfig, timeouts: Timeouts
    ) -> "HivemindNetwork":
        """Start the daemon and reach the swarm.

        Raises AddressInvalid, AddressInUse, NoPeersReached and NetworkDown.
        """
        check_addresses(config)
        self = cls(identity, config, timeouts)
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def _start(self) -> None:
        """With the initial peers; when none of them answers, with those last seen."""
        try:
            await self._start_with(list(self._config.initial_peers))
        except NoPeersReached:
            if not (others := self._seen.newest()[:_TRIED]):
                raise
            await self._stop()
            with contextlib.suppress(NoPeersReached):
                await self._start_with(others)
                return
            raise  # the letter names the initial peers

    async def _start_with(self, peers: list[str]) -> None:
        check_ports(self._config)
        try:
            async with asyncio.timeout(self._timeouts.start):
                self._daemon = await Daemon.in_folder(self._folder).create(
                    initial_peers=peers or None,
                    host_maddrs=None
                    if self._config.client_only
                    else list(self._config.host_maddrs),
                    announce_maddrs=list(self._config.announce_maddrs) or None,
                    no_listen=self._config.client_only,
                    identity_path=str(self._identity.path) if self._identity.path else None,
                    check_if_identity_free=False,
                    dht_mode="client" if self._config.client_only else "server",
                    use_relay=self._config.relay,
                    use_auto_relay=self._config.relay and bool(peers),
                    trusted_relays=peers if self._config.relay and peers else None,
                    nat_port_map=False,
                    idle_timeout=0,
                )
                self._node = await DHTNode.create(
                    p2p=self._daemon,
                    initial_peers=peers or None,
                    client_mode=self._config.client_only,
                    record_validator=_SignedRecords(),
                    wait_timeout=self._timeouts.record / 2,
                    cache_locally=False,
                    cache_on_store=False,
                    cache_nearest=0,
                    ensure_bootstrap_success=False,
                )
        except (TimeoutError, P2PDaemonError, OSError) as problem:
            raise self._start_failure(problem, peers) from problem
        if not self._config.client_only:
            for protocol, handler in self._handlers.items():
                await self._add(protocol, handler)
        if peers and not await self.is_connected():
            raise NoPeersReached(peers="\n".join(peers))

    def _start_failure(self, problem: Exception, peers: list[str]) -> Exception:
        text = str(problem)
        if "address already in use" in text or "failed to listen" in text:
            return AddressInUse(addresses=", ".join(self._config.host_maddrs))
        if peers and "Daemon failed" in text:
            return NoPeersReached(peers="\n".join(peers))
        return NetworkDown(reason=text or type(problem).__name__)

    # ---- streams

    async def open(self, peer: PeerId, protocol: str) -> Stream:
        try:
            await self._daemon.let_dial(peer)
            _, reader, writer = await self._daemon.call_binary_stream_handler(
                PeerID.from_base58(peer), protocol
            )
        except (*FAILURES, ValueError) as problem:
            kind = DialledTooSoon if has_crossed(problem) else NetworkError
            raise kind(f"{peer} cannot be reached: {problem}") from problem
        return DaemonStream(peer, reader, writer)

    async def _connected(self) -> set[PeerId]:
        with contextlib.suppress(TimeoutError, *FAILURES):
            async with asyncio.timeout(self._timeouts.record):
                return await self._daemon.connected()
        return set()

    async def connect(self, peers: Mapping[PeerId, Sequence[str]]) -> None:
        connected = await self._connected()
        wanted = {peer: addresses for peer, addresses in peers.items() if peer not in connected}

        async def call(peer: PeerId, addresses: Sequence[str]) -> None:
            with contextlib.suppress(*FAILURES, TimeoutError, ValueError):
                async with asyncio.timeout(self._timeouts.dial):
                    await self._daemon.let_dial(peer)
                    maddrs = [Multiaddr(a).decapsulate(f"/p2p/{peer}") for a in addresses]
                    await self._daemon._client.connect(PeerID.from_base58(peer), maddrs)

        await asyncio.gather(*(call(*entry) for entry in wanted.items()))

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler
        if not self._config.client_only:
            await self._add(protocol, handler)

    async def _add(self, protocol: str, handler: Handler) -> None:
        async def on_stream(
            info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            stream = DaemonStream(info.peer_id.to_base58(), reader, writer)
            try:
                await handler(stream)
            except NetworkError as problem:
                logger.debug("%s: %s", protocol, problem)
            finally:
                stream.close()

        await self._daemon.add_binary_stream_handler(protocol, on_stream)

    # ---- records

    async def put(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        try:
            async with asyncio.timeout(self._timeouts.record):
                return bool(
                    await self._node.store(key, msgpack.packb([key, value]), expires, subkey=subkey)
                )
        except (TimeoutError, *FAILURES) as problem:
            logger.debug("storing %s failed: %s", key, problem)
            return False

    async def get(self, key: str) -> dict[str, bytes]:
        try:
            async with asyncio.timeout(self._timeouts.record):
                found = await self._node.get(key, latest=True)
        except (TimeoutError, *FAILURES) as problem:
            logger.debug("reading %s failed: %s", key, problem)
            return {}
        if found is None or not isinstance(found.value, dict):
            return {}
        return {
            subkey: msgpack.unpackb(item.value)[1]
            for subkey, item in found.value.items()
            if item.expiration_time > self.now()
        }

    # ---- staying connected

    async def is_connected(self) -> bool:
        """Whether the DHT knows anybody; remembers who is there for `reconnect`."""
        if not self._node.protocol.routing_table.peer_id_to_uid:
            return False
        initial = {Multiaddr(a)["p2p"]: a for a in self._config.initial_peers}
        self.note(initial[peer] for peer in await self._connected() if peer in initial)
        return True

    async def is_alive(self) -> bool:
        """Whether our own daemon answers. One that is stopped or stuck does not."""
        child = self._daemon._child
        if child is None or child.returncode is not None:
            return False
        with contextlib.suppress(TimeoutError, *FAILURES):
            async with asyncio.timeout(self._timeouts.record):
                await self._daemon.connected()
                return True
        return False

    async def reconnect(self) -> bool:
        """Dial and ping those of the peers seen so far that the DHT has lost. A node that was cut
        off for half a minute never finds it again by itself."""
        table = self._node.protocol.routing_table.peer_id_to_uid
        lost: dict[PeerID, list[Multiaddr]] = {}
        for maddr in map(Multiaddr, {*self._config.initial_peers, *self._seen.newest()}):
            if (peer := PeerID.from_base58(maddr["p2p"])) not in table and str(peer) != self.me:
                lost.setdefault(peer, []).append(maddr.decapsulate(f"/p2p/{peer}"))
        await asyncio.gather(*(self._call(peer, maddrs) for peer, maddrs in lost.items()))
        return await self.is_connected()

    def note(self, addresses: Iterable[str]) -> None:
        """Remember where others are found, for `reconnect` and for another start."""
        self._seen.note(addresses)

    async def _call(self, peer: PeerID, maddrs: list[Multiaddr]) -> None:
        with contextlib.suppress(*FAILURES, TimeoutError):
            async with asyncio.timeout(self._timeouts.dial):
                await self._daemon._client.connect(peer, maddrs)
                await self._node.protocol.call_ping(peer)

    async def restart(self) -> None:
        """Replace a daemon that died. The identity, the handlers and the addresses stay."""
        await self._stop()
        with contextlib.suppress(NoPeersReached):  # `reconnect` goes on trying
            await self._start()

    async def addresses(self) -> list[str]:
        """Addresses under which others can dial this peer, each with its /p2p/ part."""
        try:
            async with asyncio.timeout(self._timeouts.record):
                found = [str(a) for a in await self._daemon.get_visible_maddrs(latest=True)]
        except (TimeoutError, ValueError, *FAILURES):
            return []
        return sorted(set(found), key=lambda a: "/127.0.0.1/" in a)

    async def close(self) -> None:
        await self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._identity.release()

    async def _stop(self) -> None:
        # Each part has its own short limit: neither returns by itself when the daemon is gone.
        for part in ("_node", "_daemon"):
            with contextlib.suppress(AttributeError, TimeoutError, *FAILURES):
                async with asyncio.timeout(2):
                    await getattr(self, part).shutdown()
        with contextlib.suppress(AttributeError, ProcessLookupError):
            if (child := self._daemon._child) is not None:
                child.kill()  # a stopped daemon keeps its port, and does not hear SIGTERM
