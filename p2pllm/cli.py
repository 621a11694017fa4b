"""The command line. It parses, and calls; heavy imports happen inside the commands, so that help
comes at once. Parameters that no command's body names are keys of the peer: `peer_from` reads them.
"""

from pathlib import Path
from typing import Annotated

import typer

from p2pllm import __version__
from p2pllm.cli_config import config_app
from p2pllm.cli_data import data_app
from p2pllm.cli_look import explain, rounds, status
from p2pllm.cli_options import (
    AnnounceMaddrs,
    Device,
    HostMaddrs,
    IdentityFile,
    InitialPeers,
    LauncherName,
    MicroBatch,
    Name,
    Output,
    PeerFile,
    RankCount,
    RunId,
    Settings,
    Threads,
    Verbose,
    peer_from,
    require_initial_peers,
)
from p2pllm.cli_process import as_ranks, console, events, log, until_interrupted

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
    log(verbose=False)
    from p2pllm.demo import run_demo

    raise typer.Exit(run_demo(run_file, trainers, output, console()))


@app.command(rich_help_panel=TRY)
def train(
    ctx: typer.Context,
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
    log(verbose)
    from p2pllm.config.load import load_run

    run = load_run(run_file, settings)
    peer = peer_from(ctx, config)
    with as_ranks(ranks, peer) as (mine, peer):
        stop, told = until_interrupted(), events()
        from p2pllm.roles import centralized  # slow to import

        centralized.train(centralized.as_one(run, trainers), peer, told, stop, mine)


@app.command(rich_help_panel=TAKE_PART)
def bootstrap(
    ctx: typer.Context,
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
    log(verbose)
    from p2pllm.config.load import load_run
    from p2pllm.roles import bootstrap as role

    run = load_run(run_file, settings)
    usual = ("name=bootstrap", "network.host_maddrs=[/ip4/0.0.0.0/tcp/31337]")
    peer = peer_from(ctx, config, usual)
    role.bootstrap(run, peer, aggregator, events(), until_interrupted())


@app.command(rich_help_panel=TAKE_PART)
def join(
    ctx: typer.Context,
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
    log(verbose)
    from p2pllm.roles.entry import seat_in_run

    peer = peer_from(ctx, config, settings=settings)
    require_initial_peers(peer)
    with (
        as_ranks(ranks, peer) as (mine, peer),
        seat_in_run(peer, "trainer", events(), until_interrupted()) as seat,
    ):
        from p2pllm.roles.trainer import prepare  # slow to import: be seen by the others first

        prepare(seat, mine).run()


@app.command(rich_help_panel=TAKE_PART)
def aggregate(
    ctx: typer.Context,
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
    log(verbose)
    from p2pllm.roles.entry import seat_in_run

    peer = peer_from(ctx, config, ["name=aggregator"], settings)
    require_initial_peers(peer)
    with seat_in_run(peer, "aggregator", events(), until_interrupted()) as seat:
        from p2pllm.roles.aggregator import prepare  # slow to import: be seen by the others first

        prepare(seat).run()


for command in (status, rounds, explain):
    app.command(rich_help_panel=LOOK)(command)
