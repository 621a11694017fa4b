"""Whether anything grows: 300 rounds of a small adapter in real processes, and the slopes.

`just bench-leaks`, or `python -m tests.benchmarks.bench_leaks --help`. Exits with 1 when something
grows faster than noise.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tests.benchmarks import report
from tests.benchmarks.bench_round import RESULTS, SYSTEMS
from tests.benchmarks.team import Team

_SETTLED = 0.2  # of the rounds: caches fill in these, they do not count
_EVERY = 10  # rounds between two looks
# What is looked at, in which unit, and the most that it may grow in 100 rounds.
_WATCHED = {
    "rss": ("memory, MB", 1e6, 2.0),
    "threads": ("threads", 1, 0.5),
    "files": ("open files", 1, 0.5),
    "children": ("child processes", 1, 0.5),
    "daemon_rss": ("daemon's memory, MB", 1e6, 2.0),
    "daemon_files": ("daemon's open files", 1, 0.5),
}


def watch(peers: int, megabytes: float, rounds: int) -> dict[str, Any]:
    """{"rounds": [...], "rss": one list for each peer, ...}; missed rounds under "missed"."""
    found: dict[str, Any] = {name: [[] for _ in range(peers)] for name in _WATCHED}
    found |= {"rounds": [], "missed": []}
    with Team("leaks", peers, int(megabytes * 250_000), SYSTEMS["ours, fp16"]) as team:
        for number in range(rounds):
            team.call("prepare", number)
            problems = sorted({r.problem for r in team.call("round", number) if r.problem})
            if problems:
                found["missed"].append(f"round {number}: {'; '.join(problems)}")
            if (number + 1) % _EVERY == 0:
                found["rounds"].append(number + 1)
                for rank, usage in enumerate(map(asdict, team.call("usage"))):
                    for name in _WATCHED:
                        found[name][rank].append(usage[name])
    return found


def slope(rounds: Sequence[int], values: Sequence[float]) -> float:
    """Growth in 100 rounds, by a straight line through the settled part."""
    first = int(len(rounds) * _SETTLED)
    return float(np.polyfit(rounds[first:], values[first:], 1)[0] * 100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-leaks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--peers", type=int, default=3, metavar="N")
    parser.add_argument("--size", type=float, default=1.0, metavar="MB", help="of fp32")
    chosen = parser.parse_args()
    command = shlex.join(["python", "-m", "tests.benchmarks.bench_leaks", *sys.argv[1:]])
    about = report.about(command)
    found = watch(chosen.peers, chosen.size, chosen.rounds)
    grows, rows = False, []
    for name, (words, unit, most) in _WATCHED.items():
        slopes = [slope(found["rounds"], series) / unit for series in found[name]]
        worst = max(slopes)
        grows = grows or worst > most
        last = max(series[-1] for series in found[name]) / unit
        shown = " ".join(f"{s:+.2f}" for s in slopes)
        rows.append([words, shown, f"{last:.0f}", f"{most}", "grows" if worst > most else "level"])
    head = ["what", "growth in 100 rounds, peer by peer", "at the end", "at most", ""]
    text = report.leaks(about, chosen, report.table(head, rows), found["missed"])
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "leaks.md").write_text(text)
    (RESULTS / "leaks.json").write_text(json.dumps({"about": about, **found}) + "\n")
    sys.exit(grows)


if __name__ == "__main__":
    main()
