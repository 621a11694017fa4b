"""The records that belong to a run rather than to one peer: its manifest, which peer its owner
designated as the aggregator, and that one's results. Every peer reads them, and keeps those alive
that anybody may serve."""

from p2pllm.swarm.identity import Identity
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import Network, PeerId
from p2pllm.swarm.records import (
    RUNS_KEY,
    Designation,
    Results,
    designation_key,
    open_envelope,
    read,
    results_key,
    seal,
)

SHARED_LIFE = 120.0  # seconds: of what every peer renews (manifest, designation)
_RESULTS_LIFE = 3600.0  # seconds: results outlive their aggregator
_DESIGNATION_LIFE = 10 * 365 * 86400.0  # seconds: the owner's word holds as long as the run


class SharedRecords:
    """One run's, as one peer knows them."""

    def __init__(self, network: Network, identity: Identity, manifest: Manifest) -> None:
        self.results = Results(results=[])
        self._network, self._identity, self._manifest = network, identity, manifest
        self._designation: tuple[Designation, bytes] | None = None  # read, and as it was sealed

    @property
    def aggregator(self) -> PeerId | None:
        """As the owner designated it."""
        return self._designation[0].aggregator if self._designation else None

    async def read(self) -> None:
        """What cannot be read just now stays as it was."""
        run_id, owner = self._manifest.run_id, self._manifest.owner
        key = designation_key(run_id)
        for author, data in (await self._network.get(key)).items():
            word = read(Designation, owner, key, author, data)
            known = self._designation[0].serial if self._designation else 0
            if word is not None and word.run_id == run_id and word.serial >= known:
                self._designation = (word, data)
        if (aggregator := self.aggregator) is not None:
            key = results_key(run_id)
            data = (await self._network.get(key)).get(aggregator, b"")
            self.results = read(Results, aggregator, key, aggregator, data) or self.results

    async def renew(self) -> None:
        """Keep the manifest and the designation alive, and the results where they are our own."""
        until = self._network.now() + SHARED_LIFE
        await self._network.put(RUNS_KEY, self._manifest.run_id, self._manifest.pack(), until)
        if self._designation is not None:
            key, data = designation_key(self._manifest.run_id), self._designation[1]
            opened = open_envelope(key, self._manifest.owner, data)
            if opened is not None:
                await self._network.put(key, self._manifest.owner, data, min(until, opened[2]))
        if self.aggregator == self._network.me and self.results.results:
            await self.publish(self.results)

    async def designate(self, aggregator: PeerId, serial: int) -> None:
        """As the run's owner: name the aggregator rank."""
        word = Designation(run_id=self._manifest.run_id, aggregator=aggregator, serial=serial)
        until = self._network.now() + _DESIGNATION_LIFE
        key = designation_key(self._manifest.run_id)
        self._designation = (word, seal(self._identity, key, self._network.me, word, until))
        await self.renew()

    async def publish(self, results: Results) -> None:
        """As the aggregator: announce the evaluations so far."""
        self.results = results
        expires = self._network.now() + _RESULTS_LIFE
        key = results_key(self._manifest.run_id)
        sealed = seal(self._identity, key, self._network.me, results, expires)
        await self._network.put(key, self._network.me, sealed, expires)
