"""Who somebody is on the wire, and the file that proves it.

A certificate carries one name, ``<name>.<role>.plutino``: for a device the node id that the coordinator gave it. Names
say who, never where, so that a device keeps its identity when its address changes, and whoever dials checks for the
name it means and not for an address.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from plutino.errors import SecurityError

_DOMAIN = "plutino"
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----\n.*?-----END \1-----\n", re.DOTALL)


class Role(str, Enum):
    """What the holder of a certificate is."""

    COORDINATOR = "coordinator"
    """The coordinator with its bulk process."""
    NODE = "node"
    """A device: its agent and its workers."""
    PERSON = "person"
    """The command line and programs of people."""
    RUNNER = "runner"
    """The runners of jobs, on the coordinator's side."""


@dataclass(frozen=True, slots=True)
class PeerName:
    """The name in a certificate."""

    name: str
    role: Role

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.name):
            raise SecurityError(
                f"{self.name[:80]!r} is no name for a certificate; it takes 1 to 63 lower-case letters, digits and '-'"
            )

    @property
    def dns(self) -> str:
        """As it stands in the certificate."""
        return f"{self.name}.{self.role.value}.{_DOMAIN}"

    @classmethod
    def parse(cls, dns: str) -> PeerName:
        """The name that a certificate carries.

        Raises:
            SecurityError: it is none of ours.
        """
        name, _, rest = dns.partition(".")
        role, _, domain = rest.partition(".")
        if domain != _DOMAIN or role not in {known.value for known in Role}:
            raise SecurityError(f"{dns[:200]!r} is not the name of a member of a plutino")
        return cls(name, Role(role))

    def __str__(self) -> str:
        return f"{self.role.value} {self.name}"


COORDINATOR = PeerName("coordinator", Role.COORDINATOR)
"""Whom everybody dials. There is one coordinator to a certificate authority, so its name needs no id."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key, the certificate for it, and the authority that signed that; all as PEM."""

    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:
        """Without the key: this may end up in a log."""
        return f"Identity({len(self.certificate_pem)} bytes of certificate)"

    @classmethod
    def read(cls, path: Path) -> Identity:
        """The identity of a file that :meth:`write` made.

        Raises:
            SecurityError: the file is missing, damaged, or may be read by other users.
        """
        try:
            mode = path.stat().st_mode
            content = path.read_bytes()
        except OSError as error:
            raise SecurityError(f"the identity {path} cannot be read ({error.strerror}); join again") from error
        if mode & 0o077:
            raise SecurityError(f"other users may read the private key in {path}; run: chmod 600 {path}")
        blocks = list(_PEM_BLOCK.finditer(content))
        if [block[1] for block in blocks] != [b"PRIVATE KEY", b"CERTIFICATE", b"CERTIFICATE"]:
            raise SecurityError(f"the identity {path} is damaged; remove it and join again")
        return cls(*(block[0] for block in blocks))

    def write(self, path: Path) -> None:
        """Replace the file at once, key and certificate together: a reader must never see halves of two identities."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, self.key_pem + self.certificate_pem + self.ca_pem)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, durably and by one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
