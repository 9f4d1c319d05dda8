"""An identity file as gRPC credentials: mutual TLS with whatever certificate is in the file now.

A channel keeps the certificate that it was built with for its life, so a renewed one counts for channels built after
it. A server asks for the present one at every handshake. Connections that are up outlive their certificates: TLS
looks at them once, when it shakes hands.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from plutino.errors import SecurityError
from plutino.security.identity import Identity

logger = logging.getLogger(__name__)


class Credentials:
    """The present content of an identity file. May be shared between threads.

    Args:
        path: a file of :meth:`plutino.security.identity.Identity.write`, which renewals replace.

    Raises:
        SecurityError: the file is missing, damaged, or may be read by other users.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._identity, self._stamp = Identity.read(path), _stamp(path)
        self._version = 1
        self._is_lost = False

    @property
    def version(self) -> int:
        """Rises with every renewal; whoever keeps a channel for long compares it to learn that it is out of date."""
        self.identity()
        return self._version

    def identity(self) -> Identity:
        """What the file holds now; what it held before where it cannot be read, which the next look mends."""
        with self._lock:
            try:
                stamp = _stamp(self.path)
                if stamp != self._stamp:
                    self._identity, self._stamp = Identity.read(self.path), stamp
                    self._version += 1
                self._is_lost = False
            except (OSError, SecurityError) as error:
                if not self._is_lost:
                    logger.warning("the identity of before goes on being used: %s", error)
                self._is_lost = True
            return self._identity

    def for_channel(self) -> grpc.ChannelCredentials:
        """Shows our certificate, and accepts servers of our authority alone."""
        identity = self.identity()
        return grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)

    def for_server(self, *, asks_certificate: bool = True) -> grpc.ServerCredentials:
        """Shows the certificate of the moment, and asks for one of our authority.

        Args:
            asks_certificate: False lets clients in that have none yet: those that want to join.
        """
        given = self.version

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            # gRPC asks at every handshake and swaps what it is given for what other threads' handshakes may be using:
            # swapped each time, fifty clients at once crash a server now and then (grpcio 1.85.1). None: as before.
            nonlocal given
            version = self.version
            if version == given:
                return None
            given = version
            return _configuration(self.identity())

        # The stubs do not know that None is an answer.
        fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], renewed)
        return grpc.dynamic_ssl_server_credentials(_configuration(self.identity()), fetch, asks_certificate)


class Newcomer:
    """Credentials of a device that has no certificate yet: it can only check whom it dials.

    Args:
        ca_pem: the authority that the join token vouches for.
    """

    version = 0

    def __init__(self, ca_pem: bytes) -> None:
        self._ca_pem = ca_pem

    def for_channel(self) -> grpc.ChannelCredentials:
        """Accepts servers of the authority alone."""
        return grpc.ssl_channel_credentials(self._ca_pem)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    # With the authority's certificate behind our own: a device that wants to join compares it with its token.
    chain = identity.certificate_pem + identity.ca_pem
    return grpc.ssl_server_certificate_configuration([(identity.key_pem, chain)], root_certificates=identity.ca_pem)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size
