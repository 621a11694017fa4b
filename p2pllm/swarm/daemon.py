"""hivemind's libp2p daemon (p2pd) as a child that lives and dies with this process, and streams
through it.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

from p2pllm.swarm.network import HUNG_UP, NetworkError, PeerId

FAILURES = (OSError, EOFError, P2PDaemonError, P2PHandlerError, asyncio.IncompleteReadError)
_FIRST_WORD = 1.0  # seconds, a few round trips, in which a connection comes up
_HEADER = 4  # bytes of a frame's length
_AHEAD = 1 << 18  # bytes read before they are asked for; asyncio's 64 KiB is half a frame
_BEHIND = 1 << 20  # bytes on their way to the daemon: a few frames

# Run in the daemon's place just before it: p2pd would outlive a killed parent, and a Ctrl+C meant
# for us would take it away before we have said good-bye to the swarm.
_TETHER = (
    "import ctypes, os, signal, sys\n"
    "os.setsid()\n"
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


class Daemon(P2P):  # type: ignore[misc]
    """p2pd, tied to this process's life, with its sockets in a folder that we remove."""

    folder: Path
    _met: set[PeerId]  # others to whom there has been a connection

    @classmethod
    def in_folder(cls, folder: Path) -> type["Daemon"]:
        own = {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/", "folder": folder, "_met": set()}
        return type("Daemon", (cls,), own)

    async def connected(self) -> set[PeerId]:
        """To whom there is a connection; raises one of FAILURES."""
        found = {str(peer.peer_id) for peer in await self.list_peers()}
        self._met |= found
        return found

    async def let_dial(self, peer: PeerId) -> None:
        """Of two that would dial each other at the same time one waits a moment for the other:
        libp2p dials from the port that it listens on, so over a long line their two calls become
        one TCP connection, in which both take the first word, fail, and are barred for seconds."""
        if peer in self._met or peer > str(self.peer_id):
            return
        until = time.monotonic() + _FIRST_WORD
        while peer not in await self.connected() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def call_protobuf_handler(self, peer_id: PeerID, *args: Any, **kwargs: Any) -> Any:
        """hivemind's DHT calls its peers with it."""
        await self.let_dial(str(peer_id))
        return await super().call_protobuf_handler(peer_id, *args, **kwargs)

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        if "trustedRelays" in kwargs:  # use them at once; a search for others takes minutes
            kwargs["relayDiscovery"] = False
        command = P2P._make_process_args(*args, **kwargs)
        return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *command]


def has_crossed(problem: Exception) -> bool:
    """Whether a dial failed, now or some seconds ago, as `Daemon.let_dial` tells."""
    return any(w in str(problem) for w in ("failed to negotiate security protocol", "dial backoff"))


class DaemonStream:
    """Length-prefixed frames on one libp2p stream."""

    def __init__(
        self, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.peer = peer
        self.bytes_sent = self.bytes_received = 0
        self._reader, self._writer = reader, writer
        self._announced: int | None = None  # bytes of the frame that comes next
        reader._limit = _AHEAD  # type: ignore[attr-defined]  # hivemind opens it without asking us
        with contextlib.suppress(OSError):  # a system that allows less keeps what it has
            link = writer.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BEHIND)

    async def send(self, frame: bytes | memoryview) -> None:
        try:
            # At once: the daemon would make a packet of its own of the header.
            self._writer.writelines((len(frame).to_bytes(_HEADER, "big"), frame))
            await self._writer.drain()
        except FAILURES as problem:
            raise NetworkError(f"{self.peer} {HUNG_UP}") from problem
        self.bytes_sent += _HEADER + len(frame)

    async def receive(self, limit: int) -> bytes:
        try:
            # Whoever is cancelled between header and content leaves a frame that can still be read.
            if self._announced is None:
                self._announced = int.from_bytes(await self._reader.readexactly(_HEADER), "big")
            if (size := self._announced) > limit:
                raise NetworkError(f"{self.peer} sent {size} bytes where {limit} are allowed")
            frame = await self._reader.readexactly(size)
        except FAILURES as problem:
            raise NetworkError(f"{self.peer} {HUNG_UP}") from problem
        self._announced = None
        self.bytes_received += _HEADER + size
        return frame

    def close(self) -> None:
        with contextlib.suppress(*FAILURES, RuntimeError):
            self._writer.close()


def make_folder() -> Path:
    """A private folder for the daemon's sockets. Those of killed processes are removed on the way:
    their owners could not."""
    temporary = Path(tempfile.gettempdir())
    for folder in temporary.glob("p2pllm-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"p2pllm-{os.getpid()}-", dir=temporary))
