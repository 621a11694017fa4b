"""When the group of a round closes, and with whom: decided from who has come and from the records
alone, without clock or network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from p2pllm.config.run import AveragingConfig
from p2pllm.coverage import shared_shards
from p2pllm.swarm.group import Member
from p2pllm.swarm.network import PeerId
from p2pllm.swarm.rounds import Anchor, SwarmView, expected_in, precedes

_ALONE = 120.0  # seconds for which one that nobody answers any more takes itself to be cut off
_HELLOS = 2  # unanswered in a row: it has gone


@dataclass(frozen=True)
class Attendance:
    """Who has come to the leader for one round, as it stands in one moment."""

    anchor: Anchor
    ready: tuple[Member, ...]
    seated: frozenset[PeerId]  # who has come, ready or not
    waited: float  # seconds since the first one was ready
    leader_trains: bool  # it is awaited itself, whatever the records say
    blamed: Mapping[PeerId, str]  # who spoiled this round, and why
    refused: Mapping[PeerId, str] = field(default_factory=dict)  # who could not be let in, and why
    silent: Mapping[PeerId, int] = field(default_factory=dict)  # unanswered hellos in a row
    before: frozenset[PeerId] = frozenset()  # who was in the group before this one

    def has_quorum(self, rules: AveragingConfig) -> bool:
        return len(self.ready) >= max(rules.min_peers, 1)

    def closes(self, view: SwarmView, rules: AveragingConfig, deadline: float) -> bool:
        """Whether everybody has come, or the deadline (seconds) is over, or the group is full."""
        is_full = len(self.ready) >= rules.max_group
        return is_full or self.waited >= deadline or not self.missing(view)

    def patience(self, view: SwarmView, had_company: bool, record_life: float) -> float:
        """How long, in seconds, the group does not close with those who are here. When most of the
        others, or all that we knew, fall silent at once, it is rather we who are cut off; what we
        then did alone would be lost when we are back."""
        if not view.peers:
            return _ALONE if had_company else 0.0
        ready = self._ready_peers
        alive = {p.peer for p in view.trainers if p.state in ("training", "ready")}
        away = (alive | self._leader(view)) - ready
        return record_life if len(away) > len(ready) else 0.0

    def missing(self, view: SwarmView) -> set[PeerId]:
        """Who is awaited: has come, or is expected, and is neither ready nor gone nor blamed. The
        record of one that has come may not be here yet."""
        expected = (expected_in(self.anchor, view) | self.seated) - self.gone(view)
        return {*(expected - self.blamed.keys()), *self._leader(view)} - self._ready_peers

    def gone(self, view: SwarmView) -> frozenset[PeerId]:
        """Who is expected, is not here and has left our hellos unanswered."""
        silent = {p for p, hellos in self.silent.items() if hellos >= _HELLOS}
        return (expected_in(self.anchor, view) & silent) - self.seated

    def members(self, most: int) -> list[Member]:
        """Who is in, at most so many."""
        return sorted(self.ready, key=lambda m: m.peer)[:most]

    def left_out(self, view: SwarmView, members: Sequence[Member]) -> dict[PeerId, str]:
        """Who takes part in the run but not in this group, and why."""
        return {
            **dict.fromkeys(self._vanished(view), "is no longer there"),
            **self._behind(view),
            **dict.fromkeys(self.missing(view), f"not ready after {self.waited:.1f} s"),
            **self.refused,
            **dict.fromkeys(self.gone(view), "does not answer"),
            **{m.peer: "the group was full" for m in self.ready if m not in members},
            **self.blamed,
        }

    def _vanished(self, view: SwarmView) -> frozenset[PeerId]:
        """Who was in the group before, and of whom not even a record is left."""
        return self.before - self._ready_peers - {p.peer for p in view.peers} - {view.me}

    def _behind(self, view: SwarmView) -> dict[PeerId, str]:
        """Who takes part in the run, but not from this adapter on."""
        return {
            p.peer: f"holds round {p.round}, not this adapter of round {self.anchor.round}"
            for p in view.trainers
            if p.state in ("training", "ready") and p.peer not in self.seated
            if Anchor(p.round, p.digest) != self.anchor
        }

    @property
    def _ready_peers(self) -> set[PeerId]:
        return {m.peer for m in self.ready}

    def _leader(self, view: SwarmView) -> set[PeerId]:
        return {view.me} if self.leader_trains else set()


def losers_of(member: Member, ready: Sequence[Member]) -> list[Member]:
    """Of two that trained on the same rows one takes part, so that no row counts twice: who has to
    go now that `member` is ready, itself perhaps."""
    rivals = [m for m in ready if m.peer != member.peer and shared_shards(m.spans, member.spans)]
    keeps = all(precedes(member.peer, rival.peer) for rival in rivals)
    return rivals if keeps else [member]
