"""The learning rate as a pure function of the position in the whole run."""

import math

from p2pllm.config.run import TrainingConfig


def learning_rate(training: TrainingConfig, rounds: int, position: float) -> float:
    """The learning rate at `position`, in rounds since the run's start, of a run of `rounds`.

    A peer that joins at round 7 therefore uses the same rate as those that have been there.
    """
    peak, warmup = training.learning_rate, training.warmup_rounds
    if position < warmup:
        return peak * max(position, 0.0) / warmup
    done = min(1.0, (position - warmup) / (rounds - warmup)) if rounds > warmup else 1.0
    match training.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - done)
        case "cosine":
            return peak * (1 + math.cos(math.pi * done)) / 2
