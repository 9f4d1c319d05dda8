"""Runs a coordinator with the local engine: ``python coordinator_process.py STATE_DIR SETTLE_SECONDS``.

It does not verify adapters, which would import torch for 5 s in every test that restarts a coordinator.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from coordinator.app import CoordinatorConfig, run_coordinator
from coordinator.artifacts.verify_process import VerifyReport
from coordinator.fleet.registry import Patience
from coordinator.jobs.endpoints import Endpoints
from coordinator.scheduling.local import LocalEngine


def without_verification(config: CoordinatorConfig, endpoints: Endpoints, incarnation: int) -> LocalEngine:
    return LocalEngine(
        address=endpoints.people_address,
        bulk_address=endpoints.bulk_address,
        incarnation=incarnation,
        verify=lambda request: VerifyReport(checks=(), was_reloaded=False),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    config = CoordinatorConfig(
        state_dir=Path(sys.argv[1]),
        devices_address="127.0.0.1:0",
        people_address="127.0.0.1:0",
        engine="local",
        patience=Patience(settle_s=float(sys.argv[2])),
        is_plaintext=True,
    )
    asyncio.run(run_coordinator(config, lambda endpoints: None, make_engine=without_verification))
