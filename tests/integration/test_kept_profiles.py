"""A job of a shape that a device knows starts without measuring: a real coordinator and a real agent over real gRPC."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_node.agent import Agent, AgentConfig
from edge_node.state_dir import StateDir
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from protos import jobs_pb2
from tests.integration.agent_coordinator import pool_config, run
from tests.integration.stack import WAIT_S, People, ThreadCoordinator, make_spec, wait_until

GIB = 1 << 30


def num_measured(agent_dir: Path) -> int:
    return sum(log.read_text().count("measured\n") for log in (agent_dir / "logs").iterdir())


async def plan(tmp_path: Path, *trainings: dict[str, Any]) -> list[str]:
    """One life of a coordinator and of an agent, in which jobs are planned."""
    coordinator = await asyncio.to_thread(ThreadCoordinator, tmp_path / "state")
    try:
        config = AgentConfig(
            coordinator_address=coordinator.endpoints.devices_address,
            name="pi",
            pool=pool_config(memory_budget_bytes=2 * GIB),
        )
        agent = Agent(config, StateDir(tmp_path / "agent"))
        running = asyncio.create_task(agent.run())
        try:
            return await asyncio.to_thread(_plan, coordinator, tmp_path, trainings)
        finally:
            agent.end()
            await asyncio.wait_for(running, WAIT_S)
    finally:
        await asyncio.to_thread(coordinator.close)


def _plan(coordinator: ThreadCoordinator, tmp_path: Path, trainings: tuple[dict[str, Any], ...]) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join((SNIPS_DIR / "train.jsonl").read_text().splitlines()[:20]) + "\n")
    plans = []
    with closing(People(coordinator.endpoints.people_address)) as people:
        wait_until(lambda: any(device["state"] == "alive" for device in people.devices()), "the agent's joining")
        for training in trainings:
            spec = make_spec(TINY_LLAMA_DIR, rows, tmp_path / "out", training={"steps": 2, **training})
            request = jobs_pb2.PlanRequest(spec_json=spec.model_dump_json())
            plans.append(people.stub.Plan(request, timeout=WAIT_S).plan_json)
    return plans


def test_second_job_of_a_shape_is_planned_without_measuring_and_another_shape_is_measured(tmp_path: Path) -> None:
    async def test() -> None:
        first = await plan(tmp_path, {"micro_batch_size": 2})
        assert num_measured(tmp_path / "agent") == 1

        assert await plan(tmp_path, {"micro_batch_size": 2, "lr": 0.5}) == first
        assert num_measured(tmp_path / "agent") == 1

        await plan(tmp_path, {"micro_batch_size": 4})
        assert num_measured(tmp_path / "agent") == 2

    run(test())
