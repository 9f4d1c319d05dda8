from __future__ import annotations

import asyncio
import functools
import gc
import ipaddress
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.jobs.prepared import PreparedData
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.ray_backend import engine as engine_module
from coordinator.scheduling.ray_backend.cluster import EmbeddedCluster, JoinedCluster
from coordinator.scheduling.ray_backend.engine import RoundLostError
from coordinator.scheduling.ray_backend.fleet import RayFleet
from coordinator.scheduling.ray_backend.reaping import ProcessRecord, is_running, read_record
from coordinator.scheduling.ray_backend.search_tasks import RayFan
from coordinator.scheduling.ray_backend.token_tasks import RayTokenisation
from coordinator.scheduling.round import SchedulingAnswer, SchedulingRound
from partitioner import search as search_module
from partitioner.plan import Plan
from partitioner.spread import Fan, PartResult, SearchPart, in_turn
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.data.readers import read_rows
from plutino.data.tokenisation import Reading, tokenise
from plutino.data.tokenizer import load_tokenizer
from plutino.errors import ConfigError, PlutinoError, UnreachableError
from plutino.job.spec import parse_spec
from plutino.sizes import MIB
from plutino.types import JobId
from protos import runners_pb2 as pb
from tests.integration.ray_site import (
    INCARNATION,
    WAIT_S,
    RunnerStream,
    Site,
    actor_processes,
    is_forgotten,
    is_raylet_alive,
    kill_a_coordinators_ray,
    living_children,
    raylet_logs,
    record_of,
    start_second_node,
    until,
)
from tests.integration.reservation_load import ReservationLoad
from tests.unit.partitioner.fleet import SLOW_LAN, device, job, llama

# Ray starts twice in this module, once in a child; each takes 3 s on a quiet machine and 15 s on a busy one.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(150),
    # A start of Ray that fails drops its daemons without waiting for their end.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

SECOND_NODE_BYTES = 900 * MIB
SECOND_NODE_STARTS = 3
EMPTY_ROUND = SchedulingRound(queue=(), held=(), budgets_bytes={}).model_dump_json()


@pytest.fixture(scope="module")
def killed_coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ProcessRecord]]:
    """State of a coordinator that was killed while it had a Ray, and the record that it left."""
    state_dir = tmp_path_factory.mktemp("state")
    yield state_dir, kill_a_coordinators_ray(state_dir)


@pytest.fixture(scope="module")
def site(killed_coordinator: tuple[Path, ProcessRecord]) -> Iterator[Site]:
    site = Site(killed_coordinator[0])
    site.run(until(lambda: site.engine.is_scheduler_up))
    yield site
    site.close()


def snips_spec_json() -> str:
    values = {
        "model": {"path": str(TINY_LLAMA_DIR)},
        "data": {"train": str(SNIPS_DIR / "train.jsonl"), "limit": 12},
        "training": {"batch_size": 6, "epochs": 2},
    }
    return parse_spec(values, base_dir=Path("/")).model_dump_json()


def test_start_after_killed_coordinator_leaves_nothing_of_its_ray(
    killed_coordinator: tuple[Path, ProcessRecord], site: Site
) -> None:
    _, old = killed_coordinator

    assert {"gcs_server", "raylet"} <= {process.name for process in old.processes}
    assert not any(map(is_running, old.processes))
    assert not old.session_dir.exists()
    assert record_of(site).session_dir != old.session_dir


def test_start_every_port_is_on_loopback(site: Site) -> None:
    me = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    ]

    assert len(listening) >= 5
    addresses = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip in listening]
    assert all(address.is_loopback for address in addresses), listening


def test_start_token_and_session_are_closed_to_others(site: Site) -> None:
    token, session_dir = site.state_dir / "ray" / "token", record_of(site).session_dir

    assert token.stat().st_mode & 0o777 == 0o600
    assert session_dir.stat().st_mode & 0o777 == 0o700
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)


def test_first_round_on_a_cold_ray_is_answered_before_rays_process_is_up(site: Site) -> None:
    async def scenario() -> tuple[str, bool, str]:
        await site.engine._replace_scheduler()
        cold = await site.engine.solve(EMPTY_ROUND)
        was_up = site.engine.is_scheduler_up
        await until(lambda: site.engine.is_scheduler_up)
        return cold, was_up, await site.engine.solve(EMPTY_ROUND)

    cold, was_up, warm = site.run(scenario())

    assert cold == warm
    assert not was_up


def test_solve_empty_round_answers(site: Site) -> None:
    answer = site.run(site.engine.solve(EMPTY_ROUND))

    assert SchedulingAnswer.model_validate_json(answer).verdicts == ()


def test_solve_damaged_round_says_what_the_scheduler_met(site: Site) -> None:
    with pytest.raises(RoundLostError, match="validation errors for SchedulingRound"):
        site.run(site.engine.solve("{}"))


def test_solve_given_up_does_not_stand_in_the_way_of_the_next(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "SOLVE_WITHIN_S", 0.0)
        with pytest.raises(RoundLostError, match="has not answered within"):
            site.run(site.engine.solve(EMPTY_ROUND))

    assert json.loads(site.run(site.engine.solve(EMPTY_ROUND))) == {"verdicts": []}


def load_problem(num_devices: int = 4) -> PlanningProblem:
    """A job that needs two of the devices, each of which can hold a part of several such jobs."""
    table = llama(8)
    devices = tuple(device(f"d{i}", speed=1 + i / 2, available_mib=2_600 + 600 * i) for i in range(num_devices))
    shape = job(table, exact_stages=2)
    return PlanningProblem(
        job_id="job",
        table=table,
        shape=shape,
        is_micro_batch_free=False,
        label_tokens_per_row=40,
        devices=devices,
        links=SLOW_LAN,
    )


def test_200_reservations_at_once_none_over_committed_none_leaked_after_kills(site: Site, tmp_path: Path) -> None:
    killed: list[int] = []

    async def kill_scheduler(num_reserved: int) -> None:
        if num_reserved in (30, 120):
            # Rounds need no actor while Ray starts it again, so it may not be there yet.
            await until(lambda: actor_processes("SchedulerActor"))
            for process in await asyncio.to_thread(actor_processes, "SchedulerActor"):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    load = ReservationLoad(site.engine, tmp_path, load_problem(), 200, kill_scheduler)
    try:
        site.run(load.run())

        assert load.num_reserved == 200
        assert load.store.reservations() == ()
        assert len(killed) == 2
        assert load.most_running >= 5
    finally:
        load.store.close()


def spread_plan(problem: PlanningProblem, fan: Fan) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "is_long", lambda num_blocks, num_devices: True)
        return problem.plan(fan)


def test_long_search_on_rays_workers_gives_the_plan_of_one_process(site: Site) -> None:
    import ray

    problem, here = load_problem(6), []
    fan = RayFan(problem)

    def last_to_finish(part: SearchPart) -> PartResult:
        # This process waits, which it never does by itself: Ray gets every part that it may have.
        done, late = ray.wait(list(fan.tasks.values()), num_returns=len(fan.tasks), timeout=WAIT_S)
        assert done and not late
        here.append(part)
        return problem.run_part(part)

    on_ray = spread_plan(problem, lambda parts, run: fan(parts, last_to_finish if len(parts) > 1 else run))

    assert on_ray == spread_plan(problem, in_turn)
    assert len(here) <= 2  # one of the climbs, one of the improvements


def test_long_search_without_a_free_worker_is_answered_in_process(site: Site) -> None:
    import ray

    problem = load_problem(6)
    busy = ray.util.placement_group([{"CPU": float(os.cpu_count() or 1)}])
    try:
        assert busy.wait(WAIT_S)
        fan = RayFan(problem)
        found = spread_plan(problem, fan)
    finally:
        ray.util.remove_placement_group(busy)

    assert fan.tasks == {}
    assert found == spread_plan(problem, in_turn)


def test_large_file_tokenised_on_rays_workers_is_the_bytes_of_one_process(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    path = tmp_path / "rows.jsonl"
    path.write_text("".join((SNIPS_DIR / "train.jsonl").read_text().splitlines(keepends=True)[:600]))
    rows, tokenizer = read_rows(path), load_tokenizer(TINY_LLAMA_DIR)
    here = tokenise(rows, tokenizer, max_tokens=64)
    spread = RayTokenisation(TINY_LLAMA_DIR, fewest_rows=1, rows_per_task=100)
    wait = ray.wait
    # This process waits, which it never does by itself: Ray gets every part.
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: wait(refs, timeout=WAIT_S))
    on_ray = tokenise(rows, tokenizer, max_tokens=64, spread=spread)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([], refs))
    not_on_ray = tokenise(rows, tokenizer, max_tokens=64, spread=spread)

    assert spread.num_done_by_ray == 6
    assert RayTokenisation(TINY_LLAMA_DIR)(rows, Reading(max_tokens=64)) is None
    for found in (on_ray, not_on_ray):
        assert (found.input_ids == here.input_ids).all() and (found.label_mask == here.label_mask).all()
        assert (found.starts == here.starts).all() and (found.line_numbers == here.line_numbers).all()


def test_runner_dials_with_its_incarnation_and_reads_the_jobs_rows(site: Site) -> None:
    async def scenario() -> tuple[RunnerStream, pb.RunnerEvent]:
        site.engine.start_runner(JobId("job-1"))
        site.engine.start_runner(JobId("job-1"))
        stream = await site.next_stream()
        answer = await stream.ask(pb.RunnerCommand(request_id="1", prepare=pb.Prepare(spec_json=snips_spec_json())))
        await site.finish(JobId("job-1"), stream)
        return stream, answer

    stream, answer = site.run(scenario())

    assert (stream.hello.job_id, stream.hello.incarnation) == ("job-1", INCARNATION)
    assert PreparedData.model_validate_json(answer.prepared.json).num_train == 12
    assert site.coordinator.streams.empty()


def test_runner_killed_dials_again(site: Site) -> None:
    async def scenario() -> RunnerStream:
        site.engine.start_runner(JobId("job-2"))
        await site.next_stream()
        (process,) = actor_processes("RunnerActor")
        process.send_signal(signal.SIGKILL)
        stream = await site.next_stream()
        await site.finish(JobId("job-2"), stream)
        return stream

    assert site.run(scenario()).hello.job_id == "job-2"


def test_runner_that_ended_by_itself_starts_again_when_asked(site: Site) -> None:
    async def scenario() -> RunnerStream:
        site.engine.start_runner(JobId("job-3"))
        (await site.next_stream()).end()
        # Asked before the engine has learnt of the end: it must not be taken for running.
        site.engine.start_runner(JobId("job-3"))
        stream = await site.next_stream()
        await site.finish(JobId("job-3"), stream)
        return stream

    assert site.run(scenario()).hello.job_id == "job-3"


class PaperAdmission:
    """Tokens that say where a stand-in for an agent reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.dismissed: list[str] = []

    async def token(self, name: str) -> str:
        self.names.append(name)
        return str(self.folder / f"{len(self.names)}.json")

    async def dismiss(self, name: str, reason: str) -> None:
        self.dismissed.append(name)

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]


@pytest.fixture
def second_node(site: Site) -> Iterator[str]:
    """A small node beside the embedded one; its id.

    A raylet has been seen to die a moment after it had joined (Ray 2.60; in none of 118 further starts), which Ray's
    head only notices a quarter of a minute later. What it wrote goes into the report; another node takes its place.
    """
    for _ in range(SECOND_NODE_STARTS):
        node = start_second_node(record_of(site).session_dir, memory_bytes=SECOND_NODE_BYTES)
        try:
            if is_raylet_alive(node):
                yield str(node.node_id)
                return
            print(raylet_logs(node))
        finally:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        site.run(until(functools.partial(is_forgotten, str(node.node_id))))
    pytest.fail(f"none of {SECOND_NODE_STARTS} second nodes stayed")


def test_ray_fleet_keeps_one_agent_on_each_unequal_node(site: Site, second_node: str, tmp_path: Path) -> None:
    admission = PaperAdmission(tmp_path)
    fleet = RayFleet(admission, is_loopback_only=True, module="tests.integration.standin_agent", look_every_s=0.1)

    async def scenario() -> list[dict[str, Any]]:
        running = asyncio.create_task(fleet.run())
        await until(lambda: len(admission.reports()) == 2)
        placed = admission.reports()
        (victim,) = (report for report in placed if report["--name"].endswith(second_node[:8]))
        psutil.Process(victim["pid"]).parent().kill()  # the actor; its agent hangs on it
        await until(lambda: len(admission.reports()) == 3 and not psutil.pid_exists(victim["pid"]))
        running.cancel()
        await fleet.close()
        return placed

    first, second = sorted(site.run(scenario()), key=lambda report: report["--name"].endswith(second_node[:8]))

    assert (first["--threads"], second["--threads"]) == (str(os.cpu_count()), "1")
    assert first["--memory"].endswith("MiB") and "--device" not in first
    # The node's card is the agent's, and the only one that it sees.
    assert (second["--device"], second["cards"], "--memory" in second) == ("cuda:0", "0", False)
    assert first["rays_secrets"] == second["rays_secrets"] == []
    assert admission.names[-1] == admission.dismissed[0] == second["--name"]
    assert not any(psutil.pid_exists(report["pid"]) for report in admission.reports())
    assert not any(Path(report["--state-dir"]).parent.exists() for report in admission.reports()[:-1])


@pytest.mark.slow
def test_engine_raylet_killed_starts_a_fresh_ray_with_its_runners(site: Site) -> None:
    old = record_of(site)

    async def scenario() -> tuple[RunnerStream, str]:
        site.engine.start_runner(JobId("job-4"))
        await site.next_stream()
        (raylet,) = (process for process in old.processes if process.name == "raylet" and is_running(process))
        os.kill(raylet.pid, signal.SIGKILL)
        stream = await site.next_stream()
        answer = await site.engine.solve(EMPTY_ROUND)
        await site.finish(JobId("job-4"), stream)
        return stream, answer

    stream, answer = site.run(scenario())

    assert stream.hello.job_id == "job-4"
    assert json.loads(answer) == {"verdicts": []}
    assert not any(map(is_running, old.processes))


def test_close_leaves_no_process_folder_or_record(site: Site) -> None:
    """The last test that uses the engine; closing twice is harmless."""
    record = record_of(site)

    site.run(site.engine.close())

    assert not any(map(is_running, record.processes))
    assert not living_children()
    assert not record.session_dir.exists()
    assert read_record(site.state_dir / "ray" / "processes.json") is None


def test_embedded_cluster_ray_does_not_start_leaves_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the engine's end, because a process has one Ray; this one gives its first daemon no time."""
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "0")

    with pytest.raises(PlutinoError, match="--engine local"):
        EmbeddedCluster(tmp_path).start()
    gc.collect()  # what Ray has dropped, while its warnings are expected

    assert not living_children()
    assert read_record(tmp_path / "ray" / "processes.json") is None


def test_embedded_cluster_never_started_stops_without_ray(tmp_path: Path) -> None:
    EmbeddedCluster(tmp_path).stop()

    assert list(tmp_path.iterdir()) == []


def test_joined_cluster_address_of_ray_client_is_refused() -> None:
    with pytest.raises(ConfigError, match="host:port"):
        JoinedCluster("ray://127.0.0.1:10001")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "somewhere", "127.0.0.1:99999"])
def test_joined_cluster_nobody_there_says_what_to_check(address: str) -> None:
    with pytest.raises(UnreachableError, match="ray status"):
        JoinedCluster(address).start()
