"""The teacher behind an endpoint, against a real HTTP server that misbehaves in every way that servers do."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coordinator.llm2llm.teachers.base import Ask, Turn
from coordinator.llm2llm.teachers.endpoint import Endpoint
from plutino.errors import ConfigError
from plutino.llm2llm import EndpointTeacher


class Server:
    """Answers with what ``replies`` holds, in turn; the last one for ever."""

    def __init__(self, *replies):
        self.requests = []
        self._replies = list(replies)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, self.headers.get("Authorization"), body))
                number = min(len(server.requests), len(server._replies)) - 1
                server._replies[number](self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self._thread.join(10)
        assert not self._thread.is_alive()


def says(status, body=b"", **headers):
    def reply(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def chat(text):
    return says(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def hangs_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def served():
    servers = []

    def start(*replies):
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def asks(num=1):
    return [Ask(str(i), (Turn("system", "rules"), Turn("user", f"question {i}")), "{}", 0) for i in range(num)]


def answered(server, num=1, waits=None, **changes):
    config = EndpointTeacher(url=server.url, model="m", **{"timeout_s": 5, "retries": 2, **changes})
    replies = {}

    async def take(ask, reply):
        replies[ask.key] = reply

    waited = [] if waits is None else waits
    asyncio.run(Endpoint(config, sleep=waited.append).answer(asks(num), take))
    return [replies[str(i)] for i in range(num)]


def test_endpoint_is_asked_as_chat_completions_are_and_its_key_is_sent_and_told_nowhere(served, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", "s3cret-key")
    server = served(chat("one"))
    replies = answered(server, num=5, api_key_env="SOME_KEY", temperature=0.5)
    assert [reply.text for reply in replies] == ["one"] * 5
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer s3cret-key")
    assert body["messages"][0] == {"role": "system", "content": "rules"} and body["temperature"] == 0.5
    assert "s3cret-key" not in caplog.text


def test_endpoint_without_its_key_is_refused_with_the_variables_name(served, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY"):
        answered(served(chat("never")), api_key_env="SOME_KEY")


def test_endpoint_waits_as_it_is_told_and_tries_again(served):
    waits = []
    server = served(says(429, Retry_After="7"), says(503), chat("at last"))
    assert answered(server, waits=waits)[0].text == "at last"
    assert waits == [7.0, 1.0]


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (says(429, Retry_After="soon"), "answered 429"),
        (says(500), "answered 500"),
        (hangs_up, "no answer"),
        (says(401), "answered 401"),
        (says(302, Location="http://127.0.0.1:9/elsewhere"), "answered 302"),
        (says(200, b"<html>"), "no chat completion"),
        (says(200, b'{"choices": []}'), "no chat completion"),
        (says(200, b'{"choices": [{"message": {"content": null}}]}'), "no text"),
        (says(200, b"x" * ((1 << 17) + 2)), "no answer"),
    ],
)
def test_endpoint_that_fails_gives_a_reply_with_the_reason(served, reply, told):
    found = answered(served(reply), retries=1)[0]
    assert found.text is None and told in found.error


def test_endpoint_that_dribbles_is_given_up_at_its_timeout(served):
    over = threading.Event()

    def dribbles(handler):
        handler.send_response(200)
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    server = served(dribbles)
    found = answered(server, retries=0, timeout_s=0.3)[0]
    over.set()
    assert found.text is None and "TimeoutError" in found.error
