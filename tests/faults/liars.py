"""What a peer does that speaks the protocol and lies in it. More lies, in memory and with every
detail of what the others make of them, are in tests/test_adversaries.py."""

import dataclasses
from typing import Any

import numpy as np

from p2pllm.swarm.allreduce import AllReduce
from p2pllm.swarm.group import Member


def declared(lie: str, mine: Member) -> Member:
    """What it declares when it joins a group."""
    return dataclasses.replace(mine, weight=1e30) if lie == "weight" else mine


def corrupt(lie: str, attempt: AllReduce) -> None:
    """Change what it sends and gives back in one all-reduce."""
    encoded, give = attempt.work.encoded, attempt.work.pass_on
    if lie == "nan":
        attempt.work.encoded = lambda piece: _scaled(encoded(piece), np.nan)  # type: ignore[method-assign]
    elif lie == "garbage":

        def gives(at: int, average: Any) -> None:
            give(at, average and _scaled(average, 1000.0))

        attempt.work.pass_on = gives  # type: ignore[method-assign]


def _scaled(frame: bytes, by: float) -> bytes:
    """The same fp16 chunk with another scale in front."""
    return (np.frombuffer(frame[:4], "<f4") * np.float32(by)).tobytes() + frame[4:]
