from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from plutino.errors import (
    FrameError,
    PlutinoError,
    SecurityError,
    UnreachableError,
    WireError,
)
from plutino.wire.channel import Lane, aio_channel, aio_server, bind, sync_channel, sync_server
from plutino.wire.messages import Refusal, RefusedFrameError
from plutino.wire.status import MAX_DETAIL_BYTES, STATUS_CODES, abort_with, abort_with_aio, error_from_rpc

ERRORS = [error_class("5 GiB needed, 3 GiB offered — use nf4") for error_class in STATUS_CODES]


def error_tree(root: type[PlutinoError]) -> set[type[PlutinoError]]:
    own = {root} if root.__module__ == "plutino.errors" else set()
    return own.union(*(error_tree(child) for child in root.__subclasses__()))


class FailingServer:
    """Answers every call with the error it holds."""

    error: PlutinoError = PlutinoError()

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(2)
        self._server = sync_server(Lane.CONTROL, self._executor)
        handler = grpc.unary_unary_rpc_method_handler(self._fail)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Service", {"Call": handler}),))
        self.address = bind(self._server, "127.0.0.1:0")
        self._server.start()

    def _fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        abort_with(context, self.error)

    def close(self) -> None:
        self._server.stop(None).wait(5)
        self._executor.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[FailingServer]:
    server = FailingServer()
    yield server
    server.close()


def call(address: str, method: str = "/Service/Call") -> PlutinoError:
    with sync_channel(address, Lane.CONTROL) as channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary(method)(b"", timeout=5)
    return error_from_rpc(failed.value, address)


def test_status_table_has_every_error_of_the_tree_and_no_other() -> None:
    assert set(STATUS_CODES) == error_tree(PlutinoError)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_over_a_sync_call_keeps_its_class_and_text(server: FailingServer, error: PlutinoError) -> None:
    server.error = error

    received = call(server.address)

    assert type(received) is type(error)
    assert str(received) == str(error)


def test_errors_over_aio_calls_keep_their_class_and_text() -> None:
    errors = iter(ERRORS)

    async def fail(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await abort_with_aio(context, next(errors))

    async def call_all() -> list[PlutinoError]:
        server = aio_server(Lane.CONTROL)
        handler = grpc.unary_unary_rpc_method_handler(fail)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Service", {"Call": handler}),))
        address = bind(server, "127.0.0.1:0")
        await server.start()
        received = []
        async with aio_channel(address, Lane.CONTROL) as channel:
            for _ in ERRORS:
                with pytest.raises(grpc.RpcError) as failed:
                    await channel.unary_unary("/Service/Call")(b"", timeout=5)
                received.append(error_from_rpc(failed.value, address))
        await server.stop(None)
        return received

    received = asyncio.run(call_all())

    assert [(type(error), str(error)) for error in received] == [(type(error), str(error)) for error in ERRORS]


def test_error_of_a_class_outside_the_tree_arrives_as_its_nearest_known_one(server: FailingServer) -> None:
    server.error = RefusedFrameError(Refusal.CORRUPT, "does not match")

    assert type(call(server.address)) is FrameError


def test_error_with_a_very_long_text_arrives_cut(server: FailingServer) -> None:
    server.error = PlutinoError("ß" * 100_000)

    text = str(call(server.address))

    assert text.startswith("ß" * (MAX_DETAIL_BYTES // 2))
    assert text.endswith("(cut)")


def test_unreachable_address_is_named_with_the_way_out() -> None:
    error = call("127.0.0.1:1")

    assert type(error) is UnreachableError
    assert "127.0.0.1:1 does not answer" in str(error)
    assert "check that it is running" in str(error)


def test_unknown_call_speaks_of_versions(server: FailingServer) -> None:
    error = call(server.address, "/Service/Other")

    assert type(error) is WireError
    assert "same version" in str(error)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_status_of_another_program_becomes_an_error_that_names_the_address(code: grpc.StatusCode) -> None:
    class Failure(grpc.RpcError, grpc.Call):
        def code(self) -> grpc.StatusCode:
            return code

        def details(self) -> str:
            return "told so"

        def trailing_metadata(self) -> tuple[()]:
            return ()

        initial_metadata = is_active = time_remaining = cancel = add_callback = None

    error = error_from_rpc(Failure(), "10.0.0.1:5")

    assert "10.0.0.1:5" in str(error)
    assert "told so" in str(error)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        assert type(error) is SecurityError
