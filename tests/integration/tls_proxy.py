"""A man in the middle: ends TLS with a certificate of its own, or lets some connections through as they are."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from pathlib import Path

from plutino.security.identity import Identity


class TlsProxy:
    """Stands before ``target``; what clients say inside TLS is in :attr:`heard`.

    Args:
        target: the real ``host:port``.
        identity: what it shows; of an authority of its own.
        folder: for the identity's files, which ssl wants.
        num_passed: connections that are forwarded untouched before it steps in.
    """

    def __init__(self, target: str, identity: Identity, folder: Path, *, num_passed: int = 0) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        certificates, key = folder / "mitm.pem", folder / "mitm.key"
        certificates.write_bytes(identity.certificate_pem + identity.ca_pem)
        key.write_bytes(identity.key_pem)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates, key)
        self._context.set_alpn_protocols(["h2"])
        self._num_passed = num_passed
        self.heard = b""
        self.num_stepped_in = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Stop listening and end all threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.settimeout(5)
            self._num_passed -= 1
            work = self._forward if self._num_passed >= 0 else self._step_in
            thread = threading.Thread(target=work, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _step_in(self, client: socket.socket) -> None:
        self.num_stepped_in += 1
        with contextlib.suppress(OSError), self._context.wrap_socket(client, server_side=True) as tls:
            # As an HTTP/2 server does: its settings first.
            tls.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            while data := tls.recv(1 << 16):
                self.heard += data

    def _forward(self, client: socket.socket) -> None:
        with socket.create_connection(self._target, timeout=5) as server, client:
            pumps = [
                threading.Thread(target=_pump, args=ends, daemon=True) for ends in ((client, server), (server, client))
            ]
            for pump in pumps:
                pump.start()
            for pump in pumps:
                pump.join(10)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
