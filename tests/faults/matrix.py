"""The fault matrix: real peers, real sockets, and one blow in each case.

    python -m tests.faults.matrix [CASE…] [--jobs N]

Prints a table. When all cases have run, it is written to results.md beside this file, too.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.faults import cases, lab_cases  # noqa: F401  # they fill CASES
from tests.faults.lab import usable
from tests.faults.play import CASES, NEEDS, Outcome, run

RESULTS = Path(__file__).with_name("results.md")
HEAD = ("case", "lost", "recovery", "back", "equal", "cause in the ledger")
_WIDTHS = (38, 7, 8, 8, 5, 0)
_LEGEND = """\
Each case: at least four trainers as real processes over real sockets, a 10 MB adapter, one blow.
It passes when no process hangs, the survivors complete the run, all who are there at the end hold
the same adapter, and a ledger names who was missing, and why.

- lost: rounds that a survivor did not complete itself (in brackets: failed attempts at a round)
- recovery: seconds from the blow until all survivors have committed a round again
- back: seconds from the end of the trouble until the victim has committed a round with the others
- equal: whether all hold the same adapter in the end
"""


def line(cells: tuple[str, ...]) -> str:
    """One row on the screen."""
    texts = [f"{cells[0]:{_WIDTHS[0]}}"]
    texts += [f"{cell:>{width}}" for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True)]
    return "  ".join(texts)


def as_markdown(rows: list[tuple[str, ...]], summary: str) -> str:
    """The table with the day and the machine it comes from."""
    words = [w.partition(":")[2].strip() for w in _cpu_lines() if w.startswith("model name")]
    machine = f"{os.cpu_count()} cores of {next(iter(words), platform.machine())}"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    table = [HEAD, ("---",) * len(HEAD), *rows]
    told = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    facts = f"{summary}. {when}, {machine}, Linux {platform.release()}."
    return f"# The fault matrix\n\nWritten by `just test-faults`. {facts}\n\n{_LEGEND}\n{told}\n"


def _cpu_lines() -> list[str]:
    about = Path("/proc/cpuinfo")
    return about.read_text().splitlines() if about.exists() else []


def play(name: str) -> Outcome:
    """One case in a folder of its own, which stays only when the case failed."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    outcome = run(name, folder)
    if outcome.problem:
        outcome.problem += f" (see {folder}/report.txt)"
    else:
        shutil.rmtree(folder)
    return outcome


def play_all(names: list[str], jobs: int) -> Iterator[tuple[str, ...]]:
    """The rows of the table, in order, as they become known."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        missing = {name: usable(*NEEDS[name]) for name in names if name in NEEDS}
        missing = {name: why for name, why in missing.items() if why}
        played = {name: pool.submit(play, name) for name in names if name not in missing}
        for name in names:
            if name in missing:
                yield (name, "-", "-", "-", "-", f"skipped: {missing[name]}")
            else:
                yield played[name].result().cells


def main() -> int:
    options = argparse.ArgumentParser(prog="just test-faults", description=__doc__)
    options.add_argument("words", nargs="*", metavar="CASE", help="a word of the cases' names")
    options.add_argument("--jobs", type=int, default=1, help="cases at a time; 1 times best")
    chosen = options.parse_args()
    names = [n for n in CASES if not chosen.words or any(word in n for word in chosen.words)]
    rows = []
    print(line(HEAD), flush=True)
    for row in play_all(names, chosen.jobs):
        rows.append(row)
        print(line(row), flush=True)
    failed = sum(row[-1].startswith("FAILED") for row in rows)
    skipped = sum(row[-1].startswith("skipped") for row in rows)
    summary = f"{len(rows) - failed - skipped} passed, {failed} failed, {skipped} skipped"
    print(summary, flush=True)
    if not chosen.words:
        at_a_time = f"{summary}, {chosen.jobs} at a time"
        RESULTS.write_text(as_markdown(rows, at_a_time))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
