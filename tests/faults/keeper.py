"""The lab's second process: it delays packets, and in the end takes everything down.

Its standard input is a pipe from the lab's owner: a line asks for the delays, and its end, however
the owner came to its own, means that the lab is over.
"""

import contextlib
import ctypes
import heapq
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

_NAMESPACES = Path("/run/netns")
_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET
_TICK = 0.0005  # seconds: resolution of delays


class DelayLine:
    """Holds each packet of NFQUEUE 0 for as long as its mark says, in tenths of a millisecond: the
    low half plus the high half. The packets stay in the kernel; only their numbers come here."""

    _PACKET, _VERDICT, _CONFIG = 0x300, 0x301, 0x302  # nfnetlink_queue's messages
    _ATTRIBUTE = struct.Struct("=HH")
    _AT_ONCE = 500  # verdicts in one system call
    _ACCEPT, _BURSTS = 1, 4  # NF_ACCEPT, NFQA_CFG_F_GSO

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
        self._socket.bind((0, 0))
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        self._socket.setsockopt(270, 5, 1)  # NETLINK_NO_ENOBUFS
        self._configure((1, struct.pack(">BBH", 1, 0, 0)))  # bind
        self._configure((2, struct.pack(">IB", 0, 1)))  # metadata only
        self._configure((3, struct.pack(">I", 200_000)))  # length of the queue
        # Bursts in one piece: cut into packets they cost a core at 100 Mbit/s.
        bursts = struct.pack(">I", self._BURSTS)
        self._configure((4, bursts), (5, bursts))  # mask, flags
        self._socket.setblocking(False)
        self._held: list[tuple[float, bytes]] = []
        # A verdict, but for the number of its packet.
        accept = struct.pack("=HH", 12, 2) + struct.pack(">I", self._ACCEPT)
        self._verdict = self._head(self._VERDICT, 1, len(accept) + 4) + accept

    def turn(self) -> None:
        """Take in what has come, and let go what is due."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take(self._socket.recv(4096))
        now = time.monotonic()
        due: list[bytes] = []
        while self._held and self._held[0][0] <= now and len(due) < self._AT_ONCE:
            due.append(self._verdict + heapq.heappop(self._held)[1])
        if due:
            self._socket.send(b"".join(due))

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wait(self) -> float:
        return _TICK if self._held else 1.0

    def _take(self, message: bytes) -> None:
        kind, at = struct.unpack_from("=H", message, 4)[0], 20
        number, mark = b"", 0
        while kind == self._PACKET and at + 4 <= len(message):
            length, attribute = self._ATTRIBUTE.unpack_from(message, at)
            if attribute & 0x3FFF == 1:  # NFQA_PACKET_HDR
                number = message[at + 4 : at + 8]
            elif attribute & 0x3FFF == 3:  # NFQA_MARK
                mark = int.from_bytes(message[at + 4 : at + 8], "big")
                break  # it comes last of the two
            at += max((length + 3) & ~3, 4)
        if number:
            # Both halves of a mark, each one way of a link.
            due = time.monotonic() + ((mark & 0xFFFF) + (mark >> 16)) * 1e-4
            heapq.heappush(self._held, (due, number))

    def _configure(self, *settings: tuple[int, bytes]) -> None:
        body = b"".join(
            self._ATTRIBUTE.pack(4 + len(data), attribute) + data + b"\0" * (-len(data) % 4)
            for attribute, data in settings
        )
        self._socket.send(self._head(self._CONFIG, 5, len(body)) + body)  # request, acknowledge
        if error := struct.unpack_from("=i", self._socket.recv(4096), 16)[0]:
            raise OSError(-error, "NFQUEUE: " + os.strerror(-error))

    @staticmethod
    def _head(kind: int, flags: int, size: int) -> bytes:
        """Of a message with a body of this size."""
        return struct.pack("=IHHII", 20 + size, kind, flags, 0, 0) + struct.pack(">BBH", 0, 0, 0)


def keep(prefix: str) -> None:
    """Until standard input ends."""
    line: DelayLine | None = None
    while True:
        watched: list[int | DelayLine] = [0] if line is None else [0, line]
        ready, _, _ = select.select(watched, [], [], 1.0 if line is None else line.wait)
        if 0 in ready:
            if not os.read(0, 100):
                return
            handle = os.open(_NAMESPACES / f"{prefix}-core", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(handle, _NETWORK_NAMESPACE):
                raise OSError(ctypes.get_errno(), "setns")
            line = DelayLine()
            os.write(1, b"ready\n")
        if line is not None:
            line.turn()


def take_down(prefix: str) -> None:
    """End what runs in the lab's namespaces, and remove them."""
    for space in _NAMESPACES.glob(f"{prefix}-*"):
        found = subprocess.run(
            ["ip", "netns", "pids", space.name], capture_output=True, text=True, check=False
        )
        for pid in map(int, found.stdout.split()):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", space.name], check=False)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl+C at the test run ends its owner first
    try:
        keep(sys.argv[1])
    finally:
        take_down(sys.argv[1])
