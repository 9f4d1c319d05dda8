"""A hub on this machine: describes models, resolves files by a redirect to a store on another host, serves ranges.

``faults`` maps what a request is for (``api``, or a file's name) to what happens at the 1st, 2nd, ... such request.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "org/tiny-model"
TOKEN = "hf_secretsecretsecret"


class FakeHub:
    """One model, from a folder; use it as a context manager."""

    def __init__(self, folder: Path, *, is_gated: bool = False) -> None:
        self.folder = folder
        self.is_gated = is_gated
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        """Kind (api, resolve or store), file, and range."""
        self.store_tokens: list[str | None] = []
        """What came as Authorization to the store."""
        self.released = threading.Event()
        self._hub = self._serve("127.0.0.1", "resolve")
        self._store = self._serve("127.0.0.2", "store")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    def files_asked(self, ending: str = ".safetensors") -> list[str]:
        """Names of files whose bytes were asked of the store."""
        return [file for kind, file, _ in self.requests if kind == "store" and file.endswith(ending)]

    def asked_bytes(self, ending: str = ".safetensors") -> int:
        """Bytes of all ranges that were asked of the store."""
        total = 0
        for kind, file, span in self.requests:
            if kind == "store" and file.endswith(ending) and span is not None:
                start, end = map(int, span.removeprefix("bytes=").split("-"))
                total += end + 1 - start
        return total

    def _serve(self, host: str, kind: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub._answer(self, kind)

        server = ThreadingHTTPServer((host, 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _answer(self, handler: BaseHTTPRequestHandler, kind: str) -> None:
        path = urllib.parse.urlparse(handler.path).path
        is_api = path.startswith("/api/models/")
        file = "api" if is_api else path.rpartition("/")[2]
        span = handler.headers.get("Range")
        token = handler.headers.get("Authorization")
        self.requests.append(("api" if is_api else kind, file, span))
        if kind == "store":
            self.store_tokens.append(token)
            self._send_range(handler, file, span)
            return
        fault = self._next_fault(f"resolve {file}" if f"resolve {file}" in self.faults else file if is_api else "")
        if fault:
            status, _, retry_after = fault.partition(" ")
            headers = {"Retry-After": retry_after} if retry_after else {}
            self._send(handler, int(status), b"no", headers)
        elif self.is_gated and token != f"Bearer {TOKEN}":
            self._send(handler, 403 if token else 401, b"gated", {})
        elif is_api:
            if not path.startswith(f"/api/models/{REPOSITORY}/revision/"):
                self._send(handler, 404, b"no such model", {})
                return
            self._send(handler, 200, json.dumps(self._description()).encode(), {})
        elif not (self.folder / file).is_file() or f"/resolve/{COMMIT}/" not in path:
            self._send(handler, 404, b"no such file", {})
        else:
            location = f"http://127.0.0.2:{self._store.server_port}/{file}?signature=topsecret"
            self._send(handler, 302, b"", {"Location": location, "X-Repo-Commit": COMMIT})

    def _description(self) -> dict[str, object]:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            is_large = path.suffix == ".safetensors"
            siblings.append({"rfilename": path.name, "size": len(data), **({"lfs": lfs} if is_large else {})})
        return {"sha": COMMIT, "siblings": siblings}

    def _send_range(self, handler: BaseHTTPRequestHandler, file: str, span: str | None) -> None:
        data = (self.folder / file).read_bytes()
        assert span is not None
        start, end = map(int, span.removeprefix("bytes=").split("-"))
        fault = self._next_fault(file)
        if fault == "no ranges":
            self._send(handler, 200, data, {})
            return
        if fault.isdecimal():
            self._send(handler, int(fault), b"", {})
            return
        piece = bytearray(data[start : end + 1])
        if fault == "flip":
            piece[-1] ^= 1
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        handler.send_header("Content-Length", str(len(piece)))
        handler.end_headers()
        if fault in ("breaks", "stalls"):
            handler.wfile.write(piece[: len(piece) // 2])
            handler.wfile.flush()
            if fault == "stalls":
                self.released.wait(20)
            handler.close_connection = True
            return
        handler.wfile.write(piece)

    def _next_fault(self, what: str) -> str:
        faults = self.faults.get(what, [])
        return faults.pop(0) if faults else ""

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
