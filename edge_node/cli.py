"""``plutino-node``: the command of a device that has only the agent installed."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plutino.errors import ConfigError, PlutinoError
from plutino.sizes import MIB, parse_size

if TYPE_CHECKING:
    from edge_node.joining import Membership
    from edge_node.state_dir import StateDir

_DEVICE = re.compile(r"cpu|cuda(:\d{1,2})?", re.ASCII)
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
    if not _DEVICE.fullmatch(options.device):
        raise ConfigError(f"--device {options.device!r} is not known; it is cpu, cuda or cuda:N")
    if options.threads < 1:
        raise ConfigError(f"--threads {options.threads} is less than 1")
    memory_budget_bytes = parse_size(options.memory or _default_memory(options.device))
    cache_bytes = 0 if options.cache == "0" else parse_size(options.cache)
    activation_bytes = 0 if options.activation_cache == "0" else parse_size(options.activation_cache)
    # Imported here: gRPC would cost --help more than the rest together.
    from edge_node.agent import AgentConfig, run_agent
    from edge_node.network import DeviceNetwork
    from edge_node.pool_config import PoolConfig
    from edge_node.state_dir import StateDir, default_state_dir
    from edge_node.weights_config import WeightsConfig

    allowed = WeightsConfig(
        cache_bytes=cache_bytes,
        activation_bytes=activation_bytes,
        uses_folders=not options.no_folders,
        uses_hub=not options.no_hub,
    )
    if options.cache_dir is not None:
        cache_dir = options.cache_dir.expanduser().absolute()
        allowed = replace(allowed, cache_dir=cache_dir, activation_dir=cache_dir.parent / "activations")
    state_dir = StateDir(options.state_dir or default_state_dir(options.name))
    membership = _membership(options, state_dir)
    if membership is None:
        address, network = options.coordinator, DeviceNetwork()
    else:
        address = membership.devices_address
        network = DeviceNetwork.of_member(
            membership.identity, address, listen=options.listen, advertise=options.advertise
        )
    config = AgentConfig(
        coordinator_address=address,
        name=options.name,
        pool=PoolConfig(
            memory_budget_bytes=memory_budget_bytes,
            threads=options.threads,
            device=options.device,
            network=network,
            weights=allowed,
        ),
        node_id=None if membership is None else membership.node_id,
    )
    run_agent(config, state_dir)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    # Imported here, like run's.
    from edge_node.doctor import NodeDoctorOptions, examine_node
    from edge_node.joining import Membership
    from edge_node.network import DeviceNetwork
    from edge_node.state_dir import default_state_dir
    from plutino.doctor.report import as_json, as_text, exit_code

    state_dir = options.state_dir or default_state_dir(options.name)
    address, network = options.coordinator, DeviceNetwork()
    if address is None and (known := Membership.read(state_dir)) is not None:
        address = known.devices_address
        network = DeviceNetwork.of_member(known.identity, address, listen=options.listen, advertise=options.advertise)
    findings = examine_node(
        NodeDoctorOptions(
            state_dir=state_dir,
            threads=options.threads,
            memory_budget_bytes=None if options.memory is None else parse_size(options.memory),
            coordinator_address=address,
            network=network,
        )
    )
    print(as_json(findings) if options.json else as_text(findings))
    return exit_code(findings)


def _membership(options: argparse.Namespace, state_dir: StateDir) -> Membership | None:
    """What this device is a member of, joining first if it was told to; None for a coordinator without TLS."""
    from edge_node.joining import Membership, join
    from plutino.security.tokens import JoinToken

    if options.is_join:
        token = JoinToken.decode(_token_text(options))
        with state_dir.locked():
            membership = join(token, options.name, state_dir.path)
        logging.info("joined %s as %s", membership.devices_address, membership.node_id)
        return membership
    if options.coordinator is not None:
        return None
    known = Membership.read(state_dir.path)
    if known is None:
        raise ConfigError(
            f"this device has not joined a coordinator yet (nothing in {state_dir.path}); get a token with "
            "plutino token create there, then: plutino-node join TOKEN"
        )
    known.check(time.time())
    return known


def _token_text(options: argparse.Namespace) -> str:
    """The token, from wherever it was given."""
    if (options.token is None) == (options.token_file is None):
        raise ConfigError("give the token, or the file that holds it with --token-file (- is standard input)")
    if options.token is not None:
        return str(options.token)
    try:
        return sys.stdin.read() if options.token_file == "-" else Path(options.token_file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the token file {options.token_file} cannot be read: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plutino-node", description="Gives this device to a plutino coordinator.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    join = commands.add_parser(
        "join",
        help="become a member of a coordinator with its token, then as run",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    join.add_argument("token", nargs="?", default=None, metavar="TOKEN", help="what plutino up or token create printed")
    join.add_argument("--token-file", default=None, metavar="FILE", help="file with the token, - for standard input")
    run = commands.add_parser(
        "run",
        help="supervise this device's workers until ended",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument(
        "--coordinator",
        default=None,
        metavar="HOST:PORT",
        help="a coordinator without TLS on this machine; by default the one that was joined",
    )
    doctor = commands.add_parser(
        "doctor",
        help="examine this device: kernels, memory, versions, and the way to the coordinator and back",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    doctor.set_defaults(command=_doctor)
    doctor.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="a coordinator without TLS on this machine; by default the one that was joined, if any",
    )
    doctor.add_argument("--memory", metavar="SIZE", help="what the agent would be given; none: not examined")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of lines")
    for command in (join, run):
        command.set_defaults(command=_run, is_join=command is join)
        command.add_argument(
            "--device",
            default="cpu",
            metavar="cpu|cuda[:N]",
            help="where workers compute; on a card --memory bounds what they take of its memory",
        )
        command.add_argument(
            "--memory",
            metavar="SIZE",
            help="bound on all workers' memory, such as 600MiB; by default half of the machine's, 90 %% of a card's",
        )
        command.add_argument(
            "--cache", default="32GiB", metavar="SIZE", help="bound on cached weights on the disk; 0 keeps none"
        )
        command.add_argument(
            "--activation-cache",
            default="10GiB",
            metavar="SIZE",
            help="bound on hidden states that jobs keep on the disk, so that later epochs are short; 0 keeps none",
        )
        command.add_argument(
            "--cache-dir",
            type=Path,
            default=None,
            metavar="DIR",
            help="cached weights, shared by agents, with activations beside it for hidden states; by default "
            "plutino/weights in the user's cache directory",
        )
        command.add_argument("--no-hub", action="store_true", help="never fetch weights from the hub")
        command.add_argument(
            "--no-folders", action="store_true", help="never read model folders here, such as slow network mounts"
        )
    for command in (join, run, doctor):
        _add_options(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    """What a device is called, and where it stands on the network."""
    command.add_argument("--name", default=socket.gethostname(), help="what people call this device")
    command.add_argument("--threads", type=int, default=_num_cores(), help="threads of each worker")
    command.add_argument(
        "--listen",
        default=None,
        metavar="HOST",
        help="where workers listen for their peers; by default everywhere, or on loopback if the coordinator is there",
    )
    command.add_argument(
        "--advertise",
        default=None,
        metavar="HOST",
        help="where peers reach this device; by default its address towards the coordinator",
    )
    command.add_argument(
        "--state-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="identity and logs; by default plutino/nodes/NAME in the user's state directory",
    )


def _default_memory(device: str) -> str:
    """Half of the machine's memory, the other half stays its owner's; of a card, what its context leaves."""
    if device != "cpu":
        from edge_node.processors import card_memory_bytes, processors_of

        (card,) = processors_of(device)
        return f"{int(0.9 * card_memory_bytes(card.removeprefix('card '))) // MIB}MiB"
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{total_bytes // 2 // MIB}MiB"


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
