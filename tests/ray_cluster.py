"""A Ray cluster of several nodes on this machine, as a process of its own: loopback, own token, own folder.

The process is told what to do on its standard input, a line of JSON a command, and answers each with a line; it ends
its nodes when its input ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 80 * 2**20
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Keeps every daemon on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A node that dies is noticed in a second or two; by default Ray takes a quarter of a minute.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


class RayCluster:
    """The process, as a test speaks to it."""

    def __init__(self, folder: Path) -> None:
        token = folder / "ray-token"
        token.write_text("0123456789abcdef" * 2)
        token.chmod(0o600)
        self.environment = {**ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(token)}
        self._log = (folder / "ray-cluster.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        self.address: str = ""

    @property
    def process_id(self) -> int:
        """All of the cluster's processes are below it, as long as their parents live."""
        return self._process.pid

    def add_node(self, *, num_cpus: int, memory_bytes: int) -> str:
        """Start one more node, the head first; its id."""
        answer = self._ask(add={"num_cpus": num_cpus, "memory": memory_bytes})
        self.address = answer["address"]
        return str(answer["node_id"])

    def kill_node(self, node_id: str) -> None:
        """SIGKILL to a node's raylet: what ran there ends by itself."""
        self._ask(kill=node_id)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._log.close()

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the cluster's process ended: {Path(self._log.name).read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve() -> None:
    """What the process does."""
    # Ray writes on standard output, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="pray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        nodes: dict[str, Any] = {}
        try:
            for line in sys.stdin:
                command = json.loads(line)
                if "add" in command:
                    node = cluster.add_node(
                        **command["add"],
                        node_ip_address="127.0.0.1",
                        object_store_memory=OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        **({} if nodes else {"temp_dir": folder}),
                    )
                    nodes[node.node_id] = node
                    answer = {"address": cluster.address, "node_id": node.node_id}
                else:
                    node = nodes.pop(command["kill"])
                    cluster.remove_node(node, allow_graceful=False)
                    answer = {}
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    serve()
