"""Letters about training, memory and checkpoints."""

from p2pllm.errors.letter import P2PLLMError


class LossNotFinite(P2PLLMError):
    """Not one of the {steps} steps in the local epoch of round {round} had a finite loss.

    Usual causes: the learning rate is too high (training.learning_rate), or float16 is too narrow
    for this model (model.dtype: bfloat16). See how the loss went: p2pllm rounds
    """


class DeviceMemoryFull(P2PLLMError):
    """The device has too little memory for {rows} rows at once: {reason}.

    Take fewer rows at a time, which changes nothing for the run: --set micro_batch=auto
    or compute activations again instead of keeping them: --set gradient_checkpointing=true
    """


class RankLost(P2PLLMError):
    """One of this peer's processes has ended, and so must the others: {reason}

    If it said why, its words stand above. The swarm goes on; come back with the same command. With
    --launcher python one process is the whole peer.
    """


class DiskFull(P2PLLMError):
    """The disk that holds {folder} is full, so the checkpoint was not written. {last}

    Make room, then start again with the same command: the run goes on from there.
    """


class CheckpointFailed(P2PLLMError):
    """A checkpoint could not be written to {folder}: {reason}. {last}

    Check that the folder can be written to, or give another one with --output.
    """


class ForeignFolder(P2PLLMError):
    """{folder} holds checkpoints of another run.

    fingerprint there  {theirs}
    of this run        {ours}

    Give another folder with --output, or move the old one away first.
    """
