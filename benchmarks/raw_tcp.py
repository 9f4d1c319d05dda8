"""The yardstick of weight transfers: one TCP connection that carries a file from memory, and nothing else.

Run as ``python -m benchmarks.raw_tcp FILE``: prints ``{"port": N}`` and sends the whole file to whoever connects, until
its standard input ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

_PIECE_BYTES = 1 << 20


def serve(path: Path) -> None:
    """Send the file to every connection, from memory."""
    data = path.read_bytes()
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(data)

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def receive(port: int, target: memoryview) -> None:
    """Fill the target from a connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        at = 0
        while at < len(target):
            count = connection.recv_into(target[at : at + _PIECE_BYTES])
            if not count:
                raise OSError(f"the connection ended after {at} of {len(target)} bytes")
            at += count


def receive_hashed(port: int, num_bytes: int, path: Path) -> str:
    """What a device must do at least: receive, hash and write to a file, in one thread; returns the sha256."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("wb", buffering=0) as file:
        left = num_bytes
        while left:
            count = connection.recv_into(buffer[: min(left, _PIECE_BYTES)])
            if not count:
                raise OSError(f"the connection ended, {left} bytes are missing")
            digest.update(buffer[:count])
            file.write(buffer[:count])
            left -= count
    return digest.hexdigest()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
    os._exit(0)
