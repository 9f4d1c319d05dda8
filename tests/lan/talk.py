"""One end of a TCP connection, for measuring what a test's LAN carries; run on a host: ``talk.py listen|send ...``."""

from __future__ import annotations

import socket
import sys
import time

_CHUNK = bytes(256 * 1024)


def main(what: str, host: str, num_bytes: str = "0") -> None:
    if what == "listen":
        with socket.create_server((host, 0)) as server:
            print(server.getsockname()[1], flush=True)
            server.settimeout(20)
            connection, _ = server.accept()
            with connection:
                connection.settimeout(20)
                while connection.recv(1 << 20):
                    pass
                connection.sendall(b"!")
        return
    address, _, port = host.partition(":")
    with socket.create_connection((address, int(port)), timeout=20) as connection:
        started_s = time.perf_counter()
        for _ in range(int(num_bytes) // len(_CHUNK)):
            connection.sendall(_CHUNK)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"!"
        print(time.perf_counter() - started_s, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
