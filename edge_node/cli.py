"""``plutino-node``: the command of a device that has only the agent installed."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plutino.errors import ConfigError, PlutinoError
from plutino.sizes import parse_size

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, which is that of the error class if it fails."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return int(options.command(options))
    except PlutinoError as error:
        print(f"plutino-node: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    if not _NAME.fullmatch(options.name):
        raise ConfigError(
            f"device name {options.name!r} is not allowed; use 1 to 63 letters, digits, '.', '-' or '_', "
            "the first a letter or digit"
        )
    if options.threads < 1:
        raise ConfigError(f"--threads {options.threads} is less than 1")
    memory_budget_bytes = parse_size(options.memory)
    cache_bytes = 0 if options.cache == "0" else parse_size(options.cache)
    # Imported here: gRPC would cost --help more than the rest together.
    from edge_node.agent import AgentConfig, run_agent
    from edge_node.state_dir import StateDir, default_state_dir
    from edge_node.weights_config import WeightsConfig
    from edge_node.worker_pool import PoolConfig

    allowed = WeightsConfig(cache_bytes=cache_bytes, uses_folders=not options.no_folders, uses_hub=not options.no_hub)
    if options.cache_dir is not None:
        allowed = replace(allowed, cache_dir=options.cache_dir.expanduser().absolute())
    config = AgentConfig(
        coordinator_address=options.coordinator,
        name=options.name,
        pool=PoolConfig(memory_budget_bytes=memory_budget_bytes, threads=options.threads, weights=allowed),
    )
    run_agent(config, StateDir(options.state_dir or default_state_dir(options.name)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    # Imported here, like run's.
    from edge_node.doctor import NodeDoctorOptions, examine_node
    from edge_node.state_dir import default_state_dir
    from plutino.doctor.report import as_json, as_text, exit_code

    findings = examine_node(
        NodeDoctorOptions(
            state_dir=options.state_dir or default_state_dir(options.name),
            threads=options.threads,
            memory_budget_bytes=None if options.memory is None else parse_size(options.memory),
            coordinator_address=options.coordinator,
        )
    )
    print(as_json(findings) if options.json else as_text(findings))
    return exit_code(findings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plutino-node", description="Gives this device to a plutino coordinator.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="supervise this device's workers until ended",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.set_defaults(command=_run)
    run.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="where the coordinator listens")
    run.add_argument("--memory", required=True, metavar="SIZE", help="bound on all workers' memory, such as 600MiB")
    run.add_argument(
        "--cache", default="32GiB", metavar="SIZE", help="bound on cached weights on the disk; 0 keeps none"
    )
    run.add_argument(
        "--cache-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="cached weights, shared by agents; by default plutino/weights in the user's cache directory",
    )
    run.add_argument("--no-hub", action="store_true", help="never fetch weights from the hub")
    run.add_argument(
        "--no-folders", action="store_true", help="never read model folders here, such as slow network mounts"
    )
    doctor = commands.add_parser(
        "doctor",
        help="examine this device: kernels, memory, versions, and the way to the coordinator and back",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--coordinator", metavar="HOST:PORT", help="where the coordinator listens; none: not examined")
    doctor.add_argument("--memory", metavar="SIZE", help="what the agent would be given; none: not examined")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of lines")
    for command in (run, doctor):
        command.add_argument("--name", default=socket.gethostname(), help="what people call this device")
        command.add_argument("--threads", type=int, default=_num_cores(), help="threads of each worker")
        command.add_argument(
            "--state-dir",
            type=Path,
            default=None,
            metavar="DIR",
            help="identity and logs; by default plutino/nodes/NAME in the user's state directory",
        )
    return parser


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
