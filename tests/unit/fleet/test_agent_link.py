from __future__ import annotations

import asyncio

from coordinator.fleet.agent_link import AgentLink
from plutino.types import AgentId
from protos import agents_pb2 as pb


def link(bound: int) -> AgentLink:
    return AgentLink(agent_id=AgentId("pi"), stream=1, outgoing=asyncio.Queue(bound), workers=set())


def waiting(of: AgentLink) -> list[pb.AgentCommand | None]:
    return [of.outgoing.get_nowait() for _ in range(of.outgoing.qsize())]


def test_link_ends_after_what_waits() -> None:
    async def test() -> None:
        pi, command = link(4), pb.AgentCommand()
        assert pi.send(command)
        pi.end()
        assert waiting(pi) == [command, None]

    asyncio.run(test())


def test_link_of_an_agent_that_does_not_read_is_ended_and_raises_nothing() -> None:
    async def test() -> None:
        pi, command = link(2), pb.AgentCommand()
        assert [pi.send(command) for _ in range(3)] == [True, True, False]
        pi.end()
        assert waiting(pi)[-1] is None

    asyncio.run(test())


def test_measurement_that_nobody_waits_for_any_more_is_let_go_on_at_once() -> None:
    async def test() -> None:
        pi, milestones = link(4), []
        reached = pb.AgentEvent(profile_reached=pb.ProfileReached(request_id="7", milestone=1))
        pi.on_milestones["7"] = lambda milestone, go_on: milestones.append((milestone, go_on))

        pi.take_answer(reached, "pi")
        assert waiting(pi) == []
        milestones[0][1](True)
        del pi.on_milestones["7"]
        pi.take_answer(reached, "pi")

        assert [(command.profile_go_on.milestone, command.profile_go_on.is_whole) for command in waiting(pi)] == [
            (1, True),
            (1, False),
        ]

    asyncio.run(test())
