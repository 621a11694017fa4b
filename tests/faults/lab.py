"""A small internet of network namespaces on one Linux machine: hosts that can be slowed, delayed,
made lossy, cut off and parted, and gateways that let nothing in.

    with Lab("ann bob cat") as lab:
        lab.slow("ann", mbit=5)
        lab.cut("bob"); ...; lab.heal()

Each host is a namespace of its own with one link to a router, the core: there is no broadcast, and
hosts find each other by address, as on the internet. Nothing is connected to the machine's own
network. All of it is gone when the lab is closed, or when the process that made it ends in any way.

It needs root and the command `ip`; rates need `tc`, and delay, loss and gateways need `iptables`.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

_NET = "10.77.0"
_CORE = "core"
_KEEPER = Path(__file__).with_name("keeper.py")
_BUFFER = 0.1  # seconds that a shaped link buffers before it drops


class Lab:
    """Make it with the names of its hosts; a context manager."""

    def __init__(self, hosts: str, net: str = _NET, tcp: str = "cubic") -> None:
        """net: the first three octets of all addresses. libp2p does no relaying and no hole
        punching among private ones; a net like "11.77.0" exists in the lab only. tcp: the hosts'
        congestion control; Linux's own choice, whatever this machine is set to."""
        self._prefix, self._net = f"lab{os.getpid()}", net
        self._congestion = tcp
        self._hosts: dict[str, str] = {}
        self._outside: list[str] = []  # those that have a link to the core
        self._rules: list[list[str]] = []  # routing rules by which packets vanish
        self._delays = False
        self._keeper: subprocess.Popen[bytes] | None = None
        self._wanted = hosts.split()

    def __enter__(self) -> "Lab":
        # It holds the other end of a pipe, so it notices our end, whatever that may be.
        self._keeper = subprocess.Popen(
            [sys.executable, str(_KEEPER), self._prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        try:
            _run("ip", "netns", "add", self.namespace(_CORE))
            self._inside(_CORE, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            for host in self._wanted:
                self.add(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            self._keeper.wait(30)
            self._keeper = None

    # ---- hosts

    def namespace(self, host: str) -> str:
        """For setns(2), below /run/netns."""
        return f"{self._prefix}-{host}"

    def ip(self, host: str) -> str:
        return self._hosts[host]

    def add(self, host: str, behind: str = _CORE) -> None:
        """behind: the gateway that hides it."""
        net = self._net if behind == _CORE else "192.168.7"
        address, gate = f"{net}.{10 + len(self._hosts)}", f"{net}.1"
        space, upper = self.namespace(host), self.namespace(behind)
        port = f"to-{host}"
        _run("ip", "netns", "add", space)
        _run("ip", "-n", upper, "link", "add", port, "type", "veth", "peer", "eth0", "netns", space)
        _run("ip", "-n", upper, "addr", "add", f"{gate}/32", "dev", port)
        _run("ip", "-n", upper, "link", "set", port, "up")
        _run("ip", "-n", upper, "route", "add", f"{address}/32", "dev", port)
        for words in (
            "link set lo up",
            f"addr add {address}/32 dev eth0",
            "link set eth0 up",
            f"route add {gate}/32 dev eth0",
            f"route add default via {gate} congctl {self._congestion}",
        ):
            _run("ip", "-n", space, *words.split())
        self._hosts[host] = address
        if behind == _CORE:
            self._outside.append(host)

    def add_gateway(self, name: str) -> None:
        """A home router: hosts behind it reach everybody, and nobody reaches them."""
        self.add(name)
        self._inside(name, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self._iptables(name, "-t nat -A POSTROUTING -o eth0 -j MASQUERADE")
        self._iptables(name, "-A FORWARD -i eth0 -m conntrack --ctstate NEW,INVALID -j DROP")

    # ---- links

    def slow(self, host: str, mbit: float) -> None:
        """Limit its link, in both directions."""
        burst, limit = max(mbit * 500, 6000), max(mbit * 125_000 * _BUFFER, 60_000)
        for space, port in ((host, "eth0"), (_CORE, f"to-{host}")):
            how = f"tbf rate {int(mbit * 1e6)}bit burst {int(burst)} limit {int(limit + burst)}"
            there = ("-n", self.namespace(space), "qdisc", "replace", "dev", port, "root")
            _run("tc", *there, *how.split())

    def lose(self, percent: float) -> None:
        """Lose packets of everybody, at random."""
        for host in self._outside:  # one by one, not in batches of 64 KiB
            for space, port in ((host, "eth0"), (_CORE, f"to-{host}")):
                _run("ip", "-n", self.namespace(space), "link", "set", port, "gso_max_segs", "1")
        chance = f"--mode random --probability {percent / 100:.6f}"
        self._iptables(_CORE, f"-t mangle -A FORWARD -m statistic {chance} -j DROP")

    def delay(self, host: str, milliseconds: float) -> None:
        """One way, between this host and the core, in both directions."""
        units = round(milliseconds * 10)
        # A packet's mark has two halves: the way of its sender to the core, and on to its receiver.
        for way, mark in (("-i", f"{units}/0xffff"), ("-o", f"{units << 16}/0xffff0000")):
            rule = f"-t mangle -A FORWARD {way} to-{host} -j MARK --set-xmark {mark}"
            self._iptables(_CORE, rule)
        if not self._delays:
            assert self._keeper is not None
            assert self._keeper.stdin is not None
            assert self._keeper.stdout is not None
            self._keeper.stdin.write(b"delay\n")
            self._keeper.stdin.flush()
            self._keeper.stdout.readline()
            marked = "-m mark ! --mark 0 -j NFQUEUE --queue-num 0"
            self._iptables(_CORE, f"-t mangle -A POSTROUTING {marked}")
        self._delays = True

    def cut(self, host: str) -> None:
        """All its packets vanish without a word, as when a line dies."""
        self._drop("iif", f"to-{host}")
        self._drop("to", self._hosts[host])

    def part(self, some: str, others: str) -> None:
        """Two groups do not reach each other."""
        for one in some.split():
            for other in others.split():
                self._drop("iif", f"to-{one}", "to", self._hosts[other])
                self._drop("iif", f"to-{other}", "to", self._hosts[one])

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        while self._rules:
            _run("ip", "-n", self.namespace(_CORE), "rule", "del", *self._rules.pop())

    # ---- its parts

    def _drop(self, *which: str) -> None:
        _run("ip", "-n", self.namespace(_CORE), "rule", "add", *which, "blackhole")
        self._rules.append([*which, "blackhole"])

    def _inside(self, host: str, *command: str) -> None:
        _run("ip", "netns", "exec", self.namespace(host), *command)

    def _iptables(self, host: str, rule: str) -> None:
        self._inside(host, "iptables", "-w", *rule.split())


@functools.cache
def usable(*commands: str) -> str:
    """Why there can be no lab here; empty when there can. commands: what it needs besides `ip`."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [c for c in ("ip", *commands) if shutil.which(c) is None]:
        return f"not installed: {', '.join(missing)}"
    try:
        with Lab("here", net="10.78.0") as lab:
            lab.cut("here")
            if "tc" in commands:
                lab.slow("here", 1)
            if "iptables" in commands:
                lab.lose(1)
    except (OSError, RuntimeError) as problem:
        return f"no network namespaces here: {problem}"
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
