"""Who a peer is: an Ed25519 key in a file. Its public half is the libp2p peer id itself."""

import fcntl
import functools
import os
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pllm.errors import IdentityInUse, IdentityUnreadable
from p2pllm.swarm.network import PeerId

# libp2p's protobuf framing of an Ed25519 private key, and of a peer id that inlines a public key:
# https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
_PRIVATE_PREFIX = b"\x08\x01\x12\x40"
_REMEMBERED_SIZE = 4096  # bytes: a stranger must not fill our memory with large ones
_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"


class Identity:
    """A private key, and the exclusive right of this process to use its file."""

    def __init__(self, key: Ed25519PrivateKey, path: Path | None = None) -> None:
        self._key = key
        self.path = path
        self._lock: int | None = None
        self.peer_id: PeerId = base58.b58encode(
            _PEER_ID_PREFIX + key.public_key().public_bytes_raw()
        ).decode()

    @classmethod
    def ephemeral(cls) -> "Identity":
        """A key that is never written down."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def open(cls, path: Path) -> "Identity":
        """Read the key, or make one (mode 0600), and hold the file until `release` or exit.

        Raises IdentityUnreadable, and IdentityInUse when a live process holds it.
        """
        if not path.exists():
            _create(path)
        try:
            data = path.read_bytes()
        except OSError as problem:
            raise IdentityUnreadable(path=path, reason=problem.strerror) from problem
        if len(data) != 68 or not data.startswith(_PRIVATE_PREFIX):
            raise IdentityUnreadable(path=path, reason="it does not hold an Ed25519 libp2p key")
        path.chmod(0o600)
        identity = cls(Ed25519PrivateKey.from_private_bytes(data[4:36]), path)
        identity._hold()
        return identity

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _hold(self) -> None:
        assert self.path is not None
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise IdentityInUse(path=self.path, peer_id=self.peer_id) from None


def is_signed_by(author: PeerId, message: bytes, signature: bytes) -> bool:
    """Whether the owner of this peer id signed the message. Never raises on hostile input."""
    is_small = len(message) <= _REMEMBERED_SIZE
    return (_verified if is_small else _verified.__wrapped__)(author, message, signature)


@functools.lru_cache(maxsize=2048)  # a record is looked at many times while it lives
def _verified(author: PeerId, message: bytes, signature: bytes) -> bool:
    try:
        raw = base58.b58decode(author)
        if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
            return False
        Ed25519PublicKey.from_public_bytes(raw[6:]).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


def _create(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    data = _PRIVATE_PREFIX + key.private_bytes_raw() + key.public_key().public_bytes_raw()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Linked into place whole: a second process that starts at the same time sees all or nothing.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
