"""What an agent does when asked which devices reach each other, and how quickly: it listens, and it dials."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from edge_node.network import DeviceNetwork
from plutino.doctor.burst import measure_link
from plutino.doctor.door import DOOR_S, KNOCK_TIMEOUT_S, Door, knock
from plutino.errors import PlutinoError
from plutino.security.identity import COORDINATOR, PeerName, Role
from plutino.security.interceptors import IsRevoked, nobody_is_revoked
from protos import agents_pb2

_MAX_AT_ONCE = 32
"""Doors and knocks in progress; a coordinator that asks for more is told so."""


class Reachability:
    """Doors and knocks of one agent. Use it on one event loop."""

    def __init__(
        self,
        report: Callable[[agents_pb2.AgentEvent], None],
        network: DeviceNetwork,
        is_revoked: IsRevoked = nobody_is_revoked,
    ) -> None:
        """``report`` gets the answers; doors are where the device's workers would listen, closed to the revoked.

        Raises:
            SecurityError: the device's identity cannot be read.
        """
        self._report = report
        self._network = network
        self._is_revoked = is_revoked
        self._credentials = network.credentials()
        self._tasks: set[asyncio.Task[None]] = set()

    def open_door(self, asked: agents_pb2.OpenDoor) -> None:
        """Begin to listen; the address is reported, and after a moment nobody listens any more."""
        if self._is_free():
            self._start(self._keep_door(asked))
        else:
            self._tell_door(asked, error=_TOO_MANY)

    def knock(self, asked: agents_pb2.Knock) -> None:
        """Begin to dial; whether somebody answered is reported."""
        if self._is_free():
            self._start(self._knock(asked))
        else:
            self._tell_knock(asked, error=_TOO_MANY)

    async def close(self) -> None:
        """Close all doors and give up all knocks."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def _is_free(self) -> bool:
        return len(self._tasks) < _MAX_AT_ONCE

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_door(self, asked: agents_pb2.OpenDoor) -> None:
        try:
            door = Door(
                self._network.listen_host,
                self._credentials,
                advertised_host=self._network.advertised_host,
                is_revoked=self._is_revoked,
            )
        except PlutinoError as error:
            self._tell_door(asked, error=str(error))
            return
        try:
            self._tell_door(asked, address=door.address)
            await asyncio.sleep(min(asked.seconds, DOOR_S))
        finally:
            door.close()

    async def _knock(self, asked: agents_pb2.Knock) -> None:
        timeout_s = min(asked.timeout_s or KNOCK_TIMEOUT_S, KNOCK_TIMEOUT_S)
        try:
            peer = PeerName(asked.node_id, Role.NODE) if asked.node_id else COORDINATOR
            if asked.measure:
                await self._measure(asked, peer)
                return
            seconds = await asyncio.to_thread(
                knock, asked.address, credentials=self._credentials, peer=peer, timeout_s=timeout_s
            )
        except PlutinoError as error:
            self._tell_knock(asked, error=str(error))
            return
        self._tell_knock(asked, seconds=seconds)

    async def _measure(self, asked: agents_pb2.Knock, peer: PeerName) -> None:
        figures = await asyncio.to_thread(measure_link, asked.address, credentials=self._credentials, peer=peer)
        knocked = agents_pb2.Knocked(
            request_id=asked.request_id,
            latency_s=figures.latency_s,
            up_bytes_per_s=figures.up_bytes_per_s,
            down_bytes_per_s=figures.down_bytes_per_s,
        )
        self._report(agents_pb2.AgentEvent(knocked=knocked))

    def _tell_door(self, asked: agents_pb2.OpenDoor, *, address: str = "", error: str = "") -> None:
        opened = agents_pb2.DoorOpened(request_id=asked.request_id, address=address, error=error)
        self._report(agents_pb2.AgentEvent(door_opened=opened))

    def _tell_knock(self, asked: agents_pb2.Knock, *, seconds: float = 0.0, error: str = "") -> None:
        knocked = agents_pb2.Knocked(request_id=asked.request_id, seconds=seconds, error=error)
        self._report(agents_pb2.AgentEvent(knocked=knocked))


_TOO_MANY = f"{_MAX_AT_ONCE} doors and knocks are in progress on this device already"
