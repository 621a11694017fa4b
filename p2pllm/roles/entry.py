"""What all roles do first: an identity, a connection, one run of those that the swarm knows, and a
folder of its own on disk."""

import os
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from p2pllm.config.load import show
from p2pllm.config.paths import folder_for, root_of
from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import RunConfig
from p2pllm.errors import (
    BaseDiffers,
    FolderForeign,
    NoRunFound,
    OutputUnwritable,
    RunNotFound,
    SeveralRuns,
)
from p2pllm.events import Events, Joined, Trouble, Working
from p2pllm.journal import Journal
from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import Timeouts
from p2pllm.swarm.records import Progress, Role, State
from p2pllm.swarm.rounds import SwarmView
from p2pllm.swarm.swarm import Swarm
from p2pllm.trackers import Tracked, open_trackers

if TYPE_CHECKING:
    from p2pllm.model.pretrained import Base

_PATIENCE = 15.0  # seconds for which a run may not have spread to us yet


@dataclass(frozen=True)
class Seat:
    """A peer's place in a run: everything that a role works with."""

    swarm: Swarm
    manifest: Manifest
    config: PeerConfig
    name: str
    folder: Path
    events: Events

    @property
    def stop(self) -> threading.Event:
        return self.swarm.stop


def peer_name(config: PeerConfig) -> str:
    """The configured name, or one made of the machine's."""
    return config.name or re.sub(r"[^a-zA-Z0-9-]+", "-", platform.node()).strip("-")[:32] or "peer"


def path_values(manifest: Manifest, config: PeerConfig) -> dict[str, object]:
    """What the placeholders in this peer's paths stand for."""
    return {
        "run_id": manifest.run_id,
        "run": manifest.run.name,
        "peer": peer_name(config),
        "shard": config.shard,
        "shards": manifest.run.data.shards,
    }


def open_identity(config: PeerConfig) -> Identity:
    """This peer's key, which is made at the first start. Raises IdentityInUse and others."""
    path = config.identity or root_of(config.output) / "identities" / f"{peer_name(config)}.key"
    try:
        return Identity.open(path)
    except OSError as problem:
        raise OutputUnwritable(folder=path.parent, reason=problem.strerror) from problem


def connect(config: PeerConfig, identity: Identity, stop: threading.Event) -> Swarm:
    """Open the network. Raises the letters of `HivemindNetwork.start`."""
    from p2pllm.swarm.hivemind_network import HivemindNetwork

    timeouts = Timeouts()
    return Swarm(
        identity,
        lambda: HivemindNetwork.start(identity, config.network, timeouts),
        timeouts,
        stop,
    )


def choose_run(swarm: Swarm, wanted: str | None, peers: tuple[str, ...]) -> Manifest:
    """The one run of the swarm, or the wanted one by its id or name.

    Raises NoRunFound, SeveralRuns and RunNotFound.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        runs = swarm.runs()
        matching = {
            run_id: manifest
            for run_id, manifest in runs.items()
            if wanted in (None, run_id, manifest.run.name)
        }
        if len(matching) == 1:
            return next(iter(matching.values()))
        if len(matching) > 1:
            raise SeveralRuns(runs=_listed(matching))
        if time.monotonic() > deadline or swarm.stop.wait(0.5):
            break
    if runs:
        raise RunNotFound(wanted=wanted, runs=_listed(runs))
    raise NoRunFound(peers="\n".join(peers))


@contextmanager
def seat_in_run(
    config: PeerConfig, role: Role, events: Events, stop: threading.Event
) -> Iterator[Seat]:
    """Join the run that the initial peers know, for as long as the block lasts.

    Raises letters (P2PLLMError) only, and KeyboardInterrupt when stopped before it is in.
    """
    swarm = connect(config, open_identity(config), stop)
    try:
        manifest = choose_run(swarm, config.run, config.network.initial_peers)
        with seated(swarm, manifest, config, role, events) as seat:
            yield seat
    finally:
        swarm.close()


@contextmanager
def seated(
    swarm: Swarm, manifest: Manifest, config: PeerConfig, role: Role, events: Events
) -> Iterator[Seat]:
    """Make the peer's folder, open its journal and enter the run.

    Raises FolderForeign, OutputUnwritable, TrackerMissing and TrackerFailed.
    """
    name = peer_name(config)
    folder = folder_for(config.output, path_values(manifest, config))
    seat = Seat(swarm, manifest, config, name, folder, events)
    _prepare_folder(seat)
    journal = Journal(seat.folder)
    agreed = manifest.run.model_dump(mode="json")
    tracking = open_trackers(config, Tracked(manifest.run_id, name, role, seat.folder, agreed))
    for subscriber in (journal, tracking):
        events.subscribe(subscriber)
    state: State = "following" if role == "bootstrap" else "joining"
    swarm.enter(
        manifest,
        Progress(
            peer=swarm.me,
            name=name,
            role=role,
            state=state,
            round=0,
            dialable=not config.network.client_only,
        ),
        on_trouble=lambda what: events.emit(Trouble(what=what)),
    )
    events.emit(
        Joined(
            role=role,
            run=manifest.run_id,
            peer=name,
            peer_id=swarm.me,
            fingerprint=manifest.fingerprint,
        )
    )
    try:
        yield seat
    finally:
        tracking.close()
        journal.close()


def load_base_model(seat: Seat) -> "Base":
    """The run's base model on this machine, which must be the one that the others train on.

    The manifest may pin its weights; where it does not, the majority of the peers counts.
    Raises BaseDiffers, and the letters of `load_base`.
    """
    run = seat.manifest.run
    working(seat, f"loading the base model {run.model.name or '(untrained)'}")
    base = load_local_base(run, seat.config)
    agree_on_base(seat, base)
    return base


def agree_on_base(seat: Seat, base: "Base") -> None:
    """Say which base we train on, if it is the others'. Raises BaseDiffers."""
    others = Counter(p.base for p in seat.swarm.view().peers if p.base and p.digest)
    if others:
        majority = others.most_common(1)[0][0]
        if base.weights_sha256 != majority:
            raise BaseDiffers(name=base.name, ours=base.weights_sha256, theirs=majority)
    seat.swarm.announce(base=base.weights_sha256)


def load_local_base(run: RunConfig, config: PeerConfig) -> "Base":
    """The run's base model as this peer wants it. Raises the letters of `load_base`."""
    import torch

    from p2pllm.model.pretrained import load_base

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return load_base(run.model, run.seed, config.device, config.attention)


def check_base(base: "Base", view: SwarmView) -> None:
    """Before the first average: peers that started together could not compare their bases then.

    The majority counts, and between equals the greater hash: somebody has to give way.
    Raises BaseDiffers.
    """
    votes = Counter(p.base for p in view.peers if p.base and p.state != "leaving")
    votes[base.weights_sha256] += 1
    chosen = max(votes, key=lambda weights: (votes[weights], weights))
    if chosen != base.weights_sha256:
        raise BaseDiffers(name=base.name, ours=base.weights_sha256, theirs=chosen)


def working(seat: Seat, doing: str) -> None:
    seat.events.emit(Working(doing=doing))


def linger(seat: Seat, is_served: Callable[[SwarmView], bool], longest: float) -> None:
    """Stay, as a donor, until the others have what they need of us; at most so many seconds."""
    deadline = time.monotonic() + longest
    while time.monotonic() < deadline and not is_served(seat.swarm.view()):
        if seat.stop.wait(0.5):
            return


def _prepare_folder(seat: Seat) -> None:
    path = seat.folder / "manifest.yaml"
    try:
        seat.folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and _fingerprint_line(seat.manifest) not in path.read_text():
            raise FolderForeign(folder=seat.folder, run=seat.manifest.run_id)
        _write(path, f"{_fingerprint_line(seat.manifest)}\n{show(seat.manifest.run)}")
        _write(seat.folder / "peer.yaml", show(seat.config))
    except OSError as problem:
        raise OutputUnwritable(folder=seat.folder, reason=problem.strerror) from problem


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def _fingerprint_line(manifest: Manifest) -> str:
    return f"# run {manifest.run_id}, fingerprint {manifest.fingerprint}, owner {manifest.owner}"


def _listed(runs: dict[str, Manifest]) -> str:
    return "\n".join(
        f"  {run_id}  {manifest.run.description}".rstrip()
        for run_id, manifest in sorted(runs.items())
    )
