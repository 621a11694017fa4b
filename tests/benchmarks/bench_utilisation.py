"""What part of its time a peer trains: four light peers on lines of their own, a 16 MB adapter and
local epochs of a minute, with overlap and without it.

`just bench-utilisation`. The rest of the time goes into forming the group and the all-reduce. One
after the other: eight peers at a time would rather measure the machine that they all share.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.bench_round import RESULTS
from tests.benchmarks.bench_wire import ROUND_TRIP
from tests.faults.lab import Lab, usable
from tests.faults.stage import NAMES, Actor, Stage

_VALUES = 4_000_000  # 16 MB
_REHEARSALS = 2  # rounds: TCP learns in the first ones what the lines can carry
_STEP = 0.1  # seconds of a local step, in which the light learner sleeps
_BARS = {False: 0.97, True: 0.99}  # by whether averages overlap with training


def measure(overlap: bool, chosen: argparse.Namespace) -> list[float]:
    """The utilisation of each peer over so many rounds, after some that are rehearsals."""
    hosts = ("door", *NAMES)
    rounds, epoch = chosen.rounds, chosen.epoch
    with Lab(" ".join(hosts)) as lab, tempfile.TemporaryDirectory() as folder:
        for host in hosts:
            lab.slow(host, chosen.mbit)
            lab.delay(host, ROUND_TRIP / 4 * 1000)
        longest = 2 * (_REHEARSALS + rounds + 1) * epoch + 60
        stage = Stage(
            Path(folder),
            lab,
            size=_VALUES,
            rounds=_REHEARSALS + rounds + 1,  # nobody trains ahead of the last round
            epoch=0.0,
            steps=round(epoch / _STEP),
            pause=_STEP,
            by_line=True,
            averaging={"overlap": overlap},
        )
        try:
            trainers = stage.open()
            for actor in trainers.values():
                # To look at what they write meanwhile would cost much of what the machine can do.
                assert actor.end(longest) == 0, f"{actor.name}: {actor.code}"
            return [_utilisation(actor, rounds) for actor in trainers.values()]
        finally:
            stage.close()


def _utilisation(actor: Actor, rounds: int) -> float:
    commits = actor.rows(event="round_committed")[-rounds - 2 : -1]
    wall = commits[-1]["time"] - commits[0]["time"]
    # With overlap a local epoch begins before the commit of the one before; what the first one did
    # before that is about what the one after the last has done, which does not count.
    return float(sum(row["seconds_training"] for row in commits[1:]) / wall)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-utilisation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epoch", type=float, default=60.0, help="seconds of a local epoch")
    parser.add_argument("--mbit", type=float, default=100.0)
    chosen = parser.parse_args()
    if missing := usable("tc", "iptables"):
        sys.exit(f"no lab here: {missing}")
    about = report.about(shlex.join(["python", "-m", "tests.benchmarks.bench_utilisation"]))
    found = {overlap: measure(overlap, chosen) for overlap in _BARS}
    text = _page(about, found, chosen)
    print(text)
    if len(sys.argv) == 1:
        cases = [{"overlap": o, "utilisation": each} for o, each in found.items()]
        report.save(RESULTS, "utilisation", text, {"about": about, "cases": cases})


def _page(about: dict[str, Any], found: dict[bool, list[float]], chosen: Any) -> str:
    rows = []
    for overlap, each in found.items():
        middle, bar = statistics.median(each), _BARS[overlap]
        verdict = "met" if middle >= bar else "**not met**"
        name = "with overlap" if overlap else "without"
        rows.append([name, f"{middle:.2%}", f"{min(each):.2%}", f"{bar:.0%}", verdict])
    table = report.table(["averaging", "median", "least", "bar", ""], rows)
    where = report.setting(about, "Network namespaces")
    return (
        f"# What part of its time a peer trains\n\n{where}\n\nFour peers, a 16 MB adapter as fp16, "
        f"local epochs of {chosen.epoch:.0f} s, {chosen.rounds} rounds after {_REHEARSALS} "
        f"rehearsals, lines of {chosen.mbit:.0f} Mbit/s and {ROUND_TRIP * 1000:.0f} ms round trip."
        f"\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
