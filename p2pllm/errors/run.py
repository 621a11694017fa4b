"""Letters about entering a run, and looking back at one."""

from p2pllm.errors.letter import P2PLLMError


class NoRunFound(P2PLLMError):
    """The peers at these addresses know of no run:
    {peers}

    Perhaps its bootstrap peer has just been restarted: try again in a moment. To found a run:
    p2pllm bootstrap configs/RUN.yaml
    """


class SeveralRuns(P2PLLMError):
    """The swarm has several runs:
    {runs}

    Say which one: add --run ID
    """


class RunNotFound(P2PLLMError):
    """The swarm does not know a run called {wanted}. It has:
    {runs}

    Add --run ID with one of them.
    """


class BaseDiffers(P2PLLMError):
    """The base model {name} on this machine is not the one that the others train on.

    weights here:  {ours}
    weights there: {theirs}
    Averaging adapters of different bases would spoil both. Set model.revision in the run's YAML to
    one commit, or remove the model from this machine's cache and join again.
    """


class FolderForeign(P2PLLMError):
    """The folder {folder} belongs to another run than {run}.

    Nothing in it was touched. Write elsewhere: add --output FOLDER
    """


class OutputUnwritable(P2PLLMError):
    """Cannot write below {folder}: {reason}

    Choose another place: add --output FOLDER
    """


class NotDesignated(P2PLLMError):
    """The designated aggregator of this run is {aggregator}, and this peer is {me}.

    Evaluations count from one peer only. Join as a trainer instead (p2pllm join), or let the run's
    owner name this peer: p2pllm bootstrap RUN.yaml --aggregator {me}
    """


class NoInitialPeers(P2PLLMError):
    """No address of a peer was given, so there is no way into a swarm.

    Add --initial-peers ADDR, as the bootstrap peer prints it, or set P2PLLM_INITIAL_PEERS.
    """


class TrackerMissing(P2PLLMError):
    """The tracker {tracker} is asked for, but its package is not there: {reason}

    Install it with: pip install {tracker}
    or do without: --set trackers=[jsonl]
    """


class TrackerFailed(P2PLLMError):
    """The tracker {tracker} could not be started: {reason}

    For wandb, log in with: wandb login
    or keep its files on this machine: export WANDB_MODE=offline
    or do without any tracker: --set trackers=[jsonl]
    """


class LedgerMissing(P2PLLMError):
    """There is no ledger.jsonl in {place} or below it.

    A peer writes one into its folder, runs/<run>/<name>/. Name that folder: p2pllm rounds FOLDER
    """


class RoundUnknown(P2PLLMError):
    """The ledger says nothing about round {round}. It has rounds: {known}

    See them all: p2pllm rounds
    """
