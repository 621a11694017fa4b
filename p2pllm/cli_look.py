"""The commands that look at a run: p2pllm status, rounds, explain."""

import json
from pathlib import Path
from typing import Annotated

import typer

from p2pllm.cli_options import InitialPeers, RunId, Verbose, peer_from, require_initial_peers
from p2pllm.cli_process import console, log, until_interrupted


def status(
    ctx: typer.Context,
    initial_peers: InitialPeers = [],
    run: RunId = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, live.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    verbose: Verbose = False,
) -> None:
    """Who is in a run, in which round, how fast, and the last evaluation.

    Example: p2pllm status --watch --initial-peers /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW...
    """
    log(verbose)
    from p2pllm.roles.entry import choose_run, connect
    from p2pllm.swarm.identity import Identity
    from p2pllm.ui import status_json, status_table

    unseen = ("network.client_only=true", "network.relay=false")
    config = peer_from(ctx, None, settings=unseen)
    require_initial_peers(config)
    stop = until_interrupted()
    swarm = connect(config, Identity.ephemeral(), stop)
    try:
        manifest = choose_run(swarm, config.run, config.network.initial_peers)
        screen = console()
        while True:
            view = swarm.observe(manifest)
            if as_json:
                typer.echo(json.dumps(status_json(view)))
            else:
                if watch:
                    screen.clear()
                screen.print(status_table(manifest.run_id, view, manifest.run.rounds))
            if not watch or stop.wait(2.0):
                return
    finally:
        swarm.close()


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
    console().print(rounds_table(read_ledger(ledger)))
    typer.echo(f"from {ledger}")


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
