"""The coordinator in the foreground, as ``plutino up`` runs it: its log, its first words, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from coordinator.app import CoordinatorConfig, run_coordinator
from coordinator.jobs.endpoints import Endpoints
from plutino.security.tokens import DEFAULT_TTL_S
from plutino.sizes import MIB
from plutino.wire.channel import is_loopback, split_address

LOG_FILE = "coordinator.log"
_LOG_BYTES = 16 * MIB
_NUM_OLD_LOGS = 2


def serve(config: CoordinatorConfig, *, as_json: bool) -> None:
    """Run until SIGTERM or SIGINT; raises as :func:`coordinator.app.run_coordinator`."""
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_path = config.state_dir / LOG_FILE
    _log_to(log_path)

    def say_ready(endpoints: Endpoints) -> None:
        print(_ready_json(endpoints) if as_json else _ready_text(endpoints, config.state_dir, log_path), flush=True)

    asyncio.run(run_coordinator(config, say_ready))


def join_command(endpoints: Endpoints) -> str:
    """The line that starts an agent with this coordinator."""
    if not endpoints.join_token:
        return f"plutino node run --coordinator {endpoints.devices_address}"
    return f"plutino node join {endpoints.join_token}"


def _ready_text(endpoints: Endpoints, state_dir: Path, log_path: Path) -> str:
    return (
        f"The coordinator runs. State: {state_dir}   log: {log_path}\n"
        f"{_how_to_join(endpoints, is_seen_by_a_person=sys.stdout.isatty())}\n"
        "Then hand a job in: plutino submit job.yaml. Ctrl-C ends the coordinator; jobs go on at its next start."
    )


def _how_to_join(endpoints: Endpoints, *, is_seen_by_a_person: bool) -> str:
    if not endpoints.join_token:
        return (
            "It runs without TLS: every user of this machine can use it, and no other machine can join.\n"
            "Start an agent on this machine (--memory 4GiB says what it may use):\n"
            f"  {join_command(endpoints)}"
        )
    if not is_seen_by_a_person:
        # Output that goes elsewhere ends in a log, and a token is a secret.
        return "Join a device with the line that this prints: plutino token create"
    is_here = all(is_loopback(split_address(address)[0]) for address in endpoints.join_addresses)
    where = "on this machine (for others: plutino up --listen 0.0.0.0:7420)" if is_here else "that reaches this one"
    return (
        f"Join one device {where}, within {DEFAULT_TTL_S / 60:.0f} minutes; for more: plutino token create\n"
        f"  {join_command(endpoints)}"
    )


def _ready_json(endpoints: Endpoints) -> str:
    return json.dumps(
        {
            "devices_address": endpoints.devices_address,
            "people_address": endpoints.people_address,
            "bulk_address": endpoints.bulk_address,
            "join_addresses": endpoints.join_addresses,
            "pid": os.getpid(),
            "join": join_command(endpoints),
        }
    )


def _log_to(path: Path) -> None:
    """Everything from INFO up into the file, warnings also on stderr."""
    file = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_NUM_OLD_LOGS, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    stderr = logging.StreamHandler()
    stderr.setLevel(logging.WARNING)
    stderr.setFormatter(logging.Formatter("plutino: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, stderr])
