"""The demo's one screen: what it knows of each peer, and how that is shown."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from p2pllm.charts import loss_chart
from p2pllm.config.run import RunConfig
from p2pllm.ui import describe, join_line, size

if TYPE_CHECKING:
    from p2pllm.roles.compare import Comparison

_NOTABLE = ("joined", "round_missed", "caught_up", "trouble", "finished")
_EVENTS_SHOWN = 5


@dataclass
class PeerLine:
    """One peer as the screen shows it."""

    role: str
    doing: str = "starting"
    round: int = 0
    loss: float | None = None
    speed: float = 0.0  # tokens per second
    sent: int = 0  # bytes, over all rounds
    digest: str = ""
    path: str | None = None
    is_finished: bool = False
    is_gone: bool = False


class DemoScreen:
    """Fed with the rows of the children's journals."""

    def __init__(self, run: RunConfig, console: Console) -> None:
        self.peers: dict[str, PeerLine] = {}
        self.losses: list[tuple[int, float]] = []
        self.address = ""
        self._run, self._console = run, console
        self._run_id = run.name
        self._began = time.monotonic()
        self._events: deque[str] = deque(maxlen=_EVENTS_SHOWN)

    # ---- what happened

    def note(self, name: str, role: str, row: Mapping[str, Any]) -> None:
        """Take in one event of one peer."""
        peer = self.peers.setdefault(name, PeerLine(role))
        told = describe(row)
        match row["event"]:
            case "opened":
                self.address, self._run_id = row["addresses"][0], row["run"]
                peer.doing = "holding the door"
            case "working" if role != "bootstrap":
                peer.doing = row["doing"]
            case "step_done":
                of = f"/{row['steps']}" if row["steps"] else ""
                peer.doing = f"training, step {row['step']}{of}"
                peer.loss, peer.speed = row["loss"], row["tokens_per_second"]
            case "round_committed":
                peer.round, peer.digest = row["round"] + 1, row["digest"]
                peer.sent += row["bytes_sent"]
                peer.doing = "averaged"
            case "caught_up":
                peer.round, peer.digest = row["round"], row["digest"]
            case "evaluated":
                self.losses.append((row["round"], row["loss"]))
                peer.doing, peer.loss = "following", row["loss"]
                self._say(name, told)
            case "finished":
                peer.doing, peer.is_finished = "finished", True
                peer.digest, peer.path = row["digest"], row["path"]
        if row["event"] in _NOTABLE:
            self._say(name, told)

    def lose(self, name: str, status: int) -> bool:
        """A child has ended; True when that was not its time yet, and is news."""
        peer = self.peers.setdefault(name, PeerLine("?"))
        if peer.is_finished or peer.is_gone:
            return False
        peer.is_gone, peer.doing = True, f"gone (exit status {status})"
        self._say(name, f"[red]ended too early, with status {status}; see its log[/]")
        return True

    def _say(self, name: str, told: str) -> None:
        line = f"[bold]{escape(name):>10}[/]  {told}"
        self._events.append(line)
        if not self._console.is_terminal:
            self._console.print(f"{self._clock()}{line}", highlight=False, soft_wrap=True)

    # ---- how it looks

    def render(self) -> RenderableType:
        latest = max((p.round for p in self.peers.values()), default=0)
        title = f"{self._run_id}: round {latest} of {self._run.rounds}, {self._clock()}"
        room = max(self._console.height - len(self.peers) - _EVENTS_SHOWN - 11, 4)
        chart = loss_chart(self.losses, self._console.width - 8, min(room, 10), self._run.rounds)
        parts: list[RenderableType] = [
            self._table(),
            Panel(chart, title="held-out loss", title_align="left", border_style="dim"),
            *(Text.from_markup(line, overflow="ellipsis", end="") for line in self._events),
        ]
        if self.address:
            parts.append(Text("\nanother terminal can join:", style="dim"))
            parts.append(Text(join_line([self.address]), overflow="fold"))
        return Panel(Group(*parts), title=f"[bold]{title}[/]", border_style="cyan")

    def _table(self) -> Table:
        table = Table(expand=True, box=None, pad_edge=False)
        for column in ("peer", "role", "doing"):
            table.add_column(column, style="bold" if column == "peer" else "", no_wrap=True)
        for column in ("round", "loss", "tok/s", "sent", "adapter"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, p in self.peers.items():
            trains = p.role == "trainer"
            table.add_row(
                name,
                p.role,
                Text(p.doing, style="red" if p.is_gone else "green" if p.is_finished else ""),
                "" if p.role == "bootstrap" else str(p.round),
                "" if p.loss is None else f"{p.loss:.3f}",
                f"{p.speed:.0f}" if trains and p.speed else "",
                size(p.sent) if trains else "",
                p.digest[:8],
            )
        return table

    def report(self, folder: Path, picture: Path) -> RenderableType:
        """What is left when the run is over."""
        losses = dict(self.losses)
        lines = [f"[bold green]The run is over[/] after {self._clock()}."]
        if losses:
            first, last = losses[min(losses)], losses[max(losses)]
            lines.append(
                f"held-out loss  [bold]{first:.3f} → {last:.3f}[/]  by round {max(losses)}"
            )
        digests = {p.digest for p in self.peers.values() if p.is_finished}
        if len(digests) == 1:
            lines.append(f"the adapter    {digests.pop()[:16]}…, the same on every peer")
        else:
            lines.append(f"[red]the peers ended with {len(digests)} different adapters[/]")
        for name, p in self.peers.items():
            if p.role == "trainer":
                lines.append(f"{name:<14} sent {size(p.sent)}")
            elif p.role == "aggregator" and p.path:
                lines.append(f"final adapter  {escape(p.path)}")
        lines.append(f"loss curve     {escape(str(picture))}")
        lines.append(f"all the files  {escape(str(folder))}")
        width = min(self._console.width - 6, 90)
        chart = loss_chart(self.losses, width, 12)
        text = Text.from_markup("\n".join(lines), overflow="fold")
        return Panel(Group(chart, Text(), text), title="result", border_style="green")

    def comparison(self, told: "Comparison") -> RenderableType:
        """The same held-out question, before and after."""
        table = Table(title=f"Held-out question: {told.question}", show_lines=True, expand=True)
        for column in ("the base model", "the tuned model", "the documentation"):
            table.add_column(column, ratio=1, overflow="fold")
        table.add_row(*(escape(a) or "(nothing)" for a in (told.base, told.tuned, told.reference)))
        return table

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02}"
