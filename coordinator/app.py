"""The coordinator process: wires store, fleet, jobs, engine, servers and the bulk process together, and runs them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import grpc.aio

from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.membership import Change
from coordinator.fleet.registry import FleetRegistry, Patience, WorkerExit
from coordinator.jobs.endpoints import Endpoints
from coordinator.jobs.manager import JobManager
from coordinator.llm2llm.manager import LoopManager
from coordinator.scheduling.engine import Engine
from coordinator.security.addresses import advertised_hosts, beside, dialled_here, with_port_of
from coordinator.security.placed import PlacedDevices
from coordinator.security.warden import Warden
from coordinator.services.agents import AgentServicer
from coordinator.services.doctor import DoctorServicer
from coordinator.services.jobs import JobServicer
from coordinator.services.join import CertificateServicer, JoinServicer
from coordinator.services.llm2llm import Llm2LlmServicer
from coordinator.services.runners import RunnerServicer
from coordinator.services.security import SecurityServicer
from coordinator.services.sweeps import SweepServicer
from coordinator.services.workers import WorkerServicer
from coordinator.storage.base import Store
from coordinator.storage.sqlite import SqliteStore
from coordinator.sweeps.manager import SweepManager
from coordinator.weights.bulk_process import start_bulk
from plutino.errors import ConfigError, SecurityError, StoreError
from plutino.security.certificates import LIFETIME_S
from plutino.security.identity import COORDINATOR
from plutino.security.tokens import DEFAULT_TTL_S
from plutino.types import AgentId
from plutino.wire.channel import Lane, aio_server, bind, is_loopback, split_address
from protos import (
    agents_pb2_grpc,
    doctor_pb2_grpc,
    jobs_pb2_grpc,
    llm2llm_pb2_grpc,
    runners_pb2_grpc,
    security_pb2_grpc,
    sweeps_pb2_grpc,
    workers_pb2_grpc,
)

if TYPE_CHECKING:
    from coordinator.scheduling.ray_backend.fleet import RayFleet

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0
_JOIN_OFFSET, _BULK_OFFSET = 2, 3
"""Ports behind the devices' one; the one between is the people's."""
_JOINS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """How to run a coordinator."""

    state_dir: Path
    devices_address: str = "127.0.0.1:7420"
    """Where agents and workers dial; a restart takes the same port again, so that they find it. Devices join two ports
    further on, and reach weights and shadows three; port 0 takes free ones."""
    people_address: str = "127.0.0.1:7421"
    """Where the command line and programs dial."""
    advertised_hosts: tuple[str, ...] = ()
    """Where other machines reach this one, for join tokens; empty to find out."""
    is_plaintext: bool = False
    """No TLS: loopback only, and whoever is on this machine is trusted."""
    certificate_lifetime_s: float = LIFETIME_S
    """Of every certificate that is issued; renewed at two thirds of it."""
    engine: Literal["ray", "local"] = "ray"
    ray_address: str | None = None
    """An existing Ray cluster; None starts an embedded one."""
    is_fleet_on_ray: bool = False
    """Place an agent on each node of that cluster, beside the devices that join by themselves."""
    bulk_rate_bytes_per_s: int = 0
    """Cap on weights and shadows together; 0 means none."""
    patience: Patience = field(default_factory=Patience)
    """How long devices are waited for."""


MakeEngine = Callable[[CoordinatorConfig, Endpoints, int], Engine]
"""Builds the engine of a coordinator's incarnation."""


async def run_coordinator(
    config: CoordinatorConfig,
    on_ready: Callable[[Endpoints], None],
    *,
    stop: asyncio.Event | None = None,
    make_engine: MakeEngine | None = None,
) -> None:
    """Run until ``stop`` is set, or SIGTERM or SIGINT where none is given; jobs go on at the next start.

    Args:
        config: how to run.
        on_ready: called once everything answers.
        stop: ends the coordinator; None takes the process's signals.
        make_engine: builds another engine than the config's.

    Raises:
        StoreError: another coordinator runs with this state folder.
        ConfigError: an address is taken, or options contradict each other.
        SecurityError: an address is beyond loopback.
    """
    _refuse_plaintext_beyond_loopback(config)
    _refuse_fleet_without_cluster(config)
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if stop is None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        store = SqliteStore(config.state_dir / "plutino.sqlite")
        stack.callback(store.close)
        incarnation = await asyncio.wrap_future(store.next_incarnation())
        warden = None
        if not config.is_plaintext:
            warden = Warden(config.state_dir, lifetime_s=config.certificate_lifetime_s)
            stack.callback(warden.close)
        bulk_address = await start_bulk(
            stack,
            address=with_port_of(beside(config.devices_address, _BULK_OFFSET), store.value("bulk_address")),
            state_dir=config.state_dir,
            rate_bytes_per_s=config.bulk_rate_bytes_per_s,
            identity=None if warden is None else warden.coordinator_path,
        )
        await _serve(
            config, store, warden, incarnation, bulk_address, stack, stop, on_ready, make_engine or _make_engine
        )


async def _serve(
    config: CoordinatorConfig,
    store: Store,
    warden: Warden | None,
    incarnation: int,
    bulk_address: str,
    stack: AsyncExitStack,
    stop: asyncio.Event,
    on_ready: Callable[[Endpoints], None],
    make_engine: MakeEngine,
) -> None:
    # The servers learn their ports before anything can be told of them, and the fleet tells the jobs of its changes.
    jobs: list[JobManager] = []

    def on_change(change: Change) -> None:
        jobs[0].on_fleet_change(change)

    def on_worker_exit(exit_: WorkerExit) -> None:
        jobs[0].on_worker_exit(exit_)

    fleet = FleetRegistry(
        incarnation=incarnation, on_change=on_change, on_worker_exit=on_worker_exit, patience=config.patience
    )
    credentials = None if warden is None else warden.credentials
    if warden is not None:
        fleet.revoked_ids |= warden.revoked_ids()
    devices_server, people_server = (
        aio_server(lane, interceptors=[] if warden is None else [warden.gate()]) for lane in (Lane.CONTROL, Lane.REPORT)
    )
    devices_address = bind(
        devices_server, with_port_of(config.devices_address, store.value("devices_address")), credentials
    )
    people_address = bind(
        people_server, with_port_of(config.people_address, store.value("people_address")), credentials
    )
    servers = [devices_server, people_server]
    join_addresses: tuple[str, ...] = ()
    if warden is not None:
        join_server, join_addresses = await _bind_join(config, store, warden, devices_address)
        servers.append(join_server)
        certificates = CertificateServicer(warden)
        security_pb2_grpc.add_CertificateServiceServicer_to_server(certificates, devices_server)
    endpoints = Endpoints(
        devices_address=dialled_here(devices_address),
        people_address=dialled_here(people_address),
        bulk_address=dialled_here(bulk_address),
        join_addresses=join_addresses,
        join_token="" if warden is None else await _first_token(warden, join_addresses),
        runner_identity=None if warden is None else warden.runner_path,
    )
    engine = make_engine(config, endpoints, incarnation)
    link_map = LinkMap(fleet, has_tls=warden is not None)
    manager = JobManager(
        store=store,
        fleet=fleet,
        link_map=link_map,
        engine=engine,
        endpoints=endpoints,
        incarnation=incarnation,
        state_dir=config.state_dir,
    )
    jobs.append(manager)
    agents_pb2_grpc.add_AgentServiceServicer_to_server(AgentServicer(fleet), devices_server)
    doctor_pb2_grpc.add_DoctorServiceServicer_to_server(
        DoctorServicer(fleet, dialled_here(bulk_address)), devices_server
    )
    workers_pb2_grpc.add_WorkerServiceServicer_to_server(
        WorkerServicer(manager.workers_of, manager.owner_of), devices_server
    )
    sweeps = SweepManager(store, manager)
    sweeps_pb2_grpc.add_SweepServiceServicer_to_server(SweepServicer(sweeps), people_server)
    loops = LoopManager(store, manager, config.state_dir)
    llm2llm_pb2_grpc.add_Llm2LlmServiceServicer_to_server(Llm2LlmServicer(loops), people_server)
    members = None if warden is None else warden.members
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobServicer(manager, store, fleet, link_map, members), people_server)
    security = SecurityServicer(warden, join_addresses, lambda node_id, reason: fleet.revoke(AgentId(node_id), reason))
    security_pb2_grpc.add_SecurityServiceServicer_to_server(security, people_server)
    runners_pb2_grpc.add_RunnerServiceServicer_to_server(RunnerServicer(incarnation, manager.runner_of), people_server)
    await engine.start()
    stack.push_async_callback(engine.close)
    placing = None
    if config.is_fleet_on_ray:
        assert warden is not None, "refused without TLS"
        placing = _ray_fleet(PlacedDevices(warden, fleet, join_addresses), devices_address)
        # After the servers and the jobs: a job whose agents end with the coordinator is not to recover from that.
        stack.push_async_callback(placing.close)
    for server in servers:
        await server.start()
    stack.push_async_callback(_stop_servers, *servers)
    stack.push_async_callback(manager.close)
    manager.resume_all(sweeps.living_trials())
    sweeps.resume_all()
    stack.push_async_callback(sweeps.close)
    loops.resume_all()
    stack.push_async_callback(loops.close)
    await _write_endpoints(config, store, warden, endpoints)
    on_ready(endpoints)
    forever = [
        asyncio.create_task(fleet.watch_leases()),
        asyncio.create_task(link_map.run()),
        asyncio.create_task(manager.run()),
        asyncio.create_task(_watch_store(store)),
    ]
    if warden is not None:
        forever.append(asyncio.create_task(warden.renew_forever()))
    if placing is not None:
        forever.append(asyncio.create_task(placing.run()))
    stopping = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({stopping, *forever}, return_when=asyncio.FIRST_COMPLETED)
    for task in (stopping, *forever):
        task.cancel()
    for task in done - {stopping}:
        task.result()  # a service of the coordinator must never end by itself


def _refuse_plaintext_beyond_loopback(config: CoordinatorConfig) -> None:
    for address in (config.devices_address, config.people_address):
        if config.is_plaintext and not is_loopback(split_address(address)[0]):
            raise SecurityError(
                f"{address} is not a loopback address, and without TLS what listens there is neither encrypted nor "
                "authenticated; leave --insecure-loopback out, or listen on 127.0.0.1"
            )


def _refuse_fleet_without_cluster(config: CoordinatorConfig) -> None:
    if not config.is_fleet_on_ray:
        return
    if config.engine != "ray" or config.ray_address is None:
        raise ConfigError(
            "--fleet ray places an agent on each node of a Ray cluster that runs already; say which with "
            "--ray-address HOST:PORT (or auto), or start agents yourself: plutino node join TOKEN"
        )
    if config.is_plaintext:
        raise ConfigError("--fleet ray lets its agents join with tokens, over TLS; leave --insecure-loopback out")


def _ray_fleet(admission: PlacedDevices, devices_address: str) -> RayFleet:
    from coordinator.scheduling.ray_backend.fleet import RayFleet

    return RayFleet(admission, is_loopback_only=is_loopback(split_address(devices_address)[0]))


async def _bind_join(
    config: CoordinatorConfig, store: Store, warden: Warden, devices_address: str
) -> tuple[grpc.aio.Server, tuple[str, ...]]:
    """The server that asks for no certificate, because whoever calls wants one; and where devices reach it."""
    server = aio_server(Lane.CONTROL, max_concurrent_calls=_JOINS_AT_ONCE, interceptors=[warden.gate()])
    address = with_port_of(beside(config.devices_address, _JOIN_OFFSET), store.value("join_address"))
    host, port = split_address(bind(server, address, warden.credentials, asks_certificate=False))
    _, devices_port = split_address(devices_address)
    security_pb2_grpc.add_JoinServiceServicer_to_server(JoinServicer(warden, devices_port), server)
    await asyncio.wrap_future(store.put_value("join_address", f"{host}:{port}"))
    return server, tuple(f"{reached}:{port}" for reached in advertised_hosts(host, config.advertised_hosts))


async def _first_token(warden: Warden, addresses: tuple[str, ...]) -> str:
    token, _ = await asyncio.to_thread(
        warden.make_token, addresses, uses=1, ttl_s=DEFAULT_TTL_S, actor=str(COORDINATOR)
    )
    return token.encode()


async def _watch_store(store: Store) -> None:
    """A coordinator that cannot write decides nothing any more; workers wait for the next one.

    Raises:
        StoreError: the disk has failed.
    """
    while not store.is_broken:
        await asyncio.sleep(1.0)
    raise StoreError("the store cannot be written any more; free disk space or mend the disk, then: plutino up")


async def _stop_servers(*servers: grpc.aio.Server) -> None:
    # At once: each waits its whole grace for streams that agents and watchers keep open.
    await asyncio.gather(*(server.stop(_STOP_GRACE_S) for server in servers))


def _make_engine(config: CoordinatorConfig, endpoints: Endpoints, incarnation: int) -> Engine:
    if config.engine == "local":
        from coordinator.scheduling.local import LocalEngine

        return LocalEngine(
            address=endpoints.people_address,
            bulk_address=endpoints.bulk_address,
            incarnation=incarnation,
            runner_identity=endpoints.runner_identity,
        )
    # Imported late: Ray takes half a second, and the local engine must work where Ray has no wheel.
    from coordinator.scheduling.ray_backend.engine import RayEngine

    return RayEngine(
        address=endpoints.people_address,
        bulk_address=endpoints.bulk_address,
        incarnation=incarnation,
        state_dir=config.state_dir,
        ray_address=config.ray_address,
        runner_identity=endpoints.runner_identity,
    )


async def _write_endpoints(
    config: CoordinatorConfig, store: Store, warden: Warden | None, endpoints: Endpoints
) -> None:
    values = {
        "devices_address": endpoints.devices_address,
        "people_address": endpoints.people_address,
        "bulk_address": endpoints.bulk_address,
        "pid": str(os.getpid()),
        # Empty without TLS.
        "person_identity": "" if warden is None else str(warden.person_path.absolute()),
    }
    for key in ("devices_address", "people_address", "bulk_address"):
        await asyncio.wrap_future(store.put_value(key, values[key]))
    path = config.state_dir / "endpoint.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)
