"""The aggregation error of a round, from what its members say of it in their records.

Records come one after the other, so it waits a little for all of them; and a round that is over
before all have come is reported from those that have.
"""

import statistics
import time

from p2pllm.events import AggregationMeasured, Events
from p2pllm.swarm.records import Sketch
from p2pllm.swarm.rounds import Anchor, SwarmView
from p2pllm.training.aggregation import SKETCH_SIZE, credible, estimated_error

_PATIENCE = 3.0  # seconds for the records of a round's members


class Sketches:
    """Of the round that made one anchor, and then of the next."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._anchor: Anchor | None = None
        self._said: dict[str, tuple[str, Sketch]] = {}  # by peer id: its name, and what it says
        self._until = 0.0  # by the monotonic clock
        self._is_open = False

    def are_complete(self, anchor: Anchor, view: SwarmView) -> bool:
        """Take in what the view has on this anchor. True once there is nothing to wait for: the
        error has been reported, or nobody says anything of it."""
        if anchor != self._anchor:
            was_overtaken = self._is_open and len(self._said) > 0
            self._report()
            self._anchor, self._said, self._is_open = anchor, {}, True
            # Where rounds are that short, to wait for each would leave no time to evaluate any.
            self._until = time.monotonic() + (0.0 if was_overtaken else _PATIENCE)
        if not self._is_open:
            return True
        for p in view.peers:
            if p.role == "trainer" and p.sketch is not None and Anchor(p.round, p.digest) == anchor:
                self._said[p.peer] = (p.name, p.sketch)
        if 0 < len(self._said) < self._members and time.monotonic() < self._until:
            return False
        self._report()
        return True

    @property
    def _members(self) -> int:
        """Of the round, as most of them say."""
        return statistics.median_low(s.members for _, s in self._said.values())

    def _report(self) -> None:
        """Once for each anchor, and only where two or more have told."""
        was_open, self._is_open = self._is_open, False
        if not was_open or self._anchor is None:
            return
        unpacked = {p: s.unpacked(SKETCH_SIZE) for p, (_, s) in self._said.items()}
        read = credible({p: values for p, values in unpacked.items() if values is not None})
        if len(read) < 2:
            return
        error = estimated_error(list(read.values()), [self._said[p][1].weight for p in read])
        self._events.emit(
            AggregationMeasured(
                round=self._anchor.round,
                error=error,
                peers=sorted(self._said[p][0] for p in read),
                members=max(self._members, len(read)),
            )
        )
