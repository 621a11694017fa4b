"""The commands `p2pllm data ...`, and the picture of a split. Heavy imports happen inside."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from p2pllm.data.split import Split

data_app = typer.Typer(help="Cut a data set into parts for peers.", no_args_is_help=True)

# Signs as well as colours, so that the picture also works where there are none.
_SIGNS = ("█", "▓", "▒", "░", "▚", "▞", "▤")
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_white")
_OTHERS = ("·", "dim")
_BAR = 48  # characters of the longest bar


@data_app.callback()
def _group() -> None:
    """So that `split` stays a command of its own while it is the only one."""


@data_app.command()
def split(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="JSON/JSONL files, a hub data set, or package:stdlib-qa."
        ),
    ],
    peers: Annotated[int, typer.Option(min=1, max=1000, help="How many parts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An empty or new folder.")],
    by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Deal out each value of this column unequally."),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(min=0.001, help="Dirichlet concentration of --by: smaller, more unequal."),
    ] = 0.5,
    sizes_alpha: Annotated[
        float | None,
        typer.Option(min=0.001, help="Parts of unequal sizes, by a Dirichlet with this."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 1234,
    held_out: Annotated[
        float,
        typer.Option(min=0, help="Keep so many rows (below 1: that fraction) out of all parts."),
    ] = 0,
    held_out_by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Keep out whole groups of rows that share this."),
    ] = None,
    hub_split: Annotated[
        str, typer.Option(metavar="SPLIT", help="Which split of a hub data set.")
    ] = "train",
) -> None:
    """Cut a data set into a file for each peer: evenly, by size or by label.

    Without --by and --sizes-alpha all parts are alike (IID).

    Example: p2pllm data split package:stdlib-qa --peers 4 --by category -o parts
    """
    from rich.console import Console

    from p2pllm.config.run import DataConfig
    from p2pllm.data.split import HELD_OUT, SplitPlan, write_split
    from p2pllm.errors import OutputUnwritable

    size = held_out if held_out < 1 else int(held_out)
    plan = SplitPlan(peers, by, alpha, sizes_alpha, seed, size or 0, held_out_by)
    config = DataConfig(source=source[0] if len(source) == 1 else tuple(source), split=hub_split)
    try:
        made = write_split(config, plan, output)
    except OSError as problem:
        raise OutputUnwritable(folder=output, reason=problem.strerror or problem) from problem
    Console().print(split_table(made))
    typer.echo(f"Written to {output}, described in {output / 'split.json'}")
    typer.echo(f"A trainer takes one:  p2pllm join --data {output}/shard-000.jsonl ...")
    if made.held_out:
        typer.echo(f"In the run's YAML:    data: {{eval_source: {output / HELD_OUT}}}")


def split_table(split: "Split") -> "Table":
    """A bar for each part, as long as it has rows, in the colours of its labels."""
    from rich.table import Table

    everything = Counter(split.counts([i for part in split.parts for i in part]))
    shown = [label for label, _ in everything.most_common(len(_SIGNS))]
    longest = max(map(len, split.parts))
    named = any(everything) and len(everything) > 1
    table = Table(title="Rows of each part", box=None, caption=None)
    table.add_column("part")
    table.add_column("rows", justify="right")
    table.add_column("labels", justify="right")
    table.add_column("")
    for number, part in enumerate(split.parts):
        counts = split.counts(part)
        bar = _bar(counts, shown, _BAR / longest)
        table.add_row(f"{number:03}", str(len(part)), str(len(counts)) if named else "", bar)
    if split.held_out:
        counts = split.counts(split.held_out)
        kinds = str(len(counts)) if named else ""
        table.add_row("held out", str(len(split.held_out)), kinds, "")
    if named:
        table.add_row("", "", "", _legend(everything, shown))
    return table


def _bar(counts: Mapping[str, int], shown: Sequence[str], scale: float) -> "Text":
    from rich.text import Text

    bar, done, drawn = Text(), 0, 0
    others = sum(n for label, n in counts.items() if label not in shown)
    for label, rows in [*((label, counts.get(label, 0)) for label in shown), (None, others)]:
        sign, colour = _style(label, shown)
        done += rows
        bar.append(sign * (round(done * scale) - drawn), colour)
        drawn = round(done * scale)
    return bar


def _legend(everything: Mapping[str, int], shown: Sequence[str]) -> "Text":
    from rich.text import Text

    legend = Text()
    for label in shown:
        sign, colour = _style(label, shown)
        legend.append(f"{sign} ", colour).append(f"{label or '(none)'}  ")
    if len(everything) > len(shown):
        legend.append(f"{_OTHERS[0]} {len(everything) - len(shown)} others", _OTHERS[1])
    return legend


def _style(label: str | None, shown: Sequence[str]) -> tuple[str, str]:
    if label is None:
        return _OTHERS
    return _SIGNS[shown.index(label)], _COLOURS[shown.index(label)]
