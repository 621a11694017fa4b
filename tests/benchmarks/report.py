"""The numbers of the round benchmark as Markdown, against the bars that were set for them."""

import json
import os
import platform
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

Case = dict[str, Any]  # a bench_round.Case, as JSON holds it

# (what, ours, the other, peers, MB, at most this ratio)
BARS = [
    ("whole", "ours, fp16", "hivemind, defaults", 4, 10, 0.25),
    ("whole", "ours, fp16", "hivemind, tuned", 4, 10, 1.0),
    ("reducing", "ours, fp16", "hivemind, defaults", 4, 10, 0.7),
    ("reducing", "ours, fp16", "hivemind, defaults", 4, 100, 0.7),
    ("reducing", "ours, fp16", "hivemind, tuned", 4, 10, 0.7),
    ("reducing", "ours, fp16", "hivemind, tuned", 4, 100, 0.7),
    ("reducing", "ours, none", "hivemind, defaults", 4, 10, 0.7),
    ("reducing", "ours, none", "hivemind, defaults", 4, 100, 0.7),
]
MEMORY_BAR = 4.0  # times the adapter
_WORDS = {"whole": "whole round", "reducing": "all-reduce alone"}


def about(command: str) -> dict[str, Any]:
    packages = ("p2pllm", "hivemind", "torch", "numpy")
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "load_before": list(os.getloadavg()),
    }


def progress(case: Any) -> str:
    whole = case.median("whole")
    seconds = "-" if whole is None else f"{whole:.3f} s"
    notes = [case.note, *case.problems]
    return f"{case.megabytes} MB, {case.peers} peers, {case.system}: {seconds} " + "; ".join(
        n for n in notes if n
    )


def markdown(found: dict[str, Any]) -> str:
    sections = ["# How long a round takes\n\n" + setting(found["about"])]
    if cases := found["cases"]:
        sections += ["## The bars\n\n" + _bars(cases), "## All systems\n\n" + _legend()]
        combinations = dict.fromkeys((c["megabytes"], c["peers"]) for c in cases)
        for megabytes, peers in combinations:
            mine = [c for c in cases if (c["megabytes"], c["peers"]) == (megabytes, peers)]
            sections.append(f"### {megabytes} MB, {peers} peers\n\n" + _combination(mine))
    if "memory" in found:
        sections.append("## Memory\n\n" + _memory(found["memory"]))
    if "profile" in found:
        sections.append("## Where our time goes\n\n" + _profile(found["profile"]))
    return "\n\n".join(sections) + "\n"


def leaks(facts: dict[str, Any], chosen: Any, slopes: str, missed: list[str]) -> str:
    facts = facts | {"load_after": list(os.getloadavg())}
    text = (
        f"# Whether anything grows\n\n{setting(facts)}\n\n{chosen.rounds} rounds of "
        f"{chosen.size:g} MB, {chosen.peers} peers, {len(missed)} of them missed. Slopes of a "
        "straight line, without the first fifth of the rounds, in which caches fill.\n\n"
    )
    return text + slopes + "\n" + "".join(f"\n- {m}" for m in missed)


def save(folder: Path, name: str, text: str, facts: Any) -> None:
    """Write <name>.md and <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*lines, *map(list, rows)])


def setting(facts: dict[str, Any], lines: str = "Loopback") -> str:
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    facts.setdefault("load_after", list(os.getloadavg()))
    loads = [f"{facts[when][0]:.1f}" for when in ("load_before", "load_after")]
    return (
        f"`{facts['command']}`, {facts['date']}, {facts['cores']} cores of {facts['cpu']}, "
        f"{facts['system']}, {versions}; load {loads[0]} before and {loads[1]} after. "
        f"{lines}, one thread per process, real libp2p daemons."
    )


def _legend() -> str:
    return (
        "Seconds, of the slowest peer: median (least to most) over the rounds. *Whole* runs from "
        "the word to begin until the last peer has the average; ours includes announcing that it "
        "is ready and reading the records. *Forming* is the part until a peer knows its group. "
        "MB are of float32. hivemind is `DecentralizedAverager` as it is, uncompressed, and tuned "
        "by hand: `target_group_size=N, min_matchmaking_time=3, request_timeout=1`, fp16. gloo "
        "neither encrypts nor forms groups nor survives a failure. Every average is checked "
        "against the right answer; a round that is wrong or not of the full group does not count."
    )


def _combination(cases: list[Case]) -> str:
    by_name = {c["system"]: c for c in cases}
    defaults, tuned, gloo = (
        by_name.get(n) for n in ("hivemind, defaults", "hivemind, tuned", "gloo")
    )
    rows = [
        [
            case["system"],
            *(_spread(case[what]) for what in ("whole", "forming", "reducing")),
            _ratio("whole", case, defaults),
            _ratio("whole", case, tuned),
            _ratio("reducing", case, defaults),
            _ratio("reducing", case, tuned),
            _ratio("reducing", case, gloo),
            str(len(case["whole"])),
        ]
        for case in cases
    ]
    head = ["system", "whole", "forming", "all-reduce", "whole ÷ defaults", "whole ÷ tuned"]
    head += ["all-reduce ÷ defaults", "÷ tuned", "÷ gloo", "rounds"]
    notes = [f"- {c['system']}: {note}" for c in cases for note in _notes(c)]
    return table(head, rows) + ("\n\n" + "\n".join(notes) if notes else "")


def _notes(case: Case) -> list[str]:
    problems = [f"does not count: {p}" for p in case["problems"]]
    return ([case["note"]] if case["note"] else []) + problems


def _bars(cases: list[Case]) -> str:
    by_key = {(c["system"], c["peers"], c["megabytes"]): c for c in cases}
    rows = []
    for what, ours, other, peers, megabytes, bar in BARS:
        mine, theirs = (by_key.get((name, peers, megabytes)) for name in (ours, other))
        if mine is None or theirs is None or not mine[what] or not theirs[what]:
            continue
        ratio = statistics.median(mine[what]) / statistics.median(theirs[what])
        verdict = "met" if ratio <= bar else "**not met**"
        case = f"{_WORDS[what]}, {megabytes} MB, {peers} peers: {ours} to {other}"
        rows.append([case, f"≤ {bar}", f"{ratio:.2f}", verdict])
    return table(["bar", "at most", "measured", ""], rows) if rows else "Not measured."


def _memory(memory: dict[str, Any]) -> str:
    verdict = "met" if memory["peak"] <= MEMORY_BAR else "**not met**"
    return (
        f"A trainer's process with an adapter of {memory['megabytes']} MB, over "
        f"{memory['rounds']} rounds of two peers: it brings {memory['held_before']:.2f} times the "
        f"adapter into the round (its state and its delta), and holds {memory['peak']:.2f} times "
        f"the adapter at its peak, all included (bar: {MEMORY_BAR:.0f}, {verdict}). Its daemon "
        f"holds {memory['daemon_bytes'] / 1e6:.0f} MB."
    )


def _profile(profile: dict[str, Any]) -> str:
    text = (
        f"{profile['megabytes']} MB, {profile['peers']} peers, fp16: a round of "
        f"{profile['whole']:.3f} s takes {profile['cpu_python']:.3f} CPU seconds in the "
        f"{profile['peers']} Python processes and {profile['cpu_daemons']:.3f} in their libp2p "
        f"daemons, on {os.cpu_count()} cores. One peer's network thread, in CPU milliseconds for "
        "each round (cProfile, which itself takes time):"
    )
    rows = [
        [
            f"`{f['name']}`",
            f"{f['calls']:.0f}",
            f"{1000 * f['own']:.2f}",
            f"{1000 * f['total']:.2f}",
        ]
        for f in profile["functions"]
    ]
    return text + "\n\n" + table(["function", "calls", "own", "with callees"], rows)


def _ratio(what: str, case: Case, other: Case | None) -> str:
    if other is None or other is case or not case[what] or not other[what]:
        return ""
    return f"{statistics.median(case[what]) / statistics.median(other[what]):.2f}"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
