"""Peers as real processes on loopback: start them, end them, and see that nothing is left of them.

Every wait has a deadline. Only processes that were started here are ever signalled.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.swarm.peer import LOADED, Peer, wait_until
from tests.swarm.traces import daemons_of, socket_folders_of

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Ours without settings of p2pllm that are not the test's, and without any model hub."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("P2PLLM_")}
    mine["P2PLLM_CACHE"] = os.environ["P2PLLM_CACHE"]
    return mine | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class Processes:
    """The peers of one test, or of several tests that look at the same ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers: list[Peer] = []  # every life, in the order of their starts

    # ---- starting

    def bootstrap(self, *extra: str, name: str = "door", port: int = 0) -> Peer:
        """Found configs/tiny.yaml, changed by KEY=VALUE; other words are options of the command.
        Returns when the door is open."""
        options = [o for w in extra for o in ((w,) if w.startswith("-") else ("--set", w))]
        host = ("--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}")
        peer = self.start(name, ["bootstrap", str(TINY), *host, *options])
        peer.wait_for("opened", LOADED)
        return peer

    def trainer(self, name: str, address: str, *extra: str, cwd: Path | None = None) -> Peer:
        return self.start(name, ["join", *_way_in(address), "--threads", "1", *extra], cwd)

    def trainers(self, names: str, address: str) -> list[Peer]:
        return [self.trainer(name, address) for name in names.split()]

    def aggregator(self, address: str, *extra: str, name: str = "judge") -> Peer:
        return self.start(name, ["aggregate", *_way_in(address), "--threads", "1", *extra])

    def again(self, peer: Peer) -> Peer:
        """Another life of a peer: the same command, identity and folder."""
        assert peer.process.poll() is not None
        return self._spawn(peer.name, peer.command, peer.output, peer.cwd)

    def start(self, name: str, command: Sequence[str], cwd: Path | None = None) -> Peer:
        output = self.folder / name
        command = [*command, "--name", name, "--output", str(output)]
        return self._spawn(name, command, output, cwd or self.folder)

    def _spawn(self, name: str, command: list[str], output: Path, cwd: Path) -> Peer:
        log = self.folder / f"{len(self.peers):02}-{name}.log"
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "p2pllm", *command],
                cwd=cwd,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl+C at the test run is not meant for them
            )
        peer = Peer(name, command, output, log, cwd, process)
        self.peers.append(peer)
        return peer

    # ---- ending

    def close(self) -> None:
        """Ctrl+C for everybody who is still there; then nobody and nothing may be left."""
        alive = [p for p in self.peers if p.process.poll() is None]
        for peer in alive:
            peer.interrupt()
        deadline = time.monotonic() + 15
        stubborn = [p.name for p in alive if not _ends_until(deadline, p)]
        for peer in alive:
            if peer.process.poll() is None:
                peer.kill()
        left = self._traces()
        for peer in self.peers:
            for folder in socket_folders_of(peer.process.pid):
                shutil.rmtree(folder, ignore_errors=True)
        assert not stubborn, f"15 s after Ctrl+C still there: {stubborn}"
        assert not left, left

    def _traces(self) -> list[str]:
        """Daemons and socket folders of peers that have ended.

        A peer killed with -9 cannot remove its folder. The next one that starts does it for it, so
        such a folder counts only when there was a next one.
        """
        pids = [p.process.pid for p in self.peers]
        try:
            wait_until(lambda: not any(map(daemons_of, pids)), "daemons have ended", 5)
        except AssertionError:
            return [f"daemons of {p.name}" for p in self.peers if daemons_of(p.process.pid)]
        latest = max((p.born for p in self.peers if list(p.output.glob("*/*"))), default=0.0)
        return [
            f"{p.name} left {folder}"
            for p in self.peers
            for folder in socket_folders_of(p.process.pid)
            if p.killed is None or p.killed < latest
        ]

    def report(self) -> Iterator[tuple[str, str]]:
        """For a test that failed: each peer, with the end of what it printed and of its events."""
        for peer in self.peers:
            code = peer.process.poll()
            state = "runs" if code is None else f"ended with code {code}"
            told = [row for row in peer.rows if row["event"] not in ("step_done", "working")]
            events = "\n".join(map(str, told[-15:]))
            yield f"{peer.name} ({state})", f"{peer.printed[-3000:]}\n--- events\n{events}"


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """A command that ends by itself: its exit code, what it printed, and its letter."""
    ended = subprocess.run(
        [sys.executable, "-m", "p2pllm", *command],
        cwd=cwd,
        env=environment() | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LOADED,
        process_group=0,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def _way_in(address: str) -> list[str]:
    given = ["--initial-peers", address] if address else []
    return [*given, "--host-maddrs", LOOPBACK]


def _ends_until(deadline: float, peer: Peer) -> bool:
    try:
        peer.process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return False
    return True
