"""The local ranks but the first: they do their share of each step, and know no swarm."""

from p2pllm.config.peer import PeerConfig
from p2pllm.config.run import RunConfig
from p2pllm.model.adapter import attach_adapter
from p2pllm.roles.entry import load_local_base
from p2pllm.training.learner import Learner
from p2pllm.training.ranks import Batch, Ranks
from p2pllm.training.source import ShardSource


def follow(ranks: Ranks, config: PeerConfig) -> None:
    """Returns when rank 0 ends well. Raises RankLost when it dies."""
    if (told := ranks.listen()) is None:
        return
    run = RunConfig.model_validate_json(told)
    base = load_local_base(run, config)
    adapter = attach_adapter(base, run.lora, run.seed, config.gradient_checkpointing)
    nothing = ShardSource([], [0], run.seed)  # its rows come from rank 0
    learner = Learner(adapter, nothing, run, config.micro_batch, ranks)
    for order in ranks.orders():
        match order:
            case Batch(step, rows):
                learner.follow(step, rows)
            case values:
                learner.adopt(values)
