"""Whom this peer does not trust just now: who did not answer it, and who spoiled this round."""

from p2pllm.swarm.network import PeerId, loop_time

_SUSPICION = 30.0  # seconds for which a peer that did not answer is not asked to lead


class Suspicion:
    """Shared by the two halves of group forming."""

    def __init__(self) -> None:
        self.blamed: dict[PeerId, str] = {}  # left out of this round's further attempts, and why
        self._has_excused = False  # somebody, in this round
        self._until: dict[PeerId, float] = {}

    def suspect(self, peer: PeerId) -> None:
        """It did not answer: somebody else shall lead for a while."""
        self._until[peer] = loop_time() + _SUSPICION

    def clear(self, peer: PeerId) -> None:
        """It answers."""
        self._until.pop(peer, None)

    def blame(self, peer: PeerId, reason: str) -> None:
        """Leave a peer out of the next attempts at this round."""
        self.blamed[peer] = reason

    def excuse(self, peer: PeerId) -> None:
        """Let it take part once more. Once in a round: a line that stays broken is left out."""
        if not self._has_excused:
            self._has_excused = True
            self.blamed.pop(peer, None)

    def forgive(self) -> None:
        """The round is over."""
        self.blamed.clear()
        self._has_excused = False

    @property
    def suspects(self) -> set[PeerId]:
        """Who did not answer lately."""
        now = loop_time()
        return {peer for peer, until in self._until.items() if until > now}

    @property
    def not_to_lead(self) -> set[PeerId]:
        return self.suspects | set(self.blamed)
