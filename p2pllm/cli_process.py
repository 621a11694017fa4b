"""What a command does to its own process: log, screen, signals, ranks."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from p2pllm.config.peer import PeerConfig
    from p2pllm.events import Events
    from p2pllm.training.ranks import Ranks


@contextmanager
def as_ranks(count: int | None, peer: "PeerConfig") -> "Iterator[tuple[Ranks | None, PeerConfig]]":
    """Within it, this process is the peer's only one (None), or its rank 0. A launcher, and the
    ranks that only follow, end here."""
    from p2pllm.roles import launcher as launching

    if not launching.is_launched():
        wanted = launching.ranks_wanted(peer.launcher, count, peer.device)
        if wanted > 1:
            raise typer.Exit(launching.launch(wanted, sys.argv[1:]))
        yield None, peer
        return
    peer = launching.on_my_device(peer)
    with launching.my_ranks() as mine:
        if mine.rank:
            from p2pllm.roles.follower import follow

            follow(mine, peer)
            raise typer.Exit
        yield mine, peer


def console() -> "Console":
    from rich.console import Console

    return Console()


def events() -> "Events":
    from p2pllm.events import Events
    from p2pllm.ui import LineScreen

    screen = LineScreen(console())
    atexit.register(screen.close)  # however it ends, the shell's prompt gets a line of its own
    return Events(screen)


def until_interrupted() -> threading.Event:
    """Set at the first Ctrl+C (or SIGTERM); the second one ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return stop


def log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
    )
    # It looks for optional kernels when it is imported, and complains that they are not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
