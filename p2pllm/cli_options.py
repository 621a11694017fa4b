"""The options that several commands share, and what they say about this peer."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from p2pllm.config.peer import PeerConfig

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
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration."),
]

# Options that are keys of PeerConfig, by the names of a command's parameters.
_KEYS = {
    "run": "run",
    "name": "name",
    "data": "data",
    "device": "device",
    "threads": "threads",
    "launcher": "launcher",
    "micro_batch": "micro_batch",
    "identity": "identity",
    "output": "output",
    "initial_peers": "network.initial_peers",
    "host_maddrs": "network.host_maddrs",
    "announce_maddrs": "network.announce_maddrs",
}


def peer_from(
    ctx: typer.Context,
    file: Path | None,
    fallback: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> "PeerConfig":
    """The peer as the command line describes it: the file, else `fallback`; the command's options,
    as far as they are in `_KEYS`; and `settings`. Of two that say different things the later one
    counts. `fallback` and `settings` are of the form `key=value`.

    Raises: the letters of `load_peer`.
    """
    from p2pllm.config.load import load_peer

    given = {key: ctx.params.get(name) for name, key in _KEYS.items()}
    given["network.initial_peers"] = addresses(given["network.initial_peers"] or [])
    flags = [  # JSON is YAML
        f"{key}={json.dumps(value, default=str)}"
        for key, value in given.items()
        if value not in (None, [], ())
    ]
    return load_peer(file, [*([] if file else fallback), *flags, *settings])


def require_initial_peers(peer: "PeerConfig") -> None:
    """Raises: NoInitialPeers."""
    from p2pllm.errors import NoInitialPeers

    if not peer.network.initial_peers:
        raise NoInitialPeers


def addresses(given: Sequence[str]) -> list[str]:
    """Repeats, commas and quoted spaces all do."""
    return [address for text in given for address in re.split(r"[,\s]+", text) if address]
