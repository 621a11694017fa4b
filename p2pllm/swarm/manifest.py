"""The manifest: what all peers of a run agree on, signed by the run's owner.

Anyone may hand it on, nobody can change it: the run's id carries a hash over the owner's public
key and the configuration, so an id names exactly one manifest of one owner.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import msgpack
from pydantic import ValidationError

from p2pllm.config.run import RunConfig
from p2pllm.swarm.identity import Identity, is_signed_by
from p2pllm.swarm.network import PeerId

PROTOCOL = 1  # what peers must speak alike: the streams of a round and the records
_DOMAIN = b"p2pllm manifest\0"


@dataclass(frozen=True)
class Manifest:
    """One run, as its owner signed it."""

    run: RunConfig
    owner: PeerId
    signature: bytes

    @classmethod
    def found(cls, run: RunConfig, owner: Identity) -> "Manifest":
        return cls(run, owner.peer_id, owner.sign(_DOMAIN + _body(run)))

    @cached_property
    def fingerprint(self) -> str:
        return self.run.fingerprint

    @cached_property
    def run_id(self) -> str:
        """<name>-<10 hex digits>: safe in a DHT key, a path and a shell."""
        digest = hashlib.sha256(f"{PROTOCOL}\0{self.owner}\0{self.fingerprint}".encode())
        return f"{self.run.name}-{digest.hexdigest()[:10]}"

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(
            {"run": _body(self.run), "owner": self.owner, "signature": self.signature}
        )
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> "Manifest | None":
        """None when it is not a manifest that its owner signed."""
        try:
            fields = msgpack.unpackb(data)
            body, owner, signature = fields["run"], fields["owner"], fields["signature"]
            if not is_signed_by(owner, _DOMAIN + body, signature):
                return None
            run = RunConfig.model_validate_json(body)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException, ValidationError):
            return None
        return cls(run, owner, signature) if _body(run) == body else None


def _body(run: RunConfig) -> bytes:
    return json.dumps(run.model_dump(mode="json"), sort_keys=True).encode()
