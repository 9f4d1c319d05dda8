from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from plutino.errors import ConfigError, SecurityError
from plutino.wire.channel import Lane, aio_channel, aio_server, bind, sync_channel, sync_server

ECHO = grpc.method_handlers_generic_handler(
    "Echo", {"Say": grpc.unary_unary_rpc_method_handler(lambda request, context: request)}
)


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    executor = ThreadPoolExecutor(2)
    server = sync_server(Lane.CONTROL, executor)
    server.add_generic_rpc_handlers((ECHO,))
    yield server
    server.stop(None).wait(5)
    executor.shutdown()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.168.1.5:0", "example.org:0", "8.8.8.8:53"])
def test_bind_and_channel_beyond_loopback_are_refused(server: grpc.Server, address: str) -> None:
    with pytest.raises(SecurityError, match="not a loopback address"):
        bind(server, address)
    with pytest.raises(SecurityError, match="not a loopback address"):
        sync_channel(address, Lane.CONTROL)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:http", "::1:80", "127.0.0.1:70000"])
def test_address_that_is_not_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="write host:port"):
        sync_channel(address, Lane.CONTROL)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_bind_to_port_zero_returns_an_address_that_answers(server: grpc.Server, host: str) -> None:
    address = bind(server, f"{host}:0")
    server.start()

    with sync_channel(address, Lane.CONTROL) as channel:
        assert channel.unary_unary("/Echo/Say")(b"hello", timeout=5) == b"hello"


def test_bind_to_a_taken_port_is_an_error_not_a_second_listener(server: grpc.Server) -> None:
    address = bind(server, "127.0.0.1:0")
    server.start()
    with ThreadPoolExecutor(1) as executor, pytest.raises(ConfigError, match="in use"):
        bind(sync_server(Lane.CONTROL, executor), address)


def test_message_beyond_the_lane_is_refused_by_either_end(server: grpc.Server) -> None:
    address = bind(server, "127.0.0.1:0")
    server.start()
    too_long = bytes(Lane.CONTROL + 1)

    for lane in (Lane.CONTROL, Lane.DATA):
        with sync_channel(address, lane) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/Echo/Say")(too_long, timeout=5)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_aio_server_and_channel_speak_to_each_other() -> None:
    async def say_hello() -> bytes:
        server = aio_server(Lane.DATA)
        server.add_generic_rpc_handlers((ECHO,))
        address = bind(server, "127.0.0.1:0")
        await server.start()
        async with aio_channel(address, Lane.DATA) as channel:
            answer = await channel.unary_unary("/Echo/Say")(b"hello", timeout=5)
        await server.stop(None)
        return bytes(answer)

    assert asyncio.run(say_hello()) == b"hello"
