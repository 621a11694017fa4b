"""A whole swarm on this machine: bootstrap, trainers and aggregator as processes of their own.

The demo is a spectator: the children are the same commands that anyone types, and all it knows of
them it reads in their metrics.jsonl.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live

from p2pllm.config.load import load_run
from p2pllm.config.run import RunConfig
from p2pllm.demo_screen import DemoScreen
from p2pllm.errors import DemoChildDied, DemoStalled
from p2pllm.journal import METRICS, follow

NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ida", "jim", "kim", "leo")
_POLL = 0.25  # seconds between two looks at the children
_STALLED = 600.0  # seconds without any news
_GOOD_BYE = (15.0, 5.0, 5.0)  # seconds after SIGINT, SIGTERM and SIGKILL


class Child:
    """One peer in its own process, and what it has told so far."""

    def __init__(self, name: str, role: str, arguments: list[str], folder: Path) -> None:
        self.name, self.role = name, role
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "p2pllm", *arguments, "--name", name]
        command += ["--output", str(folder), "--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("P2PLLM_")}
        if cache := os.environ.get("P2PLLM_CACHE"):
            environment["P2PLLM_CACHE"] = cache
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl+C is for the demo, which then tells its children
            )
        self._folder = folder
        self._rows: Iterator[list[dict[str, object]]] | None = None

    def news(self) -> list[dict[str, object]]:
        """The events since the last call."""
        if self._rows is None:
            found = list(self._folder.glob(f"*/{self.name}/{METRICS}"))
            if not found:
                return []
            self._rows = follow(found[0])
        return next(self._rows)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-8:])


def run_demo(run_file: Path, trainers: int, output: Path, console: Console) -> int:
    """Found the run, watch it to its end, and tell what came of it. Returns the exit status.

    Raises letters, among them DemoChildDied and DemoStalled.
    """
    run = load_run(run_file)
    _fetch_model(run, console)
    folder = (output / f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}").resolve()
    folder.mkdir(parents=True)
    screen = DemoScreen(run, console)
    with _interruptible(), _children() as start:
        live = Live(get_renderable=screen.render, console=console, refresh_per_second=4)
        with live if console.is_terminal else contextlib.nullcontext():
            _watch(run_file, trainers, folder, screen, start)
    _report(run, folder, screen, console)
    return 0


def _watch(
    run_file: Path,
    trainers: int,
    folder: Path,
    screen: DemoScreen,
    start: "Callable[[Child], Child]",
) -> None:
    """Start the peers in their order, and follow them until all have finished."""
    arguments = ["bootstrap", str(run_file), "--set", f"averaging.min_peers={min(trainers, 2)}"]
    bootstrap = start(Child("bootstrap", "bootstrap", arguments, folder))
    children = [bootstrap]
    heard = time.monotonic()
    while True:
        for child in children:
            for row in child.news():
                heard = time.monotonic()
                screen.note(child.name, child.role, row)
            is_lost = not child.is_running and screen.lose(child.name, child.process.returncode)
            if is_lost and child is bootstrap:
                raise DemoChildDied(name=child.name, log=child.log, words=child.last_words())
        if screen.address and len(children) == 1:
            joining = ["--initial-peers", screen.address, "--threads", "1"]
            children += [
                start(Child(name, "trainer", ["join", *joining], folder))
                for name in NAMES[:trainers]
            ]
            children += [start(Child("aggregator", "aggregator", ["aggregate", *joining], folder))]
        others = children[1:]
        if others and not any(child.is_running for child in others):
            _check_outcome(others, screen)
            return
        if time.monotonic() - heard > _STALLED:
            raise DemoStalled(minutes=f"{_STALLED / 60:.0f}", folder=folder)
        time.sleep(_POLL)


def _check_outcome(children: list[Child], screen: DemoScreen) -> None:
    for child in children:
        for row in child.news():
            screen.note(child.name, child.role, row)
    if not any(peer.is_finished for peer in screen.peers.values()):
        last = children[0]
        raise DemoChildDied(name=last.name, log=last.log, words=last.last_words())


@contextmanager
def _children() -> "Iterator[Callable[[Child], Child]]":
    """A registry of children; whatever happens, none outlives the block."""
    started: list[Child] = []

    def start(child: Child) -> Child:
        started.append(child)
        return child

    try:
        yield start
    finally:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
        for number, patience in zip(signals, _GOOD_BYE, strict=True):
            running = [child for child in started if child.is_running]
            for child in running:
                child.process.send_signal(number)
            deadline = time.monotonic() + patience
            for child in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(deadline - time.monotonic(), 0.01))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as cleanly as Ctrl+C; while it cleans up, neither disturbs it."""
    before = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, _frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before)


def _fetch_model(run: RunConfig, console: Console) -> None:
    """Once, before the children start, so that each finds the model in the cache."""
    with console.status("Making sure that the base model is here (fetched once, then cached)"):
        from p2pllm.model.pretrained import locate

        locate(run.model, run.seed)


def _report(run: RunConfig, folder: Path, screen: DemoScreen, console: Console) -> None:
    """What came of it: losses, files, equal digests, bytes, and an answer before and after."""
    from p2pllm.charts import save_loss_png

    picture = folder / "loss.png"
    save_loss_png(picture, screen.losses, f"{run.name}: held-out loss by round")
    console.print(screen.report(folder, picture))
    aggregator = screen.peers.get("aggregator")
    if aggregator is not None and aggregator.path:
        with console.status("Asking the base model and the tuned one the same question"):
            from p2pllm.roles.compare import compare

            told = compare(run, Path(aggregator.path))
        console.print(screen.comparison(told))
