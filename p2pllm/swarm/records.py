"""The signed, expiring records in the DHT, and the check that every node makes on each of them.

A record is an envelope around one of the models below. The envelope is bound to its key, its
author and its end of life, so it can be neither forged, nor moved, nor replayed after it expired.
"""

import base64
from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2pllm.swarm.codec import Floats, decode, encode, encoded_size
from p2pllm.swarm.identity import Identity, is_signed_by
from p2pllm.swarm.manifest import Manifest
from p2pllm.swarm.network import PeerId

Role = Literal["bootstrap", "trainer", "aggregator"]
State = Literal["joining", "training", "ready", "following", "finished", "leaving"]

RUNS_KEY = "p2pllm/runs"  # subkey: run id; value: a packed Manifest
MAX_CLOCK_SKEW = 3.0  # seconds; hivemind's DHT refuses peers whose clocks differ by more


def progress_key(run_id: str) -> str:
    return f"p2pllm/{run_id}/progress"


def results_key(run_id: str) -> str:
    return f"p2pllm/{run_id}/results"


def designation_key(run_id: str) -> str:
    return f"p2pllm/{run_id}/designation"


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


R = TypeVar("R", bound=Record)


Shard = Annotated[int, Field(ge=0, lt=4096)]
Position = Annotated[int, Field(ge=0, lt=2**53)]


class Sketch(Record):
    """A member's part in the aggregation error of the round that made the adapter it holds, as the
    aggregator adds it up: numbers that mean nothing here, with one byte for each."""

    weight: float = Field(gt=0, le=1, allow_inf_nan=False)  # its share of the group's
    members: int = Field(ge=1, le=4096)  # of the group
    numbers: str = Field(max_length=1024)  # base64 of int8 blocks

    @classmethod
    def of(cls, weight: float, members: int, numbers: Floats) -> "Sketch":
        coded = base64.b64encode(encode(numbers, "int8")).decode()
        return cls(weight=weight, members=members, numbers=coded)

    def unpacked(self, size: int) -> Floats | None:
        """(size,) float32, perhaps not finite; None where it is something else."""
        try:
            frame = base64.b64decode(self.numbers, validate=True)
        except ValueError:
            return None
        return decode(frame, "int8") if len(frame) == encoded_size(size, "int8") else None


class Progress(Record):
    """What one peer says of itself. The swarm's view is derived from these and nothing else."""

    peer: PeerId = Field(max_length=64)
    name: str = Field(max_length=32)
    role: Role
    state: State
    round: int = Field(ge=0)
    digest: str = Field("", max_length=64)  # of the anchor it holds; empty: none yet
    base: str = Field("", max_length=64)  # hash of its base weights
    samples: int = Field(0, ge=0)  # processed in this run
    speed: float = Field(0.0, ge=0, allow_inf_nan=False)  # samples per second
    shards: tuple[Shard, ...] = Field((), max_length=64)  # the leased parts of the rows
    coverage: tuple[Position, ...] = Field((), max_length=4096)  # of the adapter it holds
    sketch: Sketch | None = None  # of the round that made the adapter it holds
    dialable: bool = True
    addresses: list[Annotated[str, Field(max_length=256)]] = Field([], max_length=4)  # multiaddrs
    expires: float = Field(0.0, allow_inf_nan=False)  # DHT time, seconds; set when it is signed


class Result(Record):
    """One evaluation by the designated aggregator."""

    round: int = Field(ge=0)
    digest: str = Field(max_length=64)
    loss: float
    rows: int = Field(ge=1)


class Designation(Record):
    """The owner's word on which peer is the run's aggregator rank. A later serial wins."""

    run_id: str = Field(max_length=64)
    aggregator: PeerId = Field(max_length=64)
    serial: int = Field(ge=1)


class Results(Record):
    """The aggregator's results so far, newest last."""

    results: list[Result] = Field(max_length=256)


def seal(identity: Identity, key: str, subkey: str, record: Record, expires: float) -> bytes:
    """The envelope of a record: msgpack [author, body, expires, signature]."""
    body = record.model_dump_json().encode()
    signature = identity.sign(_signed(key, subkey, body, expires))
    packed: bytes = msgpack.packb([identity.peer_id, body, expires, signature])
    return packed


def open_envelope(key: str, subkey: str, data: bytes) -> tuple[PeerId, bytes, float] | None:
    """(author, body, expires), or None when the signature does not cover exactly this record."""
    try:
        author, body, expires, signature = msgpack.unpackb(data)
        valid = isinstance(expires, float) and is_signed_by(
            author, _signed(key, subkey, body, expires), signature
        )
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    return (author, body, expires) if valid else None


def read(model: type[R], author: PeerId, key: str, subkey: str, data: bytes) -> R | None:
    """The record if `author` signed it and it has the model's form, else None."""
    opened = open_envelope(key, subkey, data)
    if opened is None or opened[0] != author:
        return None
    try:
        return model.model_validate_json(opened[1])
    except ValidationError:
        return None


def is_acceptable(key: str, subkey: Any, data: bytes, expires: float) -> bool:
    """The rule by which a DHT node stores and hands on a record: its author owns the subkey."""
    if not isinstance(subkey, str):
        return False
    if key == RUNS_KEY:  # self-certifying, hence anyone may renew it
        manifest = Manifest.unpack(data)
        return manifest is not None and manifest.run_id == subkey
    opened = open_envelope(key, subkey, data)
    if opened is None:
        return False
    author, _, signed_until = opened
    return author == subkey and expires <= signed_until + MAX_CLOCK_SKEW


def _signed(key: str, subkey: str, body: bytes, expires: float) -> bytes:
    packed: bytes = msgpack.packb(["p2pllm record", key, subkey, body, expires])
    return packed
