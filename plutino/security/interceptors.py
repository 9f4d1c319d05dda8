"""The gate in front of every service: who calls is read from the certificate, what they may from the table of roles.

A server of credentials carries one gate (:class:`AioGate` or :class:`SyncGate`). TLS has already refused whoever has no
certificate of our authority; the gate refuses those whose role does not allow the method, whose name is revoked, and
every method that the table does not name. It also knows the calls that are up, so that a revoked member's end at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from plutino.errors import SecurityError
from plutino.security.identity import PeerName
from plutino.security.roles import METHOD_ROLES, OPEN_METHODS
from plutino.wire.status import abort_with, abort_with_aio

if TYPE_CHECKING:
    # Only the stubs know that these take parameters.
    _AioInterceptor = grpc.aio.ServerInterceptor[Any, Any]
    _SyncInterceptor = grpc.ServerInterceptor[Any, Any]
else:
    _AioInterceptor = grpc.aio.ServerInterceptor
    _SyncInterceptor = grpc.ServerInterceptor

logger = logging.getLogger(__name__)

IsRevoked = Callable[[PeerName], bool]
_TLS_VERSION = "TLSv1.3"

AuthContext = Mapping[str, Any]
"""What gRPC knows of a connection: lists of bytes, whatever its stubs say."""


def caller_of(auth_context: AuthContext) -> PeerName | None:
    """Whose certificate a call came with; None for a call without one.

    Raises:
        SecurityError: the certificate names nobody, or several.
    """
    names = [bytes(name).decode(errors="replace") for name in auth_context.get("x509_subject_alternative_name", ())]
    if not names:
        return None
    if len(names) > 1:
        raise SecurityError(f"a certificate must carry one name, this one has {len(names)}")
    return PeerName.parse(names[0])


def check_call(method: str, auth_context: AuthContext, is_revoked: IsRevoked) -> PeerName | None:
    """Whether a call may go on; returns who calls, None for an open method.

    Raises:
        SecurityError: it may not.
    """
    version = b"".join(auth_context.get("ssl_tls_version", ())).decode(errors="replace")
    if version != _TLS_VERSION:
        raise SecurityError(f"{method} was called over {version or 'a plain connection'}; only {_TLS_VERSION} is taken")
    if method in OPEN_METHODS:
        return None
    caller = caller_of(auth_context)
    if caller is None:
        raise SecurityError(f"{method} was called without a certificate; join with a token first: plutino token create")
    if is_revoked(caller):
        raise SecurityError(f"{caller} is revoked; it may join again with a new token: plutino token create")
    if caller.role not in METHOD_ROLES.get(method, frozenset()):
        raise SecurityError(f"a {caller.role.value} may not call {method}")
    return caller


def nobody_is_revoked(caller: PeerName) -> bool:
    """For servers whose peers are named one by one."""
    return False


class AioGate(_AioInterceptor):
    """The gate of a server on an event loop."""

    def __init__(self, is_revoked: IsRevoked) -> None:
        self._is_revoked = is_revoked
        self._calls: dict[asyncio.Task[Any], PeerName] = {}
        self._cut: set[asyncio.Task[Any]] = set()

    def cut(self, who: PeerName) -> int:
        """End all calls of a member, telling it why; returns how many there were."""
        tasks = {task for task, caller in self._calls.items() if caller == who}
        self._cut |= tasks
        for task in tasks:
            task.cancel()
        return len(tasks)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Put the gate before the method's handler."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # no such method; gRPC answers that itself
        return _rebuilt(handler, self._guarded(str(handler_call_details.method), _behaviour(handler)))

    def _guarded(self, method: str, behaviour: Any) -> Any:
        async def one(request: Any, context: Any) -> Any:
            async with self._admitted(method, context):
                return await behaviour(request, context)

        async def many(request: Any, context: Any) -> None:
            # The headers first: those of a first response whose sending a cut broke off would be sent again with the
            # status, which gRPC refuses.
            await context.send_initial_metadata(())
            async with self._admitted(method, context), aclosing(behaviour(request, context)) as responses:
                # Written here and not yielded: in a generator a cut would be missed while gRPC sends what it yielded.
                async for response in responses:
                    await context.write(response)

        return many if inspect.isasyncgenfunction(behaviour) else one

    @asynccontextmanager
    async def _admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        try:
            caller = check_call(method, context.auth_context(), self._is_revoked)
        except SecurityError as error:
            logger.warning("refused a call from %s: %s", context.peer(), error)
            await abort_with_aio(context, error)
        task = asyncio.current_task()
        if task is None or caller is None:
            yield
            return
        self._calls[task] = caller
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            # A call that is only cancelled here sends no status, and the other side would wait for ever.
            await abort_with_aio(context, SecurityError(f"{caller} is revoked; its call was ended"))
        finally:
            self._calls.pop(task, None)
            self._cut.discard(task)


class SyncGate(_SyncInterceptor):
    """The gate of a server with threads."""

    def __init__(self, is_revoked: IsRevoked) -> None:
        self._is_revoked = is_revoked
        self._calls: dict[int, tuple[PeerName, Any]] = {}
        self._lock = threading.Lock()

    def cut_revoked(self) -> None:
        """End the calls of members that were revoked since they began."""
        with self._lock:
            calls = list(self._calls.values())
        revoked = {caller for caller in {caller for caller, _ in calls} if self._is_revoked(caller)}
        for caller, context in calls:
            if caller in revoked:
                context.cancel()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Put the gate before the method's handler."""
        handler: Any = continuation(handler_call_details)
        if handler is None:
            return None
        return _rebuilt(handler, self._guarded(str(handler_call_details.method), _behaviour(handler)))

    def _guarded(self, method: str, behaviour: Any) -> Any:
        def guarded(request: Any, context: Any) -> Any:
            try:
                caller = check_call(method, context.auth_context(), self._is_revoked)
            except SecurityError as error:
                logger.warning("refused a call from %s: %s", context.peer(), error)
                abort_with(context, error)
            if caller is not None:
                self._count(caller, context)
            return behaviour(request, context)

        return guarded

    def _count(self, caller: PeerName, context: Any) -> None:
        with self._lock:
            self._calls[id(context)] = (caller, context)

        def forget() -> None:
            with self._lock:
                self._calls.pop(id(context), None)

        if not context.add_callback(forget):
            forget()


def _behaviour(handler: Any) -> Any:
    return next(
        behaviour
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        if (behaviour := getattr(handler, kind)) is not None
    )


def _rebuilt(handler: Any, behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
