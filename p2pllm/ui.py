"""What people see: one line for each thing that happens, and tables. It only shows; it decides
nothing and waits for nobody."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from p2pllm import events as e
from p2pllm.swarm.rounds import SwarmView

_STEP_EVERY = 10.0  # seconds between two lines about local steps, where lines cannot be replaced


class LineScreen:
    """The screen of `join`, `aggregate` and `bootstrap`: a subscriber of `Events`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_step = 0.0
        self._is_on_step = False  # the cursor stands behind a step line that may be replaced

    def __call__(self, event: e.Event) -> None:
        if isinstance(event, e.StepDone):
            self._step(event)
            return
        told = describe(event.as_row())
        if not told:
            return
        self._end_step_line()
        clock = datetime.fromtimestamp(event.time, UTC).astimezone().strftime("%H:%M:%S")
        self._console.print(f"[dim]{clock}[/]  {told}", highlight=False, soft_wrap=True)
        if isinstance(event, e.Opened):
            self._console.print(invitation(event), highlight=False, soft_wrap=True)

    def _step(self, event: e.StepDone) -> None:
        now = time.monotonic()
        of = f"/{event.steps}" if event.steps else ""
        line = (
            f"round {event.round}  step {event.step}{of}  loss {event.loss:.3f}  "
            f"{event.tokens_per_second:.0f} tok/s"
        )
        if self._console.is_terminal:
            self._console.print(f"\r          [dim]{line}[/]", end="\x1b[K", highlight=False)
            self._is_on_step = True
        elif now - self._last_step > _STEP_EVERY:
            self._last_step = now
            self._console.print(f"          {line}", highlight=False)

    def _end_step_line(self) -> None:
        if self._is_on_step:
            self._console.print("\r", end="\x1b[K", highlight=False)
            self._is_on_step = False


def describe(row: Mapping[str, Any]) -> str:
    """An event's row in one line of rich markup; empty for what needs no line."""
    teller = _TELLERS.get(row["event"])
    return teller(row) if teller else ""


def join_line(addresses: Sequence[str]) -> str:
    """What others paste into a shell to join."""
    return "p2pllm join " + " ".join(f"--initial-peers {address}" for address in addresses)


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
        title=f"{run_id}: round {latest} of {rounds}",
        caption=f"last evaluation: {evaluated}",
        title_style="bold",
        caption_style="",
    )
    for column in ("name", "role", "state", "round", "samples", "samples/s", "shard", "adapter"):
        table.add_column(column, justify="left" if column in ("name", "role", "state") else "right")
    for p in sorted(view.peers, key=lambda p: (p.role, p.name)):
        is_designated = p.role == "aggregator" and p.peer == view.aggregator
        table.add_row(
            escape(p.name),
            "aggregator (designated)" if is_designated else p.role,
            p.state,
            "" if p.role == "bootstrap" else str(p.round),
            f"{p.samples:,}" if p.role == "trainer" else "",
            f"{p.speed:.1f}" if p.speed else "",
            "" if p.shard is None else str(p.shard),
            p.digest[:8],
        )
    if not view.peers:
        table.add_row("nobody is here", *[""] * 7)
    return table


def status_json(view: SwarmView) -> dict[str, Any]:
    """The same for programs."""
    return {
        "aggregator": view.aggregator,
        "peers": [p.model_dump() for p in view.peers],
        "results": [r.model_dump() for r in view.results],
    }


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The ledger of one peer, a line for each thing that ended a round."""
    table = Table(title="What became of each round")
    for column in ("round", "with", "samples", "loss", "train", "wait", "average", "sent"):
        table.add_column(column, justify="left" if column == "with" else "right")
    table.add_column("remarks", overflow="fold")
    for row in rows:
        if row["event"] != "round_committed":
            table.add_row(str(row["round"]), *[""] * 7, describe(row))
            continue
        remarks = [f"{n}: {why}" for n, why in {**row["left_out"], **row["cut_down"]}.items()]
        table.add_row(
            str(row["round"]),
            escape(", ".join(sorted(row["peers"]))),
            str(row["samples"]),
            "" if row["loss"] is None else f"{row['loss']:.3f}",
            *(f"{row[f'seconds_{what}']:.2f} s" for what in ("training", "waiting", "averaging")),
            size(row["bytes_sent"]),
            escape("; ".join(remarks)),
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


def _joined(row: Mapping[str, Any]) -> str:
    return f"[bold]{escape(row['peer'])}[/] is in run [bold]{row['run']}[/] as {row['role']}"


def _committed(row: Mapping[str, Any]) -> str:
    loss = "" if row["loss"] is None else f"  loss {row['loss']:.3f}"
    remarks = "".join(f"  [yellow]without {escape(n)}: {w}[/]" for n, w in row["left_out"].items())
    remarks += "".join(f"  [yellow]{escape(n)}: {w}[/]" for n, w in row["cut_down"].items())
    return (
        f"[green]round {row['round']} committed[/] with {escape(', '.join(sorted(row['peers'])))}"
        f"{loss}  {row['tokens_per_second']:.0f} tok/s  train {row['seconds_training']:.1f} s"
        f"  wait {row['seconds_waiting']:.1f} s  average {row['seconds_averaging']:.2f} s"
        f"  ↑ {size(row['bytes_sent'])} ↓ {size(row['bytes_received'])}{remarks}"
    )


def _missed(row: Mapping[str, Any]) -> str:
    blamed = f" ({escape(', '.join(row['culprits']))})" if row["culprits"] else ""
    return f"[yellow]round {row['round']} missed: {escape(row['reason'])}{blamed}[/]"


def _finished(row: Mapping[str, Any]) -> str:
    where = f", it lies in {escape(row['path'])}" if row["path"] else ""
    return f"[bold green]the run is over[/]: adapter {row['digest'][:8]}{where}"


_TELLERS = {
    "joined": _joined,
    "opened": lambda row: f"the door of run [bold]{row['run']}[/] is open",
    "working": lambda row: escape(row["doing"]),
    "shard_claimed": lambda row: (
        f"training on part {row['shard'] + 1} of {row['shards']}: {row['rows']} rows"
    ),
    "round_committed": _committed,
    "round_missed": _missed,
    "caught_up": lambda row: (
        f"caught up to round {row['round']} from {escape(row['donor'])} in {row['seconds']:.1f} s"
    ),
    "evaluated": lambda row: (
        f"[cyan]round {row['round']}: held-out loss {row['loss']:.4f}[/] "
        f"({row['rows']} rows, {row['seconds']:.1f} s)"
    ),
    "evaluation_seen": lambda row: (
        f"[cyan]round {row['round']}: held-out loss {row['loss']:.4f}[/]"
    ),
    "checkpoint_saved": lambda row: f"saved {escape(row['path'])}",
    "trouble": lambda row: f"[yellow]{escape(row['what'])}[/]",
    "finished": _finished,
}
