"""What a peer's process leaves on the machine: its libp2p daemon, its folder of sockets.

Found by the process id, so that other peers on the same machine are nobody's business here.
"""

import tempfile
from pathlib import Path

import psutil


def daemons_of(pid: int) -> list[int]:
    """Process ids of the live daemons that were started by the peer with this process id."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(_mark(pid) in w for w in words):
            found.append(process.info["pid"])
    return found


def socket_folders_of(pid: int) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{_mark(pid)}*"))


def _mark(pid: int) -> str:
    return f"p2pllm-{pid}-"
