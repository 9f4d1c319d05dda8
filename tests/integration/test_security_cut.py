"""A revoked member's calls end with the reason, whatever the server was doing for them at that moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from plutino.security.certificates import LIFETIME_S, Authority
from plutino.security.identity import COORDINATOR, PeerName, Role
from plutino.security.interceptors import AioGate, nobody_is_revoked
from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, aio_channel, aio_server, bind
from protos import agents_pb2 as pb
from protos import agents_pb2_grpc

NODE = PeerName("1" * 16, Role.NODE)
CALL_S = 10.0
COMMAND = pb.AgentCommand(stop_worker=pb.StopWorker(reason="x" * 200_000))
"""Larger than what HTTP/2 lets a server send ahead: it is under way until the client reads."""


class CutInMidResponse(agents_pb2_grpc.AgentServiceServicer):
    """Cuts its caller off as soon as the server waits for a response, the one of that number, to be sent."""

    def __init__(self, gate: AioGate, cut_at: int) -> None:
        self._gate = gate
        self._cut_at = cut_at
        self.num_cut = 0
        self.has_ended = False

    async def Attach(self, request_iterator: object, context: object) -> AsyncIterator[pb.AgentCommand]:
        try:
            for number in range(self._cut_at + 1):
                if number == self._cut_at:
                    # Nothing between here and the sending gives way, so the loop runs this while the server sends.
                    asyncio.get_running_loop().call_soon(self._cut)
                yield COMMAND
            await asyncio.Event().wait()
        finally:
            self.has_ended = True

    def _cut(self) -> None:
        self.num_cut += self._gate.cut(NODE)
        # Again, while the first cut's status is sent.
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(self._gate.cut, NODE))


@pytest.mark.parametrize("cut_at", [0, 1])
def test_call_that_is_cut_while_a_response_is_sent_ends_with_the_reason(tmp_path: Path, cut_at: int) -> None:
    authority = Authority.open(tmp_path / "authority.pem")
    for name in (COORDINATOR, NODE):
        authority.identity(name, LIFETIME_S).write(tmp_path / f"{name.role.value}.pem")

    async def main() -> None:
        gate = AioGate(nobody_is_revoked)
        servicer = CutInMidResponse(gate, cut_at)
        server = aio_server(Lane.CONTROL, interceptors=[gate])
        agents_pb2_grpc.add_AgentServiceServicer_to_server(servicer, server)
        address = bind(server, "127.0.0.1:0", Credentials(tmp_path / f"{COORDINATOR.role.value}.pem"))
        await server.start()
        channel = aio_channel(address, Lane.CONTROL, Credentials(tmp_path / f"{NODE.role.value}.pem"))
        try:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                async for _ in agents_pb2_grpc.AgentServiceStub(channel).Attach(timeout=CALL_S):
                    pass
            assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "is revoked; its call was ended" in refusal.value.details()
            assert (servicer.num_cut, servicer.has_ended) == (1, True)
            assert gate.cut(NODE) == 0, "calls that are over are forgotten"
        finally:
            await channel.close()
            await server.stop(None)

    asyncio.run(main())
