"""How long a round takes: p2pllm, stock hivemind and gloo in one run, taking turns round by round.

`just bench-round`, or `python -m tests.benchmarks.bench_round --help`. N processes on loopback
average one vector; a round begins when all are told to and ends when the slowest has the average.
"""

import argparse
import contextlib
import functools
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.team import Team, TeamFailed

RESULTS = Path(__file__).parent / "results"
_MEGABYTE = 250_000  # float32 values
_PAUSE = 0.2  # seconds between two rounds, in which the one before ends for good
# All systems side by side take over 1 GB for each peer (an estimate), and a dozen times the vector.
# From here on they come in blocks, one system at a time, twice around.
_CROWDED_PEERS, _CROWDED_MEGABYTES = 8, 400  # the latter over all peers
_BLOCKS = 2
_LARGE = 100  # MB from which on repeats are few, and at which memory is measured
_FEW = 4
_PROFILED = 10  # rounds


def _ours(compression: Any) -> Any:
    from tests.benchmarks.ours import Ours

    return Ours(compression)


def _stock(settings: Any) -> Any:
    from tests.benchmarks.rivals import Stock

    return Stock(settings)


def _gloo() -> Any:
    from tests.benchmarks.rivals import Gloo

    return Gloo()


SYSTEMS: dict[str, Callable[[], Any]] = {
    "ours, fp16": functools.partial(_ours, "fp16"),
    "ours, int8": functools.partial(_ours, "int8"),
    "ours, none": functools.partial(_ours, "none"),
    "hivemind, defaults": functools.partial(_stock, "defaults"),
    "hivemind, tuned": functools.partial(_stock, "tuned"),
    "gloo": _gloo,
}


@dataclass
class Case:
    """What one system did in one combination. Seconds, of the slowest peer, round by round."""

    system: str
    peers: int
    megabytes: int
    whole: list[float] = field(default_factory=list)
    forming: list[float] = field(default_factory=list)
    reducing: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # rounds that do not count, and why
    note: str = ""

    def median(self, what: str) -> float | None:
        values: list[float] = getattr(self, what)
        return statistics.median(values) if values else None


def measure(peers: int, megabytes: int, systems: Sequence[str], repeats: int) -> list[Case]:
    """All systems in one combination. They take turns round by round, or in blocks of rounds."""
    cases = [Case(name, peers, megabytes) for name in systems]
    if megabytes >= _LARGE:
        repeats = min(repeats, _FEW)
    if peers < _CROWDED_PEERS and peers * megabytes < _CROWDED_MEGABYTES:
        _take_turns(cases, repeats)
        return cases
    for case in cases * _BLOCKS:
        case.note = "in blocks of rounds, for lack of memory"
        _take_turns([case], -(-repeats // _BLOCKS))
    return cases


def _take_turns(cases: Sequence[Case], repeats: int) -> None:
    """Round by round; who begins changes from turn to turn. The first turn is a rehearsal."""
    with contextlib.ExitStack() as stack:
        ready: list[tuple[Case, Team]] = []
        for case in cases:
            size = case.megabytes * _MEGABYTE
            team = Team(case.system, case.peers, size, SYSTEMS[case.system])
            try:
                ready.append((case, stack.enter_context(team)))
            except TeamFailed as failure:
                case.problems.append(str(failure))
        for turn in range(repeats + 1):
            first = turn % max(len(ready), 1)
            for entry in ready[first:] + ready[:first]:
                case, team = entry
                if not _run_round(team, turn, case):
                    ready.remove(entry)  # its processes end with the stack


def _run_round(team: Team, turn: int, case: Case) -> bool:
    """Whether the team can go on. The rehearsal (turn 0) is not recorded."""
    try:
        team.call("prepare", turn)
        time.sleep(_PAUSE)
        began = time.monotonic()
        rounds = team.call("round", turn)
    except TeamFailed as failure:
        case.problems.append(str(failure).splitlines()[0])
        return False
    problems = sorted({r.problem for r in rounds if r.problem})
    if problems:
        case.problems.append("; ".join(problems) + (" (rehearsal)" if turn == 0 else ""))
    elif turn > 0:
        case.whole.append(max(r.ended for r in rounds) - began)
        case.reducing.append(max(r.reducing for r in rounds))
        if rounds[0].forming is not None:
            case.forming.append(max(r.forming for r in rounds))
    return True


def measure_memory(megabytes: int, rounds: int) -> dict[str, Any]:
    """Peak memory of the most burdened of two peers, as multiples of the adapter."""
    size = megabytes * _MEGABYTE
    with Team("memory", 2, size, SYSTEMS["ours, fp16"]) as team:
        peaks = [p for number in range(rounds) for p in team.call("peak", number)]
    adapter = size * 4
    return {
        "megabytes": megabytes,
        "rounds": rounds,
        "held_before": max(p.before - p.idle for p in peaks) / adapter,
        "peak": max(p.peak - p.idle for p in peaks) / adapter,
        "daemon_bytes": max(p.daemon for p in peaks),
    }


def measure_profile(peers: int, megabytes: int) -> dict[str, Any]:
    """CPU seconds of a round, of all peers together, and the functions of one that take them."""
    with Team("profile", peers, megabytes * _MEGABYTE, SYSTEMS["ours, fp16"]) as team:
        for number in range(2):
            team.call("prepare", number)
            team.call("round", number)
        before, cpu, daemons, whole = 2, 0.0, 0.0, 0.0
        for number in range(before, before + _PROFILED):
            team.call("prepare", number)
            start, began = team.call("usage"), time.monotonic()
            rounds = team.call("round", number)
            whole += max(r.ended for r in rounds) - began
            for a, b in zip(start, team.call("usage"), strict=True):
                cpu, daemons = cpu + b.cpu - a.cpu, daemons + b.daemon_cpu - a.daemon_cpu
        functions = team.call("profile", before + _PROFILED, _PROFILED)[0]
    functions.sort(key=lambda f: -f[2])
    return {
        "peers": peers,
        "megabytes": megabytes,
        "whole": whole / _PROFILED,
        "cpu_python": cpu / _PROFILED,
        "cpu_daemons": daemons / _PROFILED,
        "functions": [
            {"name": n, "calls": c / _PROFILED, "own": o / _PROFILED, "total": t / _PROFILED}
            for n, c, o, t in functions[:30]
        ],
    }


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-round", description=__doc__)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[1, 10, 100], metavar="MB", help="MB of fp32")
    add("--peers", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    add("--repeats", type=int, default=7, help=f"rounds per system; at most {_FEW} from 100 MB on")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME")
    add("--quick", action="store_true", help="10 MB, 4 peers, 3 repeats; writes no results")
    add("--profile", action="store_true", help="only: where our time goes, at the first size")
    add("--memory", action="store_true", help="only: peak memory of our round")
    add("--output", type=Path, help=f"folder of round.md and round.json (default: {RESULTS.name})")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.sizes, chosen.peers, chosen.repeats = [10], [4], 3
    return chosen


def main() -> None:
    chosen = options()
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_round", *sys.argv[1:]])
    found: dict[str, Any] = {"about": report.about(command), "cases": []}
    everything = not (chosen.profile or chosen.memory)
    folder = chosen.output or (RESULTS if everything and not chosen.quick else None)
    for megabytes in chosen.sizes if everything else ():
        for peers in chosen.peers:
            for case in measure(peers, megabytes, chosen.systems, chosen.repeats):
                found["cases"].append(asdict(case))
                print(report.progress(case), file=sys.stderr, flush=True)
            _write(found, folder)  # it takes long: what there is, is kept
    if chosen.memory or (everything and not chosen.quick):
        found["memory"] = measure_memory(_LARGE, rounds=4)
    if chosen.profile or (everything and not chosen.quick):
        found["profile"] = measure_profile(4, 10 if everything else chosen.sizes[0])
    print(_write(found, folder))


def _write(found: dict[str, Any], folder: Path | None) -> str:
    found["about"]["load_after"] = list(os.getloadavg())
    text = report.markdown(found)
    if folder is not None:
        report.save(folder, "round", text, found)
    return text


if __name__ == "__main__":
    main()
