"""The agent's control stream: dialled by the agent, dialled again for ever.

An event given to :meth:`Attachment.report` reaches the coordinator at least once: it waits while there is no stream,
and what was sent within :data:`RESEND_S` seconds before a stream broke is sent again on the next one, after its hello.
Heartbeats are only ever about now and are not kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from plutino.errors import SecurityError, WireError
from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, aio_channel
from plutino.wire.status import error_from_rpc
from protos import agents_pb2, agents_pb2_grpc

logger = logging.getLogger(__name__)

RESEND_S = 5.0
"""Keepalive tells a dead peer from a live one within 4 s, so what was sent earlier than this had arrived."""

_WELCOME_TIMEOUT_S = 10.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 1.0
_CLOSE_S = 1.0


class Attachment:
    """One agent's connection to its coordinator. Make and use it on one running event loop."""

    def __init__(
        self,
        address: str,
        *,
        hello: Callable[[], agents_pb2.AgentHello],
        heartbeat: Callable[[], agents_pb2.Heartbeat],
        obey: Callable[[agents_pb2.AgentCommand], Awaitable[None]],
        credentials: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``hello`` and ``heartbeat`` are asked for the present state; ``obey`` gets every command but the welcome.

        Raises:
            ConfigError: the address is malformed.
            SecurityError: the address is not on loopback, and there are no credentials.
        """
        self._address = address
        self._hello = hello
        self._heartbeat = heartbeat
        self._obey = obey
        self._clock = clock
        self._credentials = credentials
        self._dial()
        self._waiting: deque[agents_pb2.AgentEvent] = deque()
        self._sent: deque[tuple[float, agents_pb2.AgentEvent]] = deque()
        self._wake = asyncio.Event()
        self._heartbeat_is_due = False
        self._heartbeat_every_s = 1.0
        self._is_attached = False
        self._is_closing = False
        self._last_reason = ""

    def report(self, event: agents_pb2.AgentEvent) -> None:
        """Send an event, as soon as there is a stream."""
        self._waiting.append(event)
        self._wake.set()

    async def run(self) -> None:
        """Attach, and attach again whenever the stream ends, until :meth:`close`.

        Raises:
            SecurityError: the coordinator shuts this device out.
        """
        backoff_s = _FIRST_BACKOFF_S
        while not self._is_closing:
            was_welcome, reason = await self._attach()
            if self._is_closing:
                return
            self._tell(was_welcome, reason)
            if was_welcome:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def close(self, running: asyncio.Task[None] | None) -> None:
        """Send what waits if there is a stream, end it in good order, and end the task that is in :meth:`run`."""
        self._is_closing = True
        self._wake.set()
        if running is not None:
            if self._is_attached:
                # The coordinator ends the call when it has read everything; a cancelled call may lose its last events.
                await asyncio.wait({running}, timeout=_CLOSE_S)
            running.cancel()
            await asyncio.wait({running})
        await self._channel.close(None)

    async def _attach(self) -> tuple[bool, str]:
        """Run one stream to its end; returns whether the coordinator took the agent in, and why the stream ended."""
        self._put_back_unsure()
        if self._credentials is not None and self._credentials.version != self._dialled_version:
            await self._channel.close(None)
            self._dial()
        call = self._stub.Attach(self._outgoing())
        beating: asyncio.Task[None] | None = None
        try:
            refused = await asyncio.wait_for(self._read_welcome(call), _WELCOME_TIMEOUT_S)
            if refused is not None:
                return False, refused
            self._is_attached = True
            logger.info("attached to the coordinator at %s", self._address)
            beating = asyncio.create_task(self._beat())
            while isinstance(command := await call.read(), agents_pb2.AgentCommand):
                await self._obey(command)
            return True, "it ended the stream"
        except grpc.aio.AioRpcError as error:
            translated = error_from_rpc(error, self._address)
            if isinstance(translated, SecurityError):
                raise translated from error
            return self._is_attached, str(translated)
        except asyncio.TimeoutError:
            return False, f"{self._address} did not answer within {_WELCOME_TIMEOUT_S:.0f} s"
        except WireError as error:
            return False, str(error)
        finally:
            self._is_attached = False
            if beating is not None:
                beating.cancel()
            call.cancel()

    def _dial(self) -> None:
        self._dialled_version = 0 if self._credentials is None else self._credentials.version
        self._channel = aio_channel(self._address, Lane.CONTROL, self._credentials)
        self._stub = agents_pb2_grpc.AgentServiceStub(self._channel)

    async def _read_welcome(
        self, call: grpc.aio.StreamStreamCall[agents_pb2.AgentEvent, agents_pb2.AgentCommand]
    ) -> str | None:
        command = await call.read()
        if not isinstance(command, agents_pb2.AgentCommand):
            return f"{self._address} ended the stream without a word"
        if not command.HasField("welcome"):
            raise WireError(
                f"{self._address} sent {command.WhichOneof('command')} before its welcome; is it a coordinator?"
            )
        if command.welcome.refused:
            return f"{self._address} refused this agent: {command.welcome.refused}"
        # A coordinator that names no period must not make the agent spin.
        self._heartbeat_every_s = command.welcome.heartbeat_every_s or self._heartbeat_every_s
        return None

    async def _outgoing(self) -> AsyncIterator[agents_pb2.AgentEvent]:
        yield agents_pb2.AgentEvent(hello=self._hello())
        while True:
            if self._waiting:
                event = self._waiting.popleft()
                self._sent.append((self._clock(), event))
                yield event
            elif self._is_closing:
                return
            elif self._heartbeat_is_due:
                self._heartbeat_is_due = False
                yield agents_pb2.AgentEvent(heartbeat=self._heartbeat())
            else:
                self._forget_sure()
                self._wake.clear()
                await self._wake.wait()

    async def _beat(self) -> None:
        while True:
            self._heartbeat_is_due = True
            self._wake.set()
            await asyncio.sleep(self._heartbeat_every_s)

    def _forget_sure(self) -> None:
        sure_before_s = self._clock() - RESEND_S
        while self._sent and self._sent[0][0] < sure_before_s:
            self._sent.popleft()

    def _put_back_unsure(self) -> None:
        self._waiting.extendleft(event for _, event in reversed(self._sent))
        self._sent.clear()

    def _tell(self, was_welcome: bool, reason: str) -> None:
        if was_welcome:
            logger.warning("lost the coordinator (%s); the workers go on, dialling again", reason)
        elif reason != self._last_reason:
            # Once a reason, not once an attempt: a coordinator may be away for a night.
            logger.warning("cannot attach yet: %s", reason)
        self._last_reason = "" if was_welcome else reason
