"""Who may speak for a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coordinator.services.workers import WorkerServicer
from plutino.security.identity import PeerName, Role
from plutino.types import AgentId
from plutino.wire.status import ERROR_METADATA_KEY
from protos import agents_pb2, workers_pb2

REF = agents_pb2.WorkerId(job_id="job-1", plan_epoch=3, stage_index=1)


class Aborted(Exception):
    pass


class Context:
    """A call with a certificate."""

    def __init__(self, node_id: str) -> None:
        self._caller = PeerName(node_id, Role.NODE)
        self.metadata: Any = ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_subject_alternative_name": [self._caller.dns.encode()]}

    async def abort(self, code: object, details: str, metadata: Any) -> None:
        self.metadata = metadata
        raise Aborted(details)


async def hello() -> AsyncIterator[workers_pb2.WorkerEvent]:
    yield workers_pb2.WorkerEvent(hello=workers_pb2.WorkerHello(worker=REF))


def answers(node_id: str, context: Context) -> list[workers_pb2.WorkerCommand]:
    """What a worker hears whose stage the plan puts on device ``owner``."""
    asked: list[str] = []

    def workers_of(job_id: str) -> None:
        asked.append(job_id)

    async def main() -> list[workers_pb2.WorkerCommand]:
        servicer = WorkerServicer(workers_of, lambda ref: AgentId("owner"))
        return [command async for command in servicer.Work(hello(), context)]

    try:
        return asyncio.run(main())
    finally:
        assert (asked == ["job-1"]) == (node_id == "owner"), "a stranger's stream must not reach the job"


def test_worker_of_the_device_in_the_plan_is_heard():
    (command,) = answers("owner", Context("owner"))

    assert command.HasField("finish")


def test_other_member_cannot_speak_for_a_worker_of_the_plan():
    context = Context("other")

    with pytest.raises(Aborted, match="runs on owner; node other cannot speak for it"):
        answers("other", context)
    assert (ERROR_METADATA_KEY, "SecurityError") in context.metadata
