"""What the demo tells when its run is over."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from p2pllm.charts import finite, loss_chart
from p2pllm.demo_screen import DemoScreen
from p2pllm.ui import safe, size

if TYPE_CHECKING:
    from p2pllm.roles.compare import Comparison

_WIDEST = 90  # characters of a chart


def report(screen: DemoScreen, folder: Path, picture: Path | None) -> RenderableType:
    """Losses, the adapter and where it lies, bytes, files."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    if known := finite(screen.losses):
        change = f"[bold]{known[0][1]:.3f} → {known[-1][1]:.3f}[/] in {known[-1][0]} rounds"
        facts.add_row("held-out loss", change)
    facts.add_row("adapter", _agreement(screen))
    path = screen.peers["aggregator"].path
    facts.add_row("lies in", _place(path) if path else "no folder: the aggregator wrote none")
    for name, p in screen.peers.items():
        if p.role == "trainer":
            facts.add_row(safe(name), f"sent {size(p.sent)}, received {size(p.received)}")
    facts.add_row("loss curve", _place(picture) if picture else "not written: is the disk full?")
    facts.add_row("everything", _place(folder))
    chart = loss_chart(screen.losses, min(screen.console.width - 4, _WIDEST), 12)
    title = f"[bold]the run is over after {screen.clock}[/]"
    style = "green" if screen.is_success else "red"
    shown = Text(chart, style="cyan", no_wrap=True)
    return Panel(Group(shown, Text(), facts), title=title, border_style=style)


def comparison(told: "Comparison") -> RenderableType:
    """The same held-out question, before and after."""
    title = f"Nobody trained on this question: [bold]{safe(told.question)}[/]"
    table = Table(title=title, title_style="", title_justify="left", expand=True)
    for column in ("the base model", "the tuned model", "the documentation"):
        table.add_column(column, ratio=1, overflow="fold")
    answers = (told.base, told.tuned, told.reference)
    table.add_row(*(safe(answer) or "[dim](nothing)[/]" for answer in answers))
    return table


def _agreement(screen: DemoScreen) -> str:
    """Whether those who finished hold the same adapter, bit by bit."""
    digests = {name: p.digest for name, p in screen.peers.items() if p.is_finished}
    if len(set(digests.values())) > 1:
        told = ", ".join(f"{name} {digest[:8]}" for name, digest in digests.items())
        return f"[red]the peers ended with different ones: {safe(told)}[/]"
    if not digests:
        return "[red]nobody finished[/]"
    same = next(iter(digests.values()))[:16]
    return safe(f"the same on {', '.join(digests)}: sha256 {same}…")


def _place(path: Path | str) -> str:
    """As short as it can be typed here."""
    inside = Path(path).is_relative_to(Path.cwd())
    return safe(Path(path).relative_to(Path.cwd()) if inside else path)
