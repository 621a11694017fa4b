"""The command line. It parses, and calls; heavy imports happen inside the commands, so that help
comes at once."""

import atexit
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from p2pllm import __version__
from p2pllm.cli_config import Settings, config_app
from p2pllm.cli_data import data_app

if TYPE_CHECKING:
    from rich.console import Console

    from p2pllm.config.peer import PeerConfig
    from p2pllm.events import Events
    from p2pllm.training.ranks import Ranks

app = typer.Typer(
    name="p2pllm",
    help="Fine-tune one language model together, peer to peer, with no central server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_app, name="config", rich_help_panel="Configuration")
app.add_typer(data_app, name="data", rich_help_panel="Configuration")

TRY, TAKE_PART, LOOK = "Try it", "Take part", "Look"

InitialPeers = Annotated[
    list[str],
    typer.Option(
        "--initial-peers",
        envvar="P2PLLM_INITIAL_PEERS",
        metavar="ADDR",
        help="Multiaddr of a peer of the swarm. Repeat it, or separate several by commas.",
    ),
]
RunId = Annotated[
    str | None,
    typer.Option("--run", envvar="P2PLLM_RUN", help="Which run, where the swarm has several."),
]
Name = Annotated[
    str | None,
    typer.Option(envvar="P2PLLM_NAME", help="How others see this peer. Default: the host name."),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option(
        envvar="P2PLLM_IDENTITY",
        help="Private key file; made when it does not exist. "
        "Default: <output>/identities/<name>.key",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(envvar="P2PLLM_OUTPUT", help="Where everything is written. Default: runs"),
]
HostMaddrs = Annotated[
    list[str], typer.Option(metavar="ADDR", help="Listen here. Default: a free port.")
]
AnnounceMaddrs = Annotated[
    list[str],
    typer.Option(metavar="ADDR", help="Tell others these addresses (port forwarding, NAT)."),
]
PeerFile = Annotated[
    Path | None, typer.Option("--config", envvar="P2PLLM_CONFIG", help="This peer's YAML file.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads for tensor work.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
LauncherName = Annotated[
    Literal["auto", "python", "torchrun"] | None,
    typer.Option(
        "--launcher",
        help="One process, or one for each GPU through torchrun; auto: where there are several.",
    ),
]
RankCount = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Processes of torchrun. Default: the GPUs.")
]
MicroBatch = Annotated[
    str | None, typer.Option(metavar="N|auto", help="Samples per forward pass; auto: what fits.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"p2pllm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=TRY)
def demo(
    run_file: Annotated[Path, typer.Argument(help="The run to found.")] = Path("configs/demo.yaml"),
    trainers: Annotated[int, typer.Option(min=1, max=26, help="How many trainers.")] = 3,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs"),
) -> None:
    """A whole swarm on this machine, watched live: bootstrap, trainers, aggregator.

    Example: p2pllm demo --trainers 2
    """
    _log(verbose=False)
    from p2pllm.demo import run_demo

    raise typer.Exit(run_demo(run_file, trainers, output, _console()))


@app.command(rich_help_panel=TRY)
def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run.")],
    trainers: Annotated[
        int, typer.Option(min=1, help="Do the work of so many trainers in each round.")
    ] = 1,
    name: Annotated[
        str | None, typer.Option(help="Its folder in that of the run. Default: train")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    micro_batch: MicroBatch = None,
    launcher: LauncherName = None,
    ranks: RankCount = None,
    output: Output = None,
    config: PeerFile = None,
    settings: Settings = [],
    verbose: Verbose = False,
) -> None:
    """Conventional training of a run: this machine alone, all rows, no network. The baseline.

    --set changes the run here. It goes on from its last checkpoint when it is started again.

    Example: p2pllm train configs/demo.yaml --trainers 3
    """
    _log(verbose)
    from p2pllm.config.load import load_peer, load_run

    run = load_run(run_file, settings)
    flags = _overrides(
        name=name,
        device=device,
        threads=threads,
        launcher=launcher,
        micro_batch=micro_batch,
        output=output,
    )
    peer = load_peer(config, flags)
    with _as_ranks(ranks, peer) as (mine, peer):
        stop, events = _until_interrupted(), _events()
        from p2pllm.roles import centralized  # slow to import

        centralized.train(centralized.as_one(run, trainers), peer, events, stop, mine)


@app.command(rich_help_panel=TAKE_PART)
def bootstrap(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run to found.")],
    host_maddrs: HostMaddrs = [],
    announce_maddrs: AnnounceMaddrs = [],
    initial_peers: InitialPeers = [],
    identity: IdentityFile = None,
    name: Name = None,
    output: Output = None,
    aggregator: Annotated[
        str | None,
        typer.Option(metavar="PEER_ID", help="Designate this aggregator, not the first to come."),
    ] = None,
    config: PeerFile = None,
    settings: Settings = [],
    verbose: Verbose = False,
) -> None:
    """Found a run, or re-open it, and hold the swarm's door. Listens on port 31337 by default.

    --set changes the run here. The same file and identity re-open the same run, so keep both.

    Example: p2pllm bootstrap configs/demo.yaml --host-maddrs /ip4/0.0.0.0/tcp/31337
    """
    _log(verbose)
    from p2pllm.config.load import load_peer, load_run
    from p2pllm.roles import bootstrap as role

    run = load_run(run_file, settings)
    fallback = [] if config else ["network.host_maddrs=[/ip4/0.0.0.0/tcp/31337]"]
    flags = _overrides(
        name=name or (None if config else "bootstrap"),
        identity=identity,
        output=output,
        network_initial_peers=_addresses(initial_peers),
        network_host_maddrs=host_maddrs,
        network_announce_maddrs=announce_maddrs,
    )
    peer = load_peer(config, [*fallback, *flags])
    role.bootstrap(run, peer, aggregator, _events(), _until_interrupted())


@app.command(rich_help_panel=TAKE_PART)
def join(
    initial_peers: InitialPeers = [],
    run: RunId = None,
    name: Name = None,
    data: Annotated[
        list[Path],
        typer.Option(help="Train on your own JSON/JSONL file, not on a part of the run's rows."),
    ] = [],
    device: Device = None,
    threads: Threads = None,
    micro_batch: MicroBatch = None,
    launcher: LauncherName = None,
    ranks: RankCount = None,
    identity: IdentityFile = None,
    output: Output = None,
    host_maddrs: HostMaddrs = [],
    announce_maddrs: AnnounceMaddrs = [],
    config: PeerFile = None,
    settings: Settings = [],
    verbose: Verbose = False,
) -> None:
    """Train with a swarm until its run is over. Leave at any time with Ctrl+C.

    Example: p2pllm join --initial-peers /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
    """
    _log(verbose)
    from p2pllm.roles.entry import seat_in_run

    flags = _overrides(
        run=run,
        name=name,
        data=data,
        device=device,
        threads=threads,
        launcher=launcher,
        micro_batch=micro_batch,
        identity=identity,
        output=output,
        network_initial_peers=_addresses(initial_peers),
        network_host_maddrs=host_maddrs,
        network_announce_maddrs=announce_maddrs,
    )
    peer = _joining(config, [*flags, *settings])
    with (
        _as_ranks(ranks, peer) as (mine, peer),
        seat_in_run(peer, "trainer", _events(), _until_interrupted()) as seat,
    ):
        from p2pllm.roles.trainer import prepare  # slow to import: be seen by the others first

        prepare(seat, mine).run()


@app.command(rich_help_panel=TAKE_PART)
def aggregate(
    initial_peers: InitialPeers = [],
    run: RunId = None,
    name: Name = None,
    device: Device = None,
    threads: Threads = None,
    identity: IdentityFile = None,
    output: Output = None,
    host_maddrs: HostMaddrs = [],
    announce_maddrs: AnnounceMaddrs = [],
    config: PeerFile = None,
    settings: Settings = [],
    verbose: Verbose = False,
) -> None:
    """Be the run's aggregator rank: evaluate and checkpoint each round, never train.

    Example: p2pllm aggregate --initial-peers /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
    """
    _log(verbose)
    from p2pllm.roles.entry import seat_in_run

    flags = _overrides(
        run=run,
        name=name or (None if config else "aggregator"),
        device=device,
        threads=threads,
        identity=identity,
        output=output,
        network_initial_peers=_addresses(initial_peers),
        network_host_maddrs=host_maddrs,
        network_announce_maddrs=announce_maddrs,
    )
    peer = _joining(config, [*flags, *settings])
    with seat_in_run(peer, "aggregator", _events(), _until_interrupted()) as seat:
        from p2pllm.roles.aggregator import prepare  # slow to import: be seen by the others first

        prepare(seat).run()


@app.command(rich_help_panel=LOOK)
def status(
    initial_peers: InitialPeers = [],
    run: RunId = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, live.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    verbose: Verbose = False,
) -> None:
    """Who is in a run, in which round, how fast, and the last evaluation.

    Example: p2pllm status --watch --initial-peers /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
    """
    _log(verbose)
    from p2pllm.roles.entry import choose_run, connect
    from p2pllm.swarm.identity import Identity
    from p2pllm.ui import status_json, status_table

    flags = _overrides(run=run, network_initial_peers=_addresses(initial_peers))
    config = _joining(None, [*flags, "network.client_only=true", "network.relay=false"])
    stop = _until_interrupted()
    swarm = connect(config, Identity.ephemeral(), stop)
    try:
        manifest = choose_run(swarm, config.run, config.network.initial_peers)
        console = _console()
        while True:
            view = swarm.observe(manifest)
            if as_json:
                typer.echo(json.dumps(status_json(view)))
            else:
                if watch:
                    console.clear()
                console.print(status_table(manifest.run_id, view, manifest.run.rounds))
            if not watch or stop.wait(2.0):
                return
    finally:
        swarm.close()


@app.command(rich_help_panel=LOOK)
def rounds(
    folder: Annotated[Path, typer.Argument(help="A peer's folder, or one above it.")] = Path(
        "runs"
    ),
) -> None:
    """What became of each round: who came, who did not and why, seconds and bytes.

    Example: p2pllm rounds runs/demo-1234567890/ann
    """
    from p2pllm.ledger import find_ledger, read_ledger
    from p2pllm.ui import rounds_table

    ledger = find_ledger(folder)
    _console().print(rounds_table(read_ledger(ledger)))
    typer.echo(f"from {ledger}")


@app.command(rich_help_panel=LOOK)
def explain(
    round: Annotated[int, typer.Argument(min=0, help="Which round.")],
    folder: Annotated[Path, typer.Argument(help="A peer's folder, or one above it.")] = Path(
        "runs"
    ),
) -> None:
    """The story of one round.

    Example: p2pllm explain 17
    """
    from p2pllm.ledger import find_ledger, read_ledger, story

    for line in story(read_ledger(find_ledger(folder)), round):
        typer.echo(line)


# ---- their parts


def _addresses(given: list[str]) -> list[str]:
    """Repeats, commas and quoted spaces all do."""
    return [address for text in given for address in re.split(r"[,\s]+", text) if address]


def _overrides(**flags: Any) -> list[str]:
    """Command-line flags as `key=value` settings, JSON being YAML; those not given are left out."""
    return [
        f"{key.replace('network_', 'network.')}={json.dumps(value, default=str)}"
        for key, value in flags.items()
        if value not in (None, [])
    ]


def _joining(file: Path | None, settings: list[str]) -> "PeerConfig":
    from p2pllm.config.load import load_peer
    from p2pllm.errors import NoInitialPeers

    config = load_peer(file, settings)
    if not config.network.initial_peers:
        raise NoInitialPeers
    return config


@contextmanager
def _as_ranks(count: int | None, peer: "PeerConfig") -> "Iterator[tuple[Ranks | None, PeerConfig]]":
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


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _events() -> "Events":
    from p2pllm.events import Events
    from p2pllm.ui import LineScreen

    screen = LineScreen(_console())
    atexit.register(screen.close)  # however it ends, the shell's prompt gets a line of its own
    return Events(screen)


def _until_interrupted() -> threading.Event:
    """Set at the first Ctrl+C (or SIGTERM); the second one ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return stop


def _log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
    )
    # It looks for optional kernels when it is imported, and complains that they are not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
