"""The demo's one screen: what it knows of each peer, and how that is shown."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2pllm.charts import finite, loss_chart
from p2pllm.config.run import RunConfig
from p2pllm.ui import describe, join_line, pasted, safe, size

NOTABLE = ("joined", "round_missed", "evaluated", "trouble", "finished")
_FEWEST_EVENTS, _MOST_EVENTS = 3, 6  # lines
_LOWEST_CHART, _HIGHEST_CHART = 5, 12  # lines


@dataclass
class PeerLine:
    """One peer as the screen shows it."""

    role: str
    doing: str = "starting"
    progress: float | None = None  # of the local epoch
    round: int = 0  # whose adapter it holds
    loss: float | None = None
    speed: float = 0.0  # tokens per second
    sent: int = 0  # bytes, over all rounds
    received: int = 0
    digest: str = ""
    path: str | None = None
    is_finished: bool = False
    is_gone: bool = False


class DemoScreen:
    """Fed with the rows of the children's journals."""

    def __init__(self, run: RunConfig, console: Console) -> None:
        self.console = console
        self.peers: dict[str, PeerLine] = {}
        self.losses: list[tuple[int, float]] = []
        self.addresses: list[str] = []
        self._run, self._run_id = run, run.name
        self._began = time.monotonic()
        self._events: deque[str] = deque(maxlen=_MOST_EVENTS)
        self._averaged = -1  # the last round that anybody has averaged

    @property
    def is_success(self) -> bool:
        """The aggregator and a trainer finished, and all who did hold the same adapter."""
        finished = [peer for peer in self.peers.values() if peer.is_finished]
        roles = {peer.role for peer in finished}
        return len({peer.digest for peer in finished}) == 1 and len(roles) == 2

    # ---- what happened

    def expect(self, name: str, role: str) -> None:
        """A peer has been started."""
        self.peers[name] = PeerLine(role)

    def note(self, name: str, row: Mapping[str, Any]) -> None:
        """Take in one event of one peer."""
        peer = self.peers[name]
        self._take_in(peer, row)
        # For an aggregator, catching up is the way of following and nothing to tell.
        if row["event"] in NOTABLE or (row["event"] == "caught_up" and peer.role == "trainer"):
            self._say(name, describe(row))
        elif row["event"] == "round_committed" and row["round"] > self._averaged:
            self._averaged = row["round"]  # the others' lines would say the same
            averaged = safe(", ".join(sorted(row["peers"])))
            self._say("", f"[green]round {row['round']} averaged[/] by {averaged}")

    def _take_in(self, peer: PeerLine, row: Mapping[str, Any]) -> None:
        match row["event"]:
            case "opened":
                self.addresses, self._run_id = list(row["addresses"]), row["run"]
                peer.doing = "holding the door"
            case "joined":
                peer.doing = "joined, loading"
            case "working" if peer.role != "bootstrap":
                peer.doing = row["doing"]
            case "step_done":
                _step(peer, row)
            case "round_committed":
                _commit(peer, row)
            case "caught_up":
                peer.round, peer.digest = row["round"], row["digest"]
            case "evaluated":
                self.losses.append((row["round"], _number(row["loss"])))
                peer.doing = "following"
            case "finished":
                peer.doing, peer.progress, peer.is_finished = "finished", None, True
                peer.digest, peer.path = row["digest"], row["path"]

    def lose(self, name: str, status: int | None, last_words: Callable[[], str]) -> None:
        """A child has ended. When it was not its time yet, that is news."""
        peer = self.peers[name]
        if peer.is_gone:
            return
        peer.is_gone = True
        if not peer.is_finished:
            peer.doing, peer.progress, peer.speed = f"gone (status {status})", None, 0.0
            self._say(name, f"[red]ended too early, with status {status}[/]")
            for line in last_words().splitlines()[-2:]:
                self._say(name, f"[red]{safe(line.strip())}[/]")

    def _say(self, name: str, told: str) -> None:
        line = f"[dim]{self.clock}[/]  [bold]{safe(name):<10}[/]  {told}"
        self._events.append(line)
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)

    @property
    def clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02}"

    # ---- how it looks

    def render(self) -> RenderableType:
        """One full screen. The chart and the events share the lines that the rest leaves."""
        invitation = self._invitation()
        room = self.console.height - len(self.peers) - len(invitation) - 5
        chart_height = min(max(room - _MOST_EVENTS - 2, _LOWEST_CHART), _HIGHEST_CHART)
        shown = max(min(room - chart_height - 2, _MOST_EVENTS), _FEWEST_EVENTS)
        chart = loss_chart(
            self.losses, min(self.console.width, 100) - 2, chart_height, self._run.rounds
        )
        missing = chart_height - len(chart.splitlines())
        return Group(
            self._header(),
            Text(),
            self._table(),
            Text(),
            self._loss_title(),
            Text(chart + "\n" * missing, style="cyan", no_wrap=True),
            Text(),
            *[_one_line(line) for line in [*self._events][-shown:]],
            *[Text()] * (shown - len(self._events)),
            *invitation,
        )

    def _header(self) -> RenderableType:
        done = max((p.round for p in self.peers.values()), default=0)
        header = Table.grid(expand=True)
        header.add_column(no_wrap=True)
        header.add_column(justify="right", no_wrap=True)
        where = f"[bold]{done}[/] of {self._run.rounds} rounds  [bold]{self.clock}[/]"
        header.add_row(f"[bold cyan]p2pllm demo[/]  [dim]run {safe(self._run_id)}[/]", where)
        return header

    def _loss_title(self) -> Text:
        known = finite(self.losses)
        change = f"  {known[0][1]:.3f} → {known[-1][1]:.3f}" if len(known) > 1 else ""
        return Text.assemble(("held-out loss", "bold"), (change, "bold cyan"))

    def _invitation(self) -> list[RenderableType]:
        if not self.addresses:
            return []
        lines = pasted(join_line(self.addresses), self.console.width)
        hint = Text("another terminal can join:", style="dim")
        return [Text(), hint, *(Text(line, no_wrap=True) for line in lines)]

    def _table(self) -> Table:
        table = Table(expand=True, box=None, pad_edge=False, header_style="dim")
        table.add_column("peer", style="bold", no_wrap=True)
        table.add_column("role", no_wrap=True)
        table.add_column("doing", no_wrap=True, ratio=1)
        for column in ("round", "loss", "tok/s", "sent", "adapter"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, p in self.peers.items():
            style = "green" if p.is_finished else "red" if p.is_gone else ""
            table.add_row(
                safe(name),
                p.role,
                Text.assemble(bar(p.progress), (" ".join(p.doing.split()), style)),
                "" if p.role == "bootstrap" else str(p.round),
                "" if p.loss is None else f"{p.loss:.3f}",
                f"{p.speed:.0f}" if p.speed else "",
                size(p.sent) if p.sent else "",
                safe(p.digest[:8]),
            )
        return table


def bar(progress: float | None, width: int = 8) -> Text:
    """A short bar and a blank; nothing when there is no progress to show."""
    if progress is None:
        return Text()
    full = round(min(progress, 1.0) * width)
    return Text.assemble(("━" * full, "green"), ("─" * (width - full), "dim"), " ")


def _step(peer: PeerLine, row: Mapping[str, Any]) -> None:
    step, steps = row["step"], row["steps"]
    peer.loss, peer.speed = _number(row["loss"]), row["tokens_per_second"] or 0.0
    peer.progress = step / steps if steps else None
    peer.doing = f"training {step}/{steps}" if steps else f"training, step {step}"
    if step == steps:
        peer.doing = "averaging"


def _commit(peer: PeerLine, row: Mapping[str, Any]) -> None:
    peer.round, peer.digest = row["round"] + 1, row["digest"]
    peer.sent += row["bytes_sent"]
    peer.received += row["bytes_received"]
    peer.doing, peer.progress = "averaged", None


def _number(value: float | None) -> float:
    """Journals have null for a loss that was no number."""
    return float("nan") if value is None else value


def _one_line(markup: str) -> Text:
    line = Text.from_markup(markup, overflow="ellipsis")
    line.no_wrap = True
    return line
