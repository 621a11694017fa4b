"""Which half of the adapter a round trains, sends and averages: a pure function of the run's rule
and the round's number, so that all peers agree without a word.

The mean of products is not the product of means: averaging both A and B of B·A gives another update
than the mean of the peers' updates. Where all peers share one of the two, it is exact, and half as
many bytes travel.
"""

from p2pllm.config.run import LoraAveraging


def trained_part(rule: LoraAveraging, round: int, size_of_a: int, size: int) -> slice:
    """The values, as a slice of the flat adapter (all A's, then all B's), of round `round`.

    `freeze_a` is FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): every A keeps its first values.
    `alternate` is RoLoRA (Chen et al. 2024, arXiv 2409.02346): odd rounds train A, even ones B. B
    comes first: while it is zero, A has no gradient.
    """
    match rule:
        case "both":
            return slice(0, size)
        case "alternate" if round % 2:
            return slice(0, size_of_a)
        case "freeze_a" | "alternate":
            return slice(size_of_a, size)
