"""The bootstrap peer: founds a run or re-opens it, and holds the DHT's door at a stable address.

It needs no model, no data and no GPU. When it is away the run goes on; only newcomers then have to
name another peer.
"""

import json
import threading
from pathlib import Path

from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import RunConfig
from p2pllm.events import EvaluationSeen, Events, Opened, Working
from p2pllm.roles.entry import Seat, connect, open_identity, seated
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import PeerId
from p2pllm.swarm.rounds import SwarmView

_PAUSE = 1.0  # seconds between two looks at the swarm


class Bootstrap:
    """The owner's peer in its run. `run` ends when it is asked to stop."""

    def __init__(self, seat: Seat, aggregator: PeerId | None) -> None:
        """aggregator: name this peer as the aggregator rank; none: the first that comes."""
        self._seat, self._swarm = seat, seat.swarm
        self._word = _Designated(seat.folder / "aggregator.json")
        self._asked_for = aggregator
        self._seen: set[PeerId] = set()
        self._last_result = -1

    def run(self) -> None:
        if self._asked_for not in (None, self._word.aggregator):
            self._designate(str(self._asked_for))
        elif self._word.aggregator is not None:
            self._swarm.designate(self._word.aggregator, self._word.serial)
        self._seat.events.emit(
            Opened(run=self._seat.manifest.run_id, addresses=self._swarm.addresses())
        )
        while not self._seat.stop.wait(_PAUSE):
            view = self._swarm.view()
            self._welcome(view)
            if self._word.aggregator is None:
                waiting = [p.peer for p in view.peers if p.role == "aggregator"]
                if waiting:
                    self._designate(min(waiting))

    def _designate(self, peer: PeerId) -> None:
        self._word.write(peer, self._word.serial + 1)
        self._swarm.designate(peer, self._word.serial)

    def _welcome(self, view: SwarmView) -> None:
        """Tell whoever looks at the screen who comes, and how the run does."""
        for p in view.peers:
            if p.peer not in self._seen:
                self._seen.add(p.peer)
                self._seat.events.emit(Working(doing=f"{p.name} is here ({p.role})"))
        for result in view.results:
            if result.round > self._last_result:
                self._last_result = result.round
                self._seat.events.emit(EvaluationSeen(round=result.round, loss=result.loss))


class _Designated:
    """The owner's word on the aggregator rank, kept across restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.aggregator: PeerId | None = None
        self.serial = 0
        if path.exists():
            fields = json.loads(path.read_text())
            self.aggregator, self.serial = str(fields["aggregator"]), int(fields["serial"])

    def write(self, aggregator: PeerId, serial: int) -> None:
        self.aggregator, self.serial = aggregator, serial
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"aggregator": aggregator, "serial": serial}))
        draft.replace(self._path)


def bootstrap(
    run: RunConfig,
    config: PeerConfig,
    aggregator: PeerId | None,
    events: Events,
    stop: threading.Event,
) -> None:
    """The whole of `p2pllm bootstrap`. Raises letters (P2PLLMError) only."""
    identity = open_identity(config)
    manifest = Manifest.found(run, identity)
    swarm = connect(config, identity, stop)
    try:
        with seated(swarm, manifest, config, "bootstrap", events) as seat:
            Bootstrap(seat, aggregator).run()
    finally:
        swarm.close()
