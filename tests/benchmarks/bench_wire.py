"""How near a round comes to what the wire allows: four hosts in network namespaces, each with a
line of its own, shaped and delayed.

`just bench-wire`. A round has to send and to receive 2 (N - 1) / N of the payload on every line;
the bar is 1.15 times that, and four round trips.
"""

import argparse
import ctypes
import functools
import itertools
import os
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from p2pllm.swarm.codec import encoded_size
from tests.benchmarks import report
from tests.benchmarks.bench_round import RESULTS
from tests.benchmarks.ours import Ours
from tests.benchmarks.team import Team
from tests.faults.lab import Lab, usable

HOSTS = ("ann", "bob", "cat", "dan")
ROUND_TRIP = 0.1  # seconds
VALUES = 2_500_000  # 10 MB of float32
_TCP = ("cubic", "bbr")
_EPOCH = 3.0  # seconds of a local epoch, in which the group gathers
_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET


class OnHost(Ours):
    """A peer on a host of the lab."""

    def __init__(self, compression: Any, namespaces: list[str], addresses: list[str]) -> None:
        super().__init__(compression)
        self._namespaces, self._addresses = namespaces, addresses
        self.epoch = _EPOCH

    def start(self, meeting: str) -> str:
        handle = os.open(f"/run/netns/{self._namespaces[self.rank]}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(handle, _NETWORK_NAMESPACE):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)
        self.listens = f"/ip4/{self._addresses[self.rank]}/tcp/0"
        return super().start(meeting)


@dataclass
class Line:
    """Rounds over lines of one kind. Seconds, of the slowest peer, round by round."""

    mbit: float
    compression: Any
    tcp: str
    whole: list[float] = field(default_factory=list)
    forming: list[float] = field(default_factory=list)
    reducing: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def wire(self) -> float:
        """Seconds that the payload needs at least."""
        share = 2 * (len(HOSTS) - 1) / len(HOSTS)
        return share * encoded_size(VALUES, self.compression) * 8 / (self.mbit * 1e6)

    @property
    def bar(self) -> float:
        return 1.15 * self.wire + 4 * ROUND_TRIP

    def row(self) -> str:
        if not self.whole:
            why = "; ".join(self.problems)
            return f"| {self.mbit:.0f} | {self.tcp} | {self.compression} | {why} |"
        whole = statistics.median(self.whole)
        cells = [
            f"{self.mbit:.0f}",
            self.tcp,
            self.compression,
            f"{self.wire:.2f}",
            f"{whole:.2f} ({min(self.whole):.2f} to {max(self.whole):.2f})",
            f"{statistics.median(self.forming):.2f}",
            f"{statistics.median(self.reducing):.2f}",
            f"{self.wire / whole:.0%}",
            f"{self.bar:.2f}",
            "met" if whole <= self.bar else "**not met**",
        ]
        if self.problems:
            cells[-1] += f"; missed: {'; '.join(self.problems)}"
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| Mbit/s | TCP | codec | wire | whole round | forming | all-reduce | of the wire | bar | |\n"
    "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
)


def measure(line: Line, rounds: int) -> None:
    """Rounds over such lines; the first is a rehearsal."""
    with Lab(" ".join(HOSTS), tcp=line.tcp) as lab:
        for host in HOSTS:
            lab.slow(host, line.mbit)
            lab.delay(host, ROUND_TRIP / 4 * 1000)
        where = [lab.namespace(h) for h in HOSTS], [lab.ip(h) for h in HOSTS]
        make = functools.partial(OnHost, line.compression, *where)
        with Team(f"wire-{line.compression}", len(HOSTS), VALUES, make) as team:
            for number in range(rounds + 1):
                team.call("prepare", number)
                time.sleep(_EPOCH)
                began = time.monotonic()
                outcomes = team.call("round", number)
                if problems := {o.problem for o in outcomes if o.problem}:
                    line.problems += problems
                elif number > 0:
                    line.whole.append(max(o.ended for o in outcomes) - began)
                    line.forming.append(max(o.forming for o in outcomes))
                    line.reducing.append(max(o.reducing for o in outcomes))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-wire", description=__doc__)
    parser.add_argument("--mbit", type=float, nargs="+", default=[100, 20])
    parser.add_argument("--codecs", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--tcp", nargs="+", help="kinds of hosts; all that this kernel knows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="folder of wire.md and wire.json")
    chosen = parser.parse_args()
    if missing := usable("tc", "iptables"):
        sys.exit(f"no lab here: {missing}")
    known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    kinds = chosen.tcp or [tcp for tcp in _TCP if tcp in known]
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_wire", *sys.argv[1:]])
    about = report.about(command)
    lines = []
    print(HEAD, flush=True)
    for kind in itertools.product(chosen.mbit, chosen.codecs, kinds):
        lines.append(Line(*kind))
        measure(lines[-1], chosen.rounds)
        print(lines[-1].row(), flush=True)
    folder = chosen.output or (RESULTS if len(sys.argv) == 1 else None)
    if folder is not None:
        facts = {"about": about, "lines": [asdict(line) for line in lines]}
        report.save(folder, "wire", _page(about, lines), facts)


def _page(about: dict[str, Any], lines: list[Line]) -> str:
    rows = "\n".join(line.row() for line in lines)
    return (
        f"# A round and the wire\n\n{report.setting(about, 'Network namespaces')}\n\n"
        "Seconds of the slowest of four peers, "
        f"10 MB of float32, {ROUND_TRIP * 1000:.0f} ms round trip, median (least to most). *Whole*"
        " runs from the end of the local epochs until the last peer has the average. The bar is"
        " 1.15 · wire + 4 · round trip. *TCP* is the hosts' congestion control; Linux, macOS and"
        " Windows come with cubic."
        f"\n\n{HEAD}\n{rows}\n"
    )


if __name__ == "__main__":
    main()
