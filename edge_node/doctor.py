"""``plutino-node doctor``: is this device fit to work, and does it reach its coordinator and its peers?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_node.cache import default_cache_dir
from edge_node.network import DeviceNetwork
from edge_node.state_dir import host_id
from plutino.doctor.child import ChildRun
from plutino.doctor.judge_machine import judge_disk, judge_limits, judge_memory, judge_processor
from plutino.doctor.kernels import judge_kernels, run_kernels
from plutino.doctor.machine import read_disk, read_limits, read_memory, read_processor
from plutino.doctor.report import Finding, fail
from plutino.doctor.software import judge_installed, judge_other_side
from plutino.doctor.wire import dial_back, greet, judge_clock, judge_dial_back, judge_port
from plutino.errors import PlutinoError, SecurityError
from plutino.versions import installed_versions
from plutino.wire.channel import Lane


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDoctorOptions:
    """What the device's owner wants to know."""

    state_dir: Path
    threads: int
    memory_budget_bytes: int | None = None
    """What the agent would be given; None: not asked."""
    coordinator_address: str | None = None
    """None leaves out everything that needs a coordinator."""
    network: DeviceNetwork = field(default_factory=DeviceNetwork)
    """How the agent's workers would reach others."""


def examine_node(options: NodeDoctorOptions, *, run_kernels: Callable[[int], ChildRun] = run_kernels) -> list[Finding]:
    """Run all probes, the heavy ones in a child; takes as long as importing torch and transformers."""
    versions = installed_versions()
    processor = read_processor()
    findings = [
        *judge_installed(versions, extra="device"),
        *judge_memory(read_memory(), budget_bytes=options.memory_budget_bytes),
        judge_processor(processor, threads=options.threads),
        *judge_limits(read_limits()),
        judge_disk("state folder", read_disk(options.state_dir)),
        judge_disk("weights cache", read_disk(default_cache_dir())),
        *judge_kernels(run_kernels(min(options.threads, processor.useful_threads))),
    ]
    if options.coordinator_address is not None:
        findings += _examine_network(options.coordinator_address, options.network, versions)
    return findings


def _examine_network(address: str, network: DeviceNetwork, versions: dict[str, str]) -> list[Finding]:
    try:
        credentials = network.credentials()
    except SecurityError as error:
        return [fail("identity", str(error), "on the coordinator's machine: plutino token create; then join here")]
    control = judge_port("control port", address, Lane.CONTROL, credentials)
    if control.fix:
        return [control]
    try:
        greeting = greet(address, credentials)
    except PlutinoError as error:
        return [control, fail("coordinator", str(error), "upgrade plutino there, and see its log: plutino up")]
    findings = [
        control,
        judge_port("bulk port", network.reached(greeting.bulk_address), Lane.BULK, credentials),
        judge_clock(greeting),
        *judge_other_side(
            versions, greeting.versions, other_name="the coordinator", other_wire_version=greeting.wire_version
        ),
    ]
    if greeting.fleet_versions:
        findings += judge_other_side(versions, greeting.fleet_versions, other_name="the other devices")
    try:
        dials = dial_back(
            address,
            host_id=host_id(),
            credentials=credentials,
            listen_host=network.listen_host,
            advertised_host=network.advertised_host,
        )
        findings.append(judge_dial_back(dials))
    except PlutinoError as error:
        findings.append(fail("data plane", str(error), "name an address of this machine that others reach: --listen"))
    return findings
