"""What a light peer is told when it starts. `light_peer.py` itself takes long to load."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Orders:
    """What a light peer is told when it starts."""

    name: str
    folder: Path  # of the whole test; the peer writes below <folder>/<name>/
    initial_peers: tuple[str, ...] = ()  # none: it founds the run, as the bootstrap peer
    role: str = "trainer"  # or "aggregator"
    host: str = "/ip4/127.0.0.1/tcp/0"
    client_only: bool = False
    namespace: str = ""  # of the network; empty: the machine's own
    holds: tuple[str, ...] = ()  # where it stands still while a gate is there: "reducing:2"
    size: int = 2_500_000  # values of the adapter: 10 MB
    step: float = 1e-3  # what it adds in a local epoch
    epoch: float = 0.5  # seconds; 0.4 once the file `hurry` is there
    steps: int = 1  # in a local epoch, after that
    pause: float = 0.0  # seconds for each of them
    rounds: int = 6
    by_line: bool = False  # parts follow the lines; a busy machine's noise would make them any size
    averaging: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def gate(self, hold: str) -> Path:
        return self.folder / f"{self.name}-{hold.replace(':', '-')}.gate"

    @property
    def lie(self) -> Path:
        """Once this file is there, the peer tells the lie that is named in it (liars.py)."""
        return self.folder / f"{self.name}.lie"

    @property
    def hurry(self) -> Path:
        return self.folder / "hurry"


def obey(orders: Orders) -> None:
    """The first call of a light peer's process."""
    from tests.faults.light_peer import live

    live(orders)
