"""A TCP proxy that can cut its connections or change bytes on their way."""

from __future__ import annotations

import contextlib
import socket
import threading


class TcpProxy:
    """Forwards connections to ``target`` (host:port) until it is closed."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._replacement: tuple[bytes, bytes] | None = None
        self.num_connections = 0
        self._start(self._accept)

    def cut(self) -> None:
        """Reset every connection; new ones are let through."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def replace_once(self, old: bytes, new: bytes) -> None:
        """Put ``new`` in the place of the next ``old`` that comes by in one piece."""
        with self._lock:
            self._replacement = (old, new)

    def close(self) -> None:
        """Stop listening and end all threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                return
            server.settimeout(None)
            with self._lock:
                self.num_connections += 1
                self._sockets += [client, server]
            self._start(self._pump, client, server)
            self._start(self._pump, server, client)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(self._changed(data))
        for connection in (source, sink):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _changed(self, data: bytes) -> bytes:
        with self._lock:
            if self._replacement is None or self._replacement[0] not in data:
                return data
            (old, new), self._replacement = self._replacement, None
        return data.replace(old, new, 1)
