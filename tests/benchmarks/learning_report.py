"""The numbers of the learning benchmark as Markdown, against the bars that were set, and a plot."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.report import table

Run = dict[str, Any]  # what bench_learning.play returns, as JSON holds it

ALONE, DEFAULT = "one machine", "4 peers, by module"
BARS = (("4 peers, IID", 1.01), (DEFAULT, 1.03))  # held-out loss over that of one machine, at most
# Each changes one factor of DEFAULT.
CHANGES = ("lora: freeze_a", "lora: alternate", "outer: nesterov", "compression: int8")
NOT_WORSE = 1.005  # mean ratio up to which fewer bytes are worth it
SETTING = (
    "{peers} peers, {rounds} rounds of {steps} steps of {batch} rows each; LoRA rank {r} on "
    "{target}; AdamW, {schedule} schedule, {warmup:g} rounds of warm-up; rows "
    "of at most {length} tokens, loss on the answers. Averaging by default: lora {lora}, outer "
    "{outer}, compression {compression}, robust {robust}. Rounds are few, the model is small and "
    "rows are short: what a run of thousands of steps would show may differ."
)
METHOD = """\
Loss is that of the last adapter on {rows} held-out rows ({tokens} tokens) of modules of Python's
standard library that nobody trains on, without the rows of the curves; the same for all. A seed
decides the adapter's first values, the order of rows, and which rows, or modules, each peer has.
Numbers are means over the seeds, in brackets the least and the most; ratios are taken seed by seed.

*One machine* is `p2pllm train --trainers {peers}`: one learner that takes as many samples from all
rows, in the same batches, so in {peers} times as many updates as a peer makes. With *batch {large}*
it makes as many updates as a peer, each from the rows of all: what averaging after every step would
be. *By module* means that a peer has modules that no other peer has, with few exceptions. The rows
below it change one setting of it. Bytes are what a peer sends and receives in all rounds, without
libp2p's encryption. Aggregation error is ‖mean(BA) - mean(B)mean(A)‖ / ‖mean(BA)‖, the median over
the rounds. The swarm's learners, groups, all-reduce and outer step are the real ones; its network
is in memory (tests/benchmarks/one_process.py)."""


def markdown(found: dict[str, Any]) -> str:
    facts, runs = found["about"], found["runs"]
    minutes = f"{facts['minutes']:.0f} minutes" if "minutes" in facts else "**unfinished**"
    played = [*runs, *(run for run in found["sweep"] if run not in runs)]
    minutes += f" ({sum(run['cpu_seconds'] for run in played) / 60:.0f} of processor time)"
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    sections = [
        "# Whether a swarm learns as well as one machine",
        f"`{facts['command']}`, {facts['date']}, {facts['cores']} cores of {facts['cpu']}, "
        f"{facts['system']}, {versions}; two processes of one thread each, {minutes}; load "
        f"{facts['load_before'][0]:.1f} before and {facts['load_after'][0]:.1f} after.",
        _setting(found["plan"]),
        "## The learning rate\n\n" + _rates(found),
        "## The bars\n\n" + _bars(runs),
        "## Held-out loss, bytes, aggregation error\n\n" + _table(runs),
        "## Which default follows\n\n" + _defaults(runs),
        "## A quantised base\n\n" + _quantized(runs),
        "## How it is measured\n\n" + _method(found["plan"], runs),
    ]
    if "minutes" in facts:
        sections.insert(6, "![held-out loss by round](learning.png)")
    return "\n\n".join(sections) + "\n"


def save_plot(path: Path, found: dict[str, Any]) -> None:
    """Held-out loss by round, mean and range over the seeds, on the rows of the curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, runs in by_case(found["runs"]).items():
        if name.startswith("base: "):
            continue  # another precision, and other rounds
        curves = [[loss for _, loss in run["losses"]] for run in runs]
        rounds = [round for round, _ in runs[0]["losses"]]
        columns = list(zip(*curves, strict=True))
        line = axes.plot(rounds, [statistics.mean(c) for c in columns], marker="o", label=name)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(rounds, low, high, color=line[0].get_color(), alpha=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rounds")
    axes.set_ylabel(f"loss on {found['plan']['curve_rows']} held-out rows")
    axes.set_title("Mean over the seeds, and their range")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def by_case(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """In the order of the seeds; cases in the order of the table."""
    order = [ALONE, "one machine, batch 16", BARS[0][0], DEFAULT, *CHANGES]
    names = dict.fromkeys([*order, *sorted(run["case"] for run in runs)])
    ordered = sorted(runs, key=lambda run: int(run["seed"]))
    cases = {name: [run for run in ordered if run["case"] == name] for name in names}
    return {name: mine for name, mine in cases.items() if mine}


def ratios(runs: Sequence[Run], name: str, other: str) -> list[float]:
    """Of the losses, for each seed that both were played with."""
    losses = {(run["case"], run["seed"]): run["loss"] for run in runs}
    seeds = sorted({seed for case, seed in losses if case == name and (other, seed) in losses})
    return [losses[name, seed] / losses[other, seed] for seed in seeds]


def _setting(plan: dict[str, Any]) -> str:
    training, averaging, target = plan["training"], plan["averaging"], plan["lora"]["target"]
    return SETTING.format(
        peers=plan["peers"],
        rounds=plan["rounds"],
        steps=training["local"]["steps"],
        batch=training["batch_size"],
        r=plan["lora"]["r"],
        target=target if isinstance(target, str) else ", ".join(target),
        schedule=training["schedule"],
        warmup=training["warmup_rounds"],
        length=plan["data"]["max_length"],
        **{name: averaging[name] for name in ("lora", "outer", "compression", "robust")},
    )


def _rates(found: dict[str, Any]) -> str:
    if "rates" not in found:
        return "Not yet chosen."
    rates, sweep = found["rates"], found["sweep"]
    told = (
        f"One machine is trained at a peak rate of {rates['alone']:g}, a swarm, and the large "
        f"batch, at {rates['swarm']:g}"
    )
    if not sweep:
        return f"{told}, as they were told."
    names = (ALONE, BARS[0][0])
    known = {(run["case"], run["rate"]): run for run in sweep}
    rows = []
    for rate in sorted({run["rate"] for run in sweep}):
        mine = [known[name, rate] for name in names]
        curves = [f"{run['losses'][-1][1]:.4f}" for run in mine]
        losses = [f"{run['loss']:.4f}" for run in mine]
        rows.append([f"{rate:g}", *curves, *losses, f"{mine[1]['loss'] / mine[0]['loss']:.4f}"])
    heads = [f"{name}, rows of the curves" for name in names] + [
        f"{name}, the rest" for name in names
    ]
    return (
        f"{told}: where each is best on the rows of the curves, with the first seed. The losses "
        "below are those of the other held-out rows.\n\n"
        + table(["peak rate", *heads, "ratio"], rows)
    )


def _method(plan: dict[str, Any], runs: Sequence[Run]) -> str:
    large = plan["training"]["batch_size"] * plan["peers"]
    told = runs[0] if runs else {"rows": 0, "tokens": 0}
    return METHOD.format(peers=plan["peers"], large=large, rows=told["rows"], tokens=told["tokens"])


def _bars(runs: Sequence[Run]) -> str:
    rows = []
    for name, bar in BARS:
        if measured := ratios(runs, name, ALONE):
            verdict = "met" if statistics.mean(measured) <= bar else "**not met**"
            case = f"{name}, with the defaults, to {ALONE}"
            rows.append([case, f"≤ {bar}", _spread(measured, 4), str(len(measured)), verdict])
    return table(["held-out loss", "at most", "measured", "seeds", ""], rows)


def _table(runs: Sequence[Run]) -> str:
    rows = []
    for name, mine in by_case(runs).items():
        if name.startswith("base: "):
            continue
        travelled = [_total(run) / 1e6 for run in _swarms(mine)]
        errors = [statistics.median(r["error"] for r in run["rounds"]) for run in _swarms(mine)]
        rows.append(
            [
                name,
                _spread([run["loss"] for run in mine], 4),
                "" if name == ALONE else _spread(ratios(runs, name, ALONE), 4),
                _spread(ratios(runs, name, DEFAULT), 4) if name in CHANGES else "",
                f"{statistics.mean(travelled):.1f}" if travelled else "",
                _spread(errors, 3),
                ", ".join(str(samples) for samples in {run["samples"] for run in mine}),
                str(len(mine)),
            ]
        )
    head = ["", "held-out loss", "÷ one machine", "÷ by module", "MB a peer"]
    return table([*head, "aggregation error", "samples", "seeds"], rows) + "\n\n" + _before(runs)


def _before(runs: Sequence[Run]) -> str:
    """So that nobody has to take on trust that anything was learned."""
    alone = [run for run in runs if run["case"] == ALONE]
    if not alone:
        return ""
    first = statistics.mean(run["losses"][0][1] for run in alone)
    last = statistics.mean(run["losses"][-1][1] for run in alone)
    cut = sum(r["cut_down"] for run in _swarms(runs) for r in run["rounds"])
    return (
        f"On the rows of the curves, the loss of one machine falls from {first:.3f} to {last:.3f}. "
        f"In all rounds together, {cut} deltas were cut down by `averaging.robust`."
    )


def _defaults(runs: Sequence[Run]) -> str:
    lines = [
        "The rule, set before the run: a setting other than the default follows if its loss is "
        "lower with every seed, or if it moves fewer bytes and its loss is at most "
        f"{100 * (NOT_WORSE - 1):.1f} % higher on average.",
        "",
    ]
    for name in CHANGES:
        measured = ratios(runs, name, DEFAULT)
        if not measured:
            continue
        saves = _bytes(runs, name) < 0.99 * _bytes(runs, DEFAULT)
        follows = max(measured) < 1 or (saves and statistics.mean(measured) <= NOT_WORSE)
        verdict = "**it follows**" if follows else "the default stays"
        share = _bytes(runs, name) / _bytes(runs, DEFAULT)
        lines.append(
            f"- `{name}`: {_spread(measured, 4)} of the default's loss, with "
            f"{100 * share:.0f} % of its bytes: {verdict}."
        )
    lines += [
        "",
        "This is one model and a few rounds. The program's own defaults change when a longer run "
        "says the same; until then what follows here is a hint for your own run file.",
    ]
    return "\n".join(lines)


def _quantized(runs: Sequence[Run]) -> str:
    cases = by_case([run for run in runs if run["case"].startswith("base: ")])
    rows = [
        [
            f"`{name.removeprefix('base: ')}`",
            f"{run['losses'][0][1]:.4f}",
            f"{run['losses'][-1][1]:.4f}",
            f"{run['loss']:.4f}",
            str(run["samples"]),
            f"{run['cpu_seconds']:.0f}",
        ]
        for name, mine in cases.items()
        for run in mine
    ]
    head = ["base", "before (rows of the curves)", "after", "after (all rows)", "samples", "CPU s"]
    told = "One machine and one seed, both computing in float32; a shorter run than those above."
    return f"{told}\n\n{table(head, rows)}"


def _swarms(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if "rounds" in run]


def _total(run: Run) -> float:
    return float(sum(r["bytes_per_peer"] for r in run["rounds"]))


def _bytes(runs: Sequence[Run], name: str) -> float:
    mine = [run for run in _swarms(runs) if run["case"] == name]
    return statistics.mean(_total(run) for run in mine)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
