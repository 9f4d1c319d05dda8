"""Join tokens: what a person copies from the coordinator to a new device.

A token says where the coordinator is, what its authority's certificate must hash to, and a secret that lets one device
in. The hash lets the device check the coordinator before it sends the secret. The coordinator keeps the secret only as
a salted hash. The prefix is fixed, so that scanners for leaked secrets find tokens.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass

from plutino.errors import SecurityError

_PREFIX = "plutino1_"
_SECRET_BYTES = 32
_SALT_BYTES = 16
_MAX_TOKEN_CHARS = 4096
_MAX_ADDRESSES = 16
_TOKEN_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_TOKEN_TEXT = re.compile(_PREFIX + r"[A-Za-z0-9_-]+", re.ASCII)

DEFAULT_TTL_S = 15 * 60.0
LONGEST_TTL_S = 7 * 24 * 3600.0
MOST_USES = 1000


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a token says."""

    addresses: tuple[str, ...]
    """Where devices join, ``host:port``, best first."""
    fingerprint: bytes
    """sha256 of the authority's certificate."""
    token_id: str
    secret: bytes

    def __repr__(self) -> str:
        """Without the secret: this may end up in a log."""
        return f"JoinToken({self.token_id} at {', '.join(self.addresses)})"

    def encode(self) -> str:
        """The text to copy."""
        values = {
            "a": list(self.addresses),
            "f": _to_text(self.fingerprint),
            "i": self.token_id,
            "s": _to_text(self.secret),
        }
        return _PREFIX + _to_text(json.dumps(values, separators=(",", ":")).encode())

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """The token of a text.

        Raises:
            SecurityError: it is none, or not a whole one.
        """
        text = text.strip()
        if len(text) > _MAX_TOKEN_CHARS or not _TOKEN_TEXT.fullmatch(text):
            raise SecurityError(
                f"this is no join token; one begins with {_PREFIX} and comes from: plutino token create"
            )
        try:
            values = json.loads(_from_text(text.removeprefix(_PREFIX)))
            addresses = tuple(str(address) for address in values["a"])
            token = cls(addresses, _from_text(values["f"]), str(values["i"]), _from_text(values["s"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            # Without the cause: its text may hold a part of the secret.
            raise SecurityError("the join token is damaged; copy the whole of it, or make another one") from None
        if not 0 < len(addresses) <= _MAX_ADDRESSES or len(token.fingerprint) != 32 or len(token.secret) < 16:
            raise SecurityError("the join token is damaged; copy the whole of it, or make another one")
        if not _TOKEN_ID.fullmatch(token.token_id):
            raise SecurityError("the join token is damaged; copy the whole of it, or make another one")
        return token


def new_token_id() -> str:
    """A name for a token, which is no secret."""
    return secrets.token_hex(6)


def new_secret() -> bytes:
    """The secret of a token."""
    return secrets.token_bytes(_SECRET_BYTES)


def new_salt() -> bytes:
    """What keeps equal secrets from having equal hashes."""
    return secrets.token_bytes(_SALT_BYTES)


def hash_secret(salt: bytes, secret: bytes) -> bytes:
    """What the coordinator keeps of a secret; one round is enough for 256 random bits."""
    return hashlib.sha256(salt + secret).digest()


def is_secret(salt: bytes, hashed: bytes, secret: bytes) -> bool:
    """Whether this is the secret of the hash, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(hash_secret(salt, secret), hashed)


def hide_tokens(text: str) -> str:
    """The text with every token in it taken out, for logs and error messages."""
    return _TOKEN_TEXT.sub(_PREFIX + "(hidden)", text)


def _to_text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _from_text(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
