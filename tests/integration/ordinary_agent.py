"""An agent with the fake worker, as a program: ``ordinary_agent.py COORDINATOR STATE_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_node.agent import AgentConfig, run_agent
from edge_node.pool_config import PoolConfig
from edge_node.state_dir import StateDir

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))

if __name__ == "__main__":
    pool = PoolConfig(memory_budget_bytes=1 << 28, threads=1, worker_command=FAKE_WORKER)
    config = AgentConfig(coordinator_address=sys.argv[1], name="ordinary", pool=pool)
    run_agent(config, StateDir(Path(sys.argv[2])))
