"""Letters of the demo."""

from p2pllm.errors.letter import P2PLLMError


class DemoChildDied(P2PLLMError):
    """The demo's {name} ended too early. Its last words:

    {words}

    The whole log: {log}
    """


class DemoStalled(P2PLLMError):
    """Nothing has happened in the demo for {minutes} minutes, so it was ended.

    The peers' logs lie in {folder}. Start it again with: just demo
    """


class DemoTrainersGone(P2PLLMError):
    """All trainers of the demo ended before the run did. The last words of {name}:

    {words}

    The logs of all peers lie in {folder}
    """
