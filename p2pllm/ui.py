"""What people see: one line for each thing that happens, and tables. It only shows; it decides
nothing and waits for nobody."""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.control import Control
from rich.markup import escape
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from p2pllm import events as e
from p2pllm.swarm.rounds import SwarmView

_STEP_EVERY = 10.0  # seconds between two lines about local steps, where lines cannot be replaced


class LineScreen:
    """The screen of `join`, `aggregate` and `bootstrap`: a subscriber of `Events`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._can_replace = console.is_terminal and not console.is_dumb_terminal
        self._last_step = -math.inf
        self._is_on_step = False  # the cursor stands behind a step line that will be replaced

    def __call__(self, event: e.Event) -> None:
        if isinstance(event, e.StepDone):
            self._step(event)
            return
        told = describe(event.as_row())
        if not told:
            return
        self.close()
        self._console.print(f"{_clock(event)}  {told}", highlight=False, soft_wrap=True)
        if isinstance(event, e.Opened):
            self._console.print(invitation(event), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the step line away, so that what others print begins on a line of its own."""
        if self._is_on_step:
            self._erase_line()
            self._is_on_step = False

    def _step(self, event: e.StepDone) -> None:
        of = f"/{event.steps}" if event.steps else ""
        line = Text.from_markup(
            f"{_clock(event)}  [dim]round {event.round}  step {event.step}{of}"
            f"  loss {event.loss:.3f}  {event.tokens_per_second:.0f} tok/s[/]"
        )
        if self._can_replace:
            self._erase_line()
            line.truncate(self._console.width - 1)  # a line that wraps cannot be replaced
            self._console.print(line, end="", highlight=False)
            self._is_on_step = True
        elif time.monotonic() - self._last_step > _STEP_EVERY:
            self._last_step = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)

    def _erase_line(self) -> None:
        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


def describe(row: Mapping[str, Any]) -> str:
    """An event's row in one line of rich markup; empty for what needs no line."""
    teller = _TELLERS.get(row["event"])
    return teller(row) if teller else ""


def join_line(addresses: Sequence[str]) -> str:
    """What others paste into a shell to join."""
    return "p2pllm join " + " ".join(f"--initial-peers {shlex.quote(a)}" for a in addresses)


def pasted(command: str, width: int) -> list[str]:
    """A command on lines no wider than `width`, such that all of them pasted together still are
    that command: a shell joins lines that end in a backslash."""
    lines = []
    while len(command) > width:
        at = command.rfind(" ", 0, width - 1) + 1 or width - 1
        lines.append(command[:at] + "\\")
        command = command[at:]
    return [*lines, command]


def safe(words: object) -> str:
    """A stranger's words as markup. One line, and no control characters: in a terminal, these
    could hide what is true, or type commands."""
    line = " ".join(str(words).split())
    return escape("".join(sign if sign.isprintable() else "�" for sign in line))


def invitation(event: e.Opened) -> str:
    """What the owner hands to others."""
    line = join_line(event.addresses[:2])
    aggregate = line.replace("p2pllm join", "p2pllm aggregate", 1)
    return (
        f"\nOthers train with you by typing\n\n  [bold]{escape(line)}[/]\n\n"
        f"and one of you evaluates and keeps checkpoints with\n\n  {escape(aggregate)}\n\n"
        "[dim]Ctrl+C closes the door; the run goes on without it.[/]\n"
    )


def status_table(run_id: str, view: SwarmView, rounds: int) -> Table:
    """Who is in a run, and how it does."""
    last = view.results[-1] if view.results else None
    evaluated = f"held-out loss {last.loss:.4f} in round {last.round}" if last else "none yet"
    latest = max((p.round for p in view.peers if p.role != "bootstrap"), default=0)
    table = Table(
        title=f"{safe(run_id)}: round {latest} of {rounds}",
        caption=f"last evaluation: {evaluated}",
        title_style="bold",
        caption_style="",
    )
    for column in ("name", "role", "state", "round", "samples", "samples/s", "shard", "adapter"):
        table.add_column(column, justify="left" if column in ("name", "role", "state") else "right")
    for p in sorted(view.peers, key=lambda p: (p.role, p.name)):
        is_designated = p.role == "aggregator" and p.peer == view.aggregator
        table.add_row(
            safe(p.name),
            "aggregator (designated)" if is_designated else p.role,
            p.state,
            "" if p.role == "bootstrap" else str(p.round),
            f"{p.samples:,}" if p.role == "trainer" else "",
            f"{p.speed:.1f}" if p.speed else "",
            ", ".join(map(str, p.shards)),
            safe(p.digest[:8]),
        )
    if not view.peers:
        table.add_row("nobody is here", *[""] * 7)
    return table


def status_json(view: SwarmView) -> dict[str, Any]:
    """The same for programs."""
    return {
        "aggregator": view.aggregator,
        "peers": [p.model_dump(exclude={"sketch"}) for p in view.peers],
        "results": [r.model_dump() for r in view.results],
    }


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The ledger of one peer, a line for each thing that ended a round."""
    # Without lines between its columns it fits into 80 characters.
    table = Table(title="What became of each round", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("round", "samples", "loss", "train", "wait", "average", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("with", overflow="fold")
    for row in rows:
        if row["event"] != "round_committed":
            table.add_row(str(row["round"]), *[""] * 6, describe(row))
            continue
        remarks = [f"{n}: {why}" for n, why in {**row["left_out"], **row["cut_down"]}.items()]
        table.add_row(
            str(row["round"]),
            str(row["samples"]),
            "" if row["loss"] is None else _loss(row, 3),
            *(f"{row[f'seconds_{what}']:.2f} s" for what in ("training", "waiting", "averaging")),
            size(row["bytes_sent"]),
            "\n".join([safe(", ".join(sorted(row["peers"]))), *map(safe, remarks)]),
        )
    return table


def size(count: float) -> str:
    """Bytes for people."""
    if count < 1000:
        return f"{count:.0f} B"
    units = iter(("kB", "MB", "GB"))
    unit = next(units)
    count /= 1000
    while count >= 1000 and unit != "GB":
        unit = next(units)
        count /= 1000
    return f"{count:.1f} {unit}"


# ---- one line for each event


def _clock(event: e.Event) -> str:
    return f"[dim]{datetime.fromtimestamp(event.time, UTC).astimezone():%H:%M:%S}[/]"


def _loss(row: Mapping[str, Any], digits: int = 4) -> str:
    """Journals have null for a loss that was no number."""
    loss = row["loss"]
    return f"{loss:.{digits}f}" if loss is not None and math.isfinite(loss) else "not a number"


def _joined(row: Mapping[str, Any]) -> str:
    return f"[bold]{safe(row['peer'])}[/] is in run [bold]{safe(row['run'])}[/] as {row['role']}"


def _committed(row: Mapping[str, Any]) -> str:
    loss = "" if row["loss"] is None else f"  loss {_loss(row, 3)}"
    remarked = [f"without {name}: {why}" for name, why in row["left_out"].items()]
    remarked += [f"{name}: {why}" for name, why in row["cut_down"].items()]
    remarks = "".join(f"  [yellow]{safe(remark)}[/]" for remark in remarked)
    return (
        f"[green]round {row['round']} committed[/] with {safe(', '.join(sorted(row['peers'])))}"
        f"{loss}  {row['tokens_per_second']:.0f} tok/s  train {row['seconds_training']:.1f} s"
        f"  wait {row['seconds_waiting']:.1f} s  average {row['seconds_averaging']:.2f} s"
        f"  ↑ {size(row['bytes_sent'])} ↓ {size(row['bytes_received'])}{remarks}"
    )


def _missed(row: Mapping[str, Any]) -> str:
    blamed = f" ({safe(', '.join(row['culprits']))})" if row["culprits"] else ""
    return f"[yellow]round {row['round']} missed: {safe(row['reason'])}{blamed}[/]"


def _finished(row: Mapping[str, Any]) -> str:
    where = f", it lies in {safe(row['path'])}" if row["path"] else ""
    return f"[bold green]the run is over[/]: adapter {row['digest'][:8]}{where}"


_TELLERS = {
    "joined": _joined,
    "opened": lambda row: f"the door of run [bold]{safe(row['run'])}[/] is open",
    "working": lambda row: safe(row["doing"]),
    "shard_claimed": lambda row: (
        f"training on part {row['shard'] + 1} of {row['shards']}"
        + (f": {row['rows']} rows" if row["rows"] else "")
    ),
    "round_committed": _committed,
    "round_missed": _missed,
    "caught_up": lambda row: (
        f"caught up to round {row['round']} from {safe(', '.join(row['donors']))} "
        f"in {row['seconds']:.1f} s"
    ),
    "evaluated": lambda row: (
        f"[cyan]round {row['round']}: held-out loss {_loss(row)}[/] "
        f"({row['rows']} rows, {row['seconds']:.1f} s)"
    ),
    "aggregation_measured": lambda row: (
        f"round {row['round']}: aggregation error {100 * row['error']:.3g} %"
        f" (of {len(row['peers'])} of {row['members']} peers)"
    ),
    "trainer_evaluated": lambda row: (
        f"[cyan]round {row['round']}: held-out loss {_loss(row)} here[/], {row['when']} the average"
        f" ({row['rows']} rows, {row['seconds']:.1f} s)"
    ),
    "evaluation_seen": lambda row: f"[cyan]round {row['round']}: held-out loss {_loss(row)}[/]",
    "checkpoint_saved": lambda row: f"saved {safe(row['path'])}",
    "trouble": lambda row: f"[yellow]{safe(row['what'])}[/]",
    "finished": _finished,
}
