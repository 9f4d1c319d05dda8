"""What runs inside Ray's worker processes. Each class is a shell around a function that knows nothing of Ray.

The classes are exported to Ray by name and imported by its workers from the same source tree, so importing this module
must stay cheap: each actor imports what it runs when it is asked to.
"""

from __future__ import annotations


class SchedulerActor:
    """Decides rounds of scheduling. It has no state: a restarted one answers like its predecessor."""

    def is_up(self) -> bool:
        """Answers once Ray has started the actor's process."""
        return True

    def solve(self, round_json: str) -> str:
        """See :func:`coordinator.scheduling.round.solve`; long searches are spread over Ray's free workers."""
        from coordinator.scheduling.ray_backend.search_tasks import RayFan
        from coordinator.scheduling.round import solve

        return solve(round_json, RayFan)


class RunnerActor:
    """Serves one job over a stream that it opens to the coordinator.

    After the death of its process Ray starts another one and calls :meth:`run` again, which dials again; a coordinator
    that has a newer incarnation by then sends it away.
    """

    def run(self, address: str, bulk_address: str, job_id: str, incarnation: int, identity: str | None = None) -> None:
        """See :func:`coordinator.jobs.runner_stream.run_job_runner`."""
        from pathlib import Path

        from coordinator.jobs.runner_stream import run_job_runner
        from coordinator.scheduling.ray_backend.token_tasks import RayTokenisation

        path = None if identity is None else Path(identity)
        run_job_runner(address, bulk_address, job_id, incarnation, identity=path, spread=RayTokenisation)


class AgentActor:
    """Keeps an agent on the node where Ray has placed it, as a process of its own. Two of its methods run at a time."""

    def __init__(self) -> None:
        from coordinator.scheduling.ray_backend.agent_process import AgentProcess

        self._process = AgentProcess()

    def node_id(self) -> str:
        """Where this is; answers only once Ray has placed the actor."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, token: str, arguments: list[str], module: str) -> str:
        """See :meth:`coordinator.scheduling.ray_backend.agent_process.AgentProcess.run`."""
        return self._process.run(token, arguments, module)

    def end(self) -> None:
        """See :meth:`coordinator.scheduling.ray_backend.agent_process.AgentProcess.end`."""
        self._process.end()
